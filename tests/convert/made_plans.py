"""Plans over random files, with the bytes that they must give, put together element by element in plain Python and torch."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mcore_longctx.convert.copying.execute import Execution, Written, execute
from mcore_longctx.convert.plans.plan import Blend, Fill, Plan, Scales, SourceFile, TargetFile
from mcore_longctx.convert.views import Piece, TensorRows
from mcore_longctx.errors import LongctxError
from mcore_longctx.formats.dtypes import BY_TORCH, DType

BF16, FP16, FP32, FP8 = (BY_TORCH[name] for name in ("bfloat16", "float16", "float32", "float8_e4m3fn"))


@dataclass
class Sources:
    """Files of random numbers in which tensors are stored, whole or in pieces."""

    folder: Path
    random: random.Random
    parts: dict[Path, list[bytes]] = field(default_factory=dict)

    def put(self, data: bytes) -> tuple[Path, int]:
        """Append `data` to one of three files, behind a gap: (file, offset)."""
        path = self.folder / f"source-{self.random.randrange(3)}.bin"
        parts = self.parts.setdefault(path, [])
        parts.append(self.random.randbytes(self.random.choice([0, 3, 64])))
        offset = sum(map(len, parts))
        parts.append(data)
        return path, offset

    def tensor(self, rows: int, columns: int, dtype: DType, *, pieces: int = 1) -> tuple[TensorRows, bytes]:
        """A matrix of ordinary numbers in up to pieces x pieces boxes, some of which are zeros, and its bytes."""
        numbers = torch.tensor([self.random.gauss(0, 1) for _ in range(rows * columns)]).reshape(rows, columns)
        row_borders, boxes = self._borders(rows, pieces), []
        for top, bottom in row_borders:
            for left, right in self._borders(columns, pieces):
                file: Path | None
                if pieces > 1 and self.random.random() < 0.15:
                    numbers[top:bottom, left:right] = 0
                    file, offset = None, 0
                else:
                    file, offset = self.put(tensor_bytes(numbers[top:bottom, left:right], dtype))
                boxes.append(Piece(top, bottom - top, left, right - left, file, offset))
        self.random.shuffle(boxes)
        return TensorRows(dtype, rows, columns, False, tuple(boxes)), tensor_bytes(numbers, dtype)

    def _borders(self, size: int, most: int) -> list[tuple[int, int]]:
        inner = self.random.sample(range(1, size), min(size - 1, self.random.randrange(most)))
        borders = [0, *sorted(inner), size]
        return list(itertools.pairwise(borders))

    def write(self) -> tuple[SourceFile, ...]:
        """Write the files; they end with the last tensor."""
        found = []
        for path, parts in sorted(self.parts.items()):
            path.write_bytes(b"".join(parts))
            os.utime(path, ns=(10**18, 10**18))
            found.append(SourceFile(path, path.stat().st_size, 10**18))
        return tuple(found)


def tensor_bytes(numbers: torch.Tensor, dtype: DType) -> bytes:
    """Little-endian bytes of `numbers` rounded to `dtype` by torch."""
    return numbers.contiguous().to(getattr(torch, dtype.name)).contiguous().view(torch.uint8).numpy().tobytes()


def as_float(data: bytes, dtype: DType, columns: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.name)).reshape(-1, columns)


@dataclass(frozen=True)
class Made:
    """A plan and the files that it must give."""

    plan: Plan
    expected: dict[str, bytes]

    def check(self, out: Path) -> None:
        for name, data in self.expected.items():
            assert (out / name).read_bytes() == data, name


def make_plan(folder: Path, seed: int, *, tensors: int = 6, size: int = 40, plain: bool = False) -> Made:
    """Random tensors, boxes of them, and what is done with them; `plain`: bytes stay what they are."""
    dice = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    sources = Sources(folder, dice)
    fills: list[Fill] = []
    images = [bytearray(dice.randbytes(dice.randrange(30))) for _ in range(dice.choice([1, 2, 3]))]
    small = [(number, 0, bytes(image)) for number, image in enumerate(images) if image]
    for number in range(tensors):
        rows, columns = dice.randrange(1, size), dice.choice([1, 2, 7, size])
        dtype = dice.choice([BF16, FP16, FP32])
        tensor, data = sources.tensor(rows, columns, dtype, pieces=dice.choice([1, 1, 4]))
        row, column = dice.randrange(rows), dice.randrange(columns)
        box = (row, dice.randrange(1, rows - row + 1), column, dice.randrange(1, columns - column + 1))
        if dice.random() < 0.5:
            box = (0, rows, 0, columns)
        image = dice.randrange(len(images))
        target, name = images[image], f"tensor.{number}"
        target += bytes(dice.choice([0, 0, 5]))  # a hole
        kind = "copy" if plain else dice.choice(["copy", "copy", "cast", "blend", "fp8"])
        if kind == "copy":
            fills.append(Fill(image, len(target), tensor, *box, dtype, name))
            target += cut_box(data, dtype.itemsize, columns, box)
        elif kind == "cast":
            wanted = dice.choice([BF16, FP16, FP32])
            fills.append(Fill(image, len(target), tensor, *box, wanted, name))
            target += tensor_bytes(as_float(cut_box(data, dtype.itemsize, columns, box), dtype, box[3]), wanted)
        elif kind == "blend":
            other, other_data = sources.tensor(rows, columns, dice.choice([BF16, FP32]))
            wanted, weight = dice.choice([BF16, FP32]), dice.random()
            blend = Blend(((tensor, weight), (other, 1 - weight)))
            fills.append(Fill(image, len(target), blend, *box, wanted, name))
            total = as_float(data, dtype, columns).float() * np.float32(weight)
            total = total + as_float(other_data, other.dtype, columns).float() * np.float32(1 - weight)
            target += cut_box(tensor_bytes(total, wanted), wanted.itemsize, columns, box)
        else:
            box = (box[0], box[1], 0, columns)
            numbers = as_float(cut_box(data, dtype.itemsize, columns, box), dtype, columns).float()
            scale = torch.clamp(numbers.abs().amax(1) / 448, min=2.0**-126)
            weights = tensor_bytes(numbers / scale[:, None], FP8)
            fills.append(Fill(image, len(target), tensor, *box, FP8, name, Scales(image, len(target) + len(weights))))
            target += weights + tensor_bytes(scale, FP32)
    names = [f"weights-{number}.bin" for number in range(len(images))]
    files = tuple(TargetFile(name, len(image)) for name, image in zip(names, images, strict=True))
    fills.sort(key=lambda fill: (fill.file, fill.offset))
    plan = Plan("export", {"seed": seed}, sources.write(), files, tuple(fills), lambda: iter(small))
    return Made(plan, {name: bytes(image) for name, image in zip(names, images, strict=True)})


def cut_box(data: bytes, itemsize: int, columns: int, box: tuple[int, int, int, int]) -> bytes:
    """The elements of a box of a row-major matrix, one by one."""
    row, rows, column, wide = box
    places = [(i * columns + j) * itemsize for i in range(row, row + rows) for j in range(column, column + wide)]
    return b"".join(data[place : place + itemsize] for place in places)


# ------------------------------------------------------------------ running them
def finish(folder: Path, written: Written) -> None:
    """What stands beside the weights: the names that are there, and the facts."""
    (folder / "config.json").write_text(repr((sorted(path.name for path in folder.glob("weights-*")), written)))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def forked(do: Callable[[], object]) -> int:
    """Start `do` in a process of its own and return its number. Exit codes as those of the command."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.alarm(60)
        do()
        code = 0
    except LongctxError as error:
        code = error.exit_code
        sys.stdout.write(f"{error}\n")
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Its exit code; minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(plan: Plan, out: Path, **how: object) -> bool:
    return execute(plan, out, finish, Execution(**how))


def wait_for(what: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
