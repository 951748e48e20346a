"""Damaged copies of a file, seeded: flips, cuts, insertions, ranges doubled, moved or zeroed, and chosen values in chosen places."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

EDGES = (0, 1, -1, 2, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63)


def mutations(raw: bytes, count: int, *, seed: int, fields: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[str, bytes]]:
    """`count` different damaged versions of `raw`, each with what was done to it.

    fields: offset and width in bytes of little-endian integers; a third of the mutations set one of them to a value of EDGES, or
    a little more or less than it is.
    """
    rng, seen = random.Random(seed), {raw}
    made = 0
    while made < count:
        what, changed = _field(raw, rng, fields) if fields and rng.random() < 0.34 else _anywhere(raw, rng)
        if changed not in seen:
            seen.add(changed)
            made += 1
            yield what, changed


def _field(raw: bytes, rng: random.Random, fields: Sequence[tuple[int, int]]) -> tuple[str, bytes]:
    offset, width = rng.choice(fields)
    old = int.from_bytes(raw[offset : offset + width], "little")
    value = rng.choice([*EDGES, old + 1, old - 1, old * 2, old + rng.randrange(1000), rng.getrandbits(8 * width)]) % 2 ** (
        8 * width
    )
    return f"field {offset} = {value}", raw[:offset] + value.to_bytes(width, "little") + raw[offset + width :]


def _anywhere(raw: bytes, rng: random.Random) -> tuple[str, bytes]:
    low = rng.randrange(len(raw))
    high = min(len(raw), low + 1 + int(rng.expovariate(1 / 16)))
    part = raw[low:high]
    kind = rng.choice(["bit", "bit", "byte", "cut", "remove", "insert", "double", "zero", "move", "append"])
    if kind == "bit":
        return f"bit at {low}", raw[:low] + bytes([raw[low] ^ 1 << rng.randrange(8)]) + raw[low + 1 :]
    if kind == "byte":
        return f"byte at {low}", raw[:low] + bytes([rng.randrange(256)]) + raw[low + 1 :]
    if kind == "cut":
        return f"cut at {low}", raw[:low]
    if kind == "append":
        return "append", raw + rng.randbytes(rng.randrange(1, 20))
    rest = raw[:low] + raw[high:]
    to = rng.randrange(len(rest) + 1)
    changed = {
        "remove": rest,
        "insert": raw[:low] + rng.randbytes(high - low) + raw[low:],
        "double": raw[:high] + part + raw[high:],
        "zero": raw[:low] + bytes(high - low) + raw[high:],
        "move": rest[:to] + part + rest[to:],
    }[kind]
    return f"{kind} {low} to {high}", changed
