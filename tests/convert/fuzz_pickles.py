"""Pickles that are damaged with knowledge of their opcodes, and pickles that would run something."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import pickletools
import random
import runpy
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.convert.fuzz import mutations

NUMBERS = (0, 1, 2, 3, 63, 127, 255, 256, 65535, 2**31 - 1, -1, -(2**31), 2**32, 2**63 - 1, 2**63, 2**64, -(2**70))
TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "os",
    "system",
    "builtins",
    "eval",
    "torch",
    "load",
    "__reduce__",
)
NAMES = (
    b"cos\nsystem\n",
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n",
    b"ctorch\nload\n",
    b"csubprocess\nPopen\n",
    b"ctorch.distributed.checkpoint.metadata\nMetadata.__class__\n",
    b"c__builtin__\nexec\n",
)
BOMBS = (
    b"\x8d" + struct.pack("<Q", 2**62),  # BINUNICODE8
    b"X" + struct.pack("<I", 2**32 - 1),
    b"B" + struct.pack("<I", 2**32 - 1),
    b"\x8e" + struct.pack("<Q", 2**60),  # BINBYTES8
    b"\x96" + struct.pack("<Q", 2**60),  # BYTEARRAY8
    b"\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
    b"\x95" + struct.pack("<Q", 2**63),  # FRAME
    b"r" + struct.pack("<I", 2**32 - 1),  # memo
    b"j" + struct.pack("<I", 2**32 - 1),
    b"(" * 50_000,
    b"]" * 50_000,
    b")" + b"\x85" * 50_000,  # tuples in tuples
    b"\x82\x01",  # EXT1
    b"(iposix\nsystem\n",  # INST
    b"P0\n",
    b"Q",
    b"b",
    b"R",
    b"\x81",
    b"0",
    b"2" * 1000,
    b".",
)


def pickle_mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of a pickle: half by opcode, half by byte."""
    pieces = _opcodes(data)
    rng = random.Random(seed)
    by_byte = mutations(data, count, seed)
    for _ in range(count):
        if rng.random() < 0.3:
            yield next(by_byte)
            continue
        changed = list(pieces)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change(changed, rng)
        yield b"".join(changed)


def _opcodes(data: bytes) -> list[bytes]:
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def _change(pieces: list[bytes], rng: random.Random) -> None:
    kind = rng.randrange(8)
    at = rng.randrange(len(pieces))
    if kind == 0:
        numbers = [i for i, piece in enumerate(pieces) if piece[:1] in b"KMJ\x8a"]
        at = rng.choice(numbers or [at])
        old = next(pickletools.genops(pieces[at] + b"."))[1] if numbers else 0
        near = (old - 1, old + 1, old * 2, old // 2, -old) if isinstance(old, int) else ()
        pieces[at] = _number(rng.choice((*NUMBERS, *near)))
    elif kind == 1:
        texts = [i for i, piece in enumerate(pieces) if piece[:1] in b"X\x8c"]
        at = rng.choice(texts or [at])
        pieces[at] = rng.choice((_text(rng.choice(TEXTS)), pieces[rng.choice(texts or [at])]))
    elif kind == 2:
        names = [i for i, piece in enumerate(pieces) if piece[:1] == b"c"]
        pieces[rng.choice(names or [at])] = rng.choice((*NAMES, *(pieces[i] for i in names)))
    elif kind == 3:
        pieces[at:at] = [rng.choice(BOMBS)]
    elif kind == 4:
        del pieces[at : at + rng.choice((1, 1, 5))]
        pieces[at:at] = [] if pieces else [b"."]
    elif kind == 5:
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif kind == 6:
        pieces[at:at] = pieces[at : at + rng.randrange(1, 20)]
    else:
        memos = [i for i, piece in enumerate(pieces) if piece[:1] in b"hjqr"]
        index = rng.choice((0, 1, 7, 200, 2**16, 2**31))
        pieces[rng.choice(memos or [at])] = rng.choice(b"jr").to_bytes(1, "little") + struct.pack("<I", index)


def _number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


# ------------------------------------------------------------------------------------------------------------------ hostile


class _Calls:
    """Pickled as a call of `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """What runs -> a pickle that makes the file `canary` when Python's own unpickler reads it."""
    path = str(canary)
    code = f"open({path!r}, 'w').close()"
    calls = {
        "os.system": _Calls(os.system, f"touch {path}"),
        "subprocess.Popen": _Calls(subprocess.check_call, ["touch", path]),
        "builtins.eval": _Calls(builtins.eval, code),
        "builtins.exec": _Calls(builtins.exec, code),
        "builtins.open": _Calls(builtins.open, path, "w"),
        "os.mkdir": _Calls(os.mkdir, path),
        "os.open": _Calls(os.open, path, os.O_CREAT),
        "shutil.copyfile": _Calls(shutil.copyfile, "/dev/null", path),
        "pathlib.Path.touch": _Calls(Path.touch, canary),
        "runpy": _Calls(runpy._run_code, code, {}),
    }
    touch = f"touch {path}".encode()
    found = {
        f"{name}, protocol {protocol}": pickle.dumps([call], protocol) for name, call in calls.items() for protocol in (2, 4)
    }
    found |= {
        "INST": b"(S'touch " + path.encode() + b"'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nX" + struct.pack("<I", len(touch)) + touch + b"o.",
        "GLOBAL, protocol 0": b"cposix\nsystem\n(S'touch " + path.encode() + b"'\ntR.",
        "through getattr": b"cbuiltins\ngetattr\n(cos\npath\nX\x07\x00\x00\x00__doc__t0cposix\nsystem\n(X"
        + struct.pack("<I", len(touch))
        + touch
        + b"tR.",
        "after a good start": b"\x80\x02}q\x00(X\x01\x00\x00\x00acposix\nsystem\nX"
        + struct.pack("<I", len(touch))
        + touch
        + b"\x85Ru.",
        "BUILD": b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00xcposix\nsystem\nX"
        + struct.pack("<I", len(touch))
        + touch
        + b"\x85Rsb.",
    }
    return found


def archive(pickled: bytes, prefix: str = "archive") -> bytes:
    """A torch.save archive around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", bytes(64))):
            file.writestr(f"{prefix}/{name}", data)
    return out.getvalue()
