"""Whether two checkpoints hold the same numbers, read without the package that is measured; and files in the page cache."""

from __future__ import annotations

import ctypes
import filecmp
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["cached_share", "difference", "make_cached", "same_weights", "tensors_in"]

Array = np.ndarray[Any, Any]
ROWS = 1 << 22  # numbers compared at once
# a number of three mantissa bits is off by at most 2^-4 of itself, or half of the smallest step of its row (2^-9 x scale)
FP8_RELATIVE, FP8_STEP = 1 / 16, 2**-10


def tensors_in(folder: Path) -> dict[str, tuple[str, Array]]:
    """Name -> (element type as safetensors spells it, raw bytes by row) of every `.safetensors` file, mapped and not read."""
    found: dict[str, tuple[str, Array]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", 8 + length) if path.stat().st_size > 8 + length else np.empty(0, np.uint8)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                rows = entry["shape"][0] if entry["shape"] else 1
                found[name] = entry["dtype"], data[begin:end].reshape(rows, -1)
    return found


def difference(hf: Path, out: Path, *, fp8: bool = False) -> str | None:
    """What is different in `out`, in words; None if it holds the tensors of `hf`, all of them and no other.

    `fp8`: matrices may be float8_e4m3 with a `weight_scale` a row, and each number as near as that type allows.
    """
    first, second = tensors_in(hf), tensors_in(out)
    scales = {name: second.pop(name) for name in list(second) if fp8 and name.endswith(".weight_scale")}
    if first.keys() != second.keys():
        return f"names: {sorted(first.keys() ^ second.keys())[:3]}"
    if fp8 and len(scales) < len(first) // 2:
        return f"{len(scales)} scales for {len(first)} tensors"
    for name, (dtype, rows) in first.items():
        other_dtype, others = second[name]
        if fp8 and other_dtype == "F8_E4M3":
            (_, scale) = scales[f"{name}_scale"]
            if not _near(rows, others, scale.view(np.float32)):
                return f"{name}: further off than float8_e4m3"
        elif dtype != other_dtype or rows.shape != others.shape or not np.array_equal(rows, others):
            return name
    return None


def _near(rows: Array, others: Array, scale: Array) -> bool:
    import ml_dtypes

    step = max(1, ROWS // rows.shape[1])
    for row in range(0, len(rows), step):
        exact = rows[row : row + step].view(ml_dtypes.bfloat16).astype(np.float32)
        factor = scale[row : row + step].reshape(-1, 1)
        stored = others[row : row + step].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * factor
        allowed = np.maximum(np.abs(exact) * FP8_RELATIVE, factor * FP8_STEP) * (1 + 1e-5)
        if not bool((np.abs(stored - exact) <= allowed).all()):  # false for NaN, too
            return False
    return True


def same_weights(first: Path, second: Path) -> str | None:
    """Which of the files with weights are not byte for byte the same in two torch_dist folders."""
    names = [[*sorted(path.name for path in folder.glob("*.distcp")), ".metadata"] for folder in (first, second)]
    if names[0] != names[1]:
        return f"files: {names[0]} and {names[1]}"
    _, different, unread = filecmp.cmpfiles(first, second, names[0], shallow=False)
    return ", ".join(different + unread) or None


# ------------------------------------------------------------------------------------------------------------------ page cache


def make_cached(folder: Path) -> None:
    """Read every file. Raises if the page cache does not keep them: the machine has too little memory for the benchmark."""
    buffer = bytearray(4 << 20)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    share = cached_share(folder)
    if share < 0.99:
        raise SystemExit(f"{folder}: {share:.0%} stays in the page cache; free some memory, or measure a smaller --size")


def cached_share(folder: Path) -> float:
    """Part of the folder's pages that are in the page cache."""
    pages = cached = 0
    for path in _files(folder):
        states = _page_states(path)
        pages += len(states)
        cached += sum(states)
    return cached / max(pages, 1)


def _page_states(path: Path) -> bytes:
    """A byte for every page of a file: 1 if it is in the page cache."""
    size = path.stat().st_size
    if not size:
        return b""
    states = (ctypes.c_ubyte * math.ceil(size / mmap.PAGESIZE))()
    # ACCESS_COPY: ctypes asks for memory that could be written; nothing is
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        code = ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), states)
        del first
    if code:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return bytes(state & 1 for state in states)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
