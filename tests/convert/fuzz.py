"""Random damage to files: byte changes, cuts, insertions, swapped pieces, hostile numbers."""

from __future__ import annotations

import copy
import json
import random
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mcore_longctx.errors import LongctxError

SECONDS = 0.5  # one damaged file of a few kilobytes must be judged in this time


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of `data`."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            _damage(damaged, rng)
        yield bytes(damaged)


def _damage(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data)) if data else 0
    kind = rng.randrange(7)
    if kind == 0 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and data:
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + rng.randrange(1, 9)]
    elif kind == 4:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 5:
        number = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
        data[at : at + 8] = struct.pack("<Q", number)[: len(data[at : at + 8])]
    else:
        other = rng.randrange(len(data)) if data else 0
        data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]


STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**70,
    1e308,
    -1.5,
    0.5,
    "",
    "32",
    [],
    [1],
    {},
    {"a": 1},
    "x" * 1000,
)


def strange_values(settings: dict[str, Any], count: int, seed: int) -> Iterator[bytes]:
    """`count` JSON texts of `settings` with values, also nested ones, replaced by strange ones or left out."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(settings)
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.choice([changed, *(value for value in changed.values() if isinstance(value, dict) and value)])
            if not place:
                break
            key = rng.choice(list(place))
            place[key] = rng.choice(STRANGE)
            if rng.random() < 0.2:
                del place[key]
        yield json.dumps(changed).encode()


def only_our_errors(read: Callable[[], Any]) -> bool:
    """Call `read`; True if it refused with one of our errors in one line, False if it accepted. Anything else fails the test."""
    start = time.process_time()
    message = ""
    try:
        read()
    except LongctxError as error:
        message = str(error)
    except Exception as error:
        pytest.fail(f"{type(error).__name__} instead of one of our errors: {error}")
    assert "\n" not in message
    assert len(message) < 2000
    assert time.process_time() - start < SECONDS
    return message != ""
