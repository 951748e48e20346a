"""One process of the fuzz tests: damages a file again and again and looks at what the public functions make of it.

    python -m tests.convert.fuzz_cases TARGET FOLDER SEED COUNT

FOLDER holds `hf` (a Hugging Face folder), `sharded` (the same in several files), `megatron` (its import), `half.partial` (an import that
was stopped) and `original.json` (hashes of the right tensors). Prints JSON: how many were refused by one of our errors, how many
were accepted and gave what is right, the slowest case in CPU-seconds, and what went wrong. Memory is bounded from outside the interpreter.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.convert import Execution, export_hf, import_hf, inspect_folder, open_checkpoint, plan_export, plan_import
from mcore_longctx.convert.copying import units
from mcore_longctx.errors import LongctxError
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.formats.torch_archive import locate_payload
from tests.convert.fuzz import mutations, strange_values
from tests.convert.fuzz_pickles import pickle_mutations

ADDRESS_SPACE = 2 << 30  # the interpreter with numpy maps under 1 GiB
UNIT_BYTES = 4000  # of a journal, so that a model of 100 kB has many
QUICK = Execution(fsync=False)
Judge = Callable[[Path], str | None]  # raises one of our errors, or says what is wrong


def half_and_half(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged bytes, and whole JSON with strange values."""
    yield from mutations(data, count // 2, seed)
    yield from strange_values(json.loads(data), count - count // 2, seed)


def header_mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Of a safetensors file: its first bytes damaged, or values of its entries, the length made to fit."""
    (length,) = struct.unpack("<Q", data[:8])
    rest = data[8 + length :]
    yield from (damaged + rest for damaged in mutations(data[: 8 + length], count // 3, seed))
    for text in strange_values(json.loads(data[8 : 8 + length]), count // 3, seed):
        yield struct.pack("<Q", len(text)) + text + rest
    for text in _moved(json.loads(data[8 : 8 + length]), count - 2 * (count // 3), seed):
        yield struct.pack("<Q", len(text)) + text + rest


def _moved(header: dict[str, Any], count: int, seed: int) -> Iterator[bytes]:
    """Offsets, shapes, types and names exchanged or off by a little."""
    rng = random.Random(seed)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(count):
        changed = json.loads(json.dumps(header))
        for _ in range(rng.choice((1, 1, 2))):
            one, two = (changed[name] for name in rng.sample(names, 2))
            kind = rng.randrange(5)
            if kind == 0:
                one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
            elif kind == 1:
                one["data_offsets"][rng.randrange(2)] += rng.choice((-4, -1, 1, 4, 128))
            elif kind == 2:
                one["shape"] = rng.choice(
                    (one["shape"][::-1], [*one["shape"], 1], one["shape"][:-1], [0, *one["shape"]], two["shape"])
                )
            elif kind == 3:
                one["dtype"] = rng.choice(("F32", "BF16", "F16", "I32", "F64", "F8_E4M3", "U8", "BOOL", "f32", "I128"))
            else:
                one["dtype"], one["shape"] = "BF16", [2 * size for size in one["shape"][:1]] + one["shape"][1:]
        yield json.dumps(changed).encode()


def journal_mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Of JSON lines: bytes damaged, cut anywhere (as by a power cut), a strange value in a line, lines left out or doubled."""
    rng = random.Random(seed)
    lines = data.splitlines(keepends=True)
    damaged = mutations(data, count, seed)
    for _ in range(count):
        kind = rng.randrange(4)
        changed = list(lines)
        at = rng.randrange(len(changed))
        if kind == 0:
            yield next(damaged)
            continue
        if kind == 1:
            yield data[: rng.randrange(len(data))]
            continue
        if kind == 2:
            changed[at] = next(strange_values(json.loads(changed[at]), 1, rng.randrange(2**32))) + b"\n"
        else:
            changed[at : at + 1] = [] if rng.random() < 0.5 else [changed[at], rng.choice(lines)]
        yield b"".join(changed)


# ------------------------------------------------------------------------------------------------------------------ judges


def tensors_of(folder: Path) -> dict[str, str]:
    """Name -> hash of type, shape and elements, through our view."""
    return {
        name: _digest(rows.dtype.name, rows.shape, rows.read(0, rows.rows))
        for name, rows in open_checkpoint(folder).tensors.items()
    }


def _digest(dtype: str, shape: tuple[int, ...], data: bytes | bytearray) -> str:
    return hashlib.sha256(f"{dtype} {list(shape)} ".encode() + data).hexdigest()


def same_tensors(name: str, *, planned: Callable[[Path], object]) -> Callable[[Path], Judge]:
    """Whatever is accepted must hold the original's tensors."""

    def make(folder: Path) -> Judge:
        original = json.loads((folder / "original.json").read_text())

        def judge(work: Path) -> str | None:
            planned(work / name)
            found = tensors_of(work / name)
            wrong = [key for key in original if found.get(key) != original[key]]
            return f"accepted, with another {wrong[0]}" if wrong else None

        return judge

    return make


def as_safetensors_reads_it(folder: Path) -> Judge:
    """Whatever is accepted must be what the safetensors library reads out of the same bytes."""
    from safetensors import deserialize

    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

    def judge(work: Path) -> str | None:
        path = work / "hf" / "model.safetensors"
        plan_import(work / "hf")
        found = tensors_of(work / "hf")
        theirs = {
            name: _digest(names[entry["dtype"]], tuple(entry["shape"]), entry["data"])
            for name, entry in deserialize(path.read_bytes())
        }
        wrong = [key for key in found if found[key] != theirs.get(key)]
        return f"safetensors reads another {wrong[0]}" if wrong else None

    return judge


def chunks_of_the_original(folder: Path) -> Judge:
    """Whatever is accepted must consist of chunks that were stored as a whole: a name may point to another one of its shape."""

    def chunks(checkpoint: Path) -> set[str]:
        found = set()
        for name, tensor in read_torch_dist(checkpoint).tensors.items():
            for chunk in tensor.chunks:
                start = locate_payload(chunk.file, chunk.offset, chunk.length, tensor.dtype, chunk.sizes, tensor=name)
                with chunk.file.open("rb") as file:
                    file.seek(start)
                    size = tensor.dtype.itemsize
                    for count in chunk.sizes:
                        size *= count
                    found.add(_digest(tensor.dtype.name, chunk.sizes, file.read(size)))
        return found

    original = chunks(folder / "megatron")

    def judge(work: Path) -> str | None:
        plan_export(work / "megatron")
        tensors_of(work / "megatron")
        return None if chunks(work / "megatron") <= original else "accepted, with elements that are no stored chunk"

    return judge


def fingerprint_kept(folder: Path) -> Judge:
    """Whatever is accepted must have the original's rope and tensors."""
    original = json.loads((folder / "original.json").read_text())
    rope = open_checkpoint(folder / "megatron").rope.fingerprint()

    def judge(work: Path) -> str | None:
        plan_export(work / "megatron")
        if open_checkpoint(work / "megatron").rope.fingerprint() != rope:
            return "accepted, with another rope"
        found = tensors_of(work / "megatron")
        return None if found == original else "accepted, with other tensors"

    return judge


def described(folder: Path) -> Judge:
    """Nothing of the file is needed for weights: describing the folder may refuse or not, export must not care."""

    def judge(work: Path) -> str | None:
        inspect_folder(work / "megatron")
        plan_export(work / "megatron")
        return None

    return judge


def goes_on_right(folder: Path) -> Judge:
    """A run that goes on with a damaged journal must give the right bytes."""

    def weights(out: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.distcp"))}

    original = weights(folder / "megatron")

    def judge(work: Path) -> str | None:
        out = work / "half"
        try:
            import_hf(folder / "hf", out, how=QUICK)
            return None if weights(out) == original else "went on, to other weights"
        finally:
            shutil.rmtree(out, ignore_errors=True)
            for name in ("half.partial", "half.partial-journal"):
                path = work / name
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            shutil.copytree(folder / "half.partial", work / "half.partial")

    return judge


@dataclass(frozen=True)
class Target:
    """A file, how it is damaged, and who judges."""

    file: str
    mutate: Callable[[bytes, int, int], Iterator[bytes]]
    judge: Callable[[Path], Judge]


TARGETS = {
    "header": Target("hf/model.safetensors", header_mutations, as_safetensors_reads_it),
    "index": Target("sharded/model.safetensors.index.json", half_and_half, same_tensors("sharded", planned=plan_import)),
    "config": Target("hf/config.json", half_and_half, same_tensors("hf", planned=plan_import)),
    "stored config": Target("megatron/hf/config.json", half_and_half, same_tensors("megatron", planned=plan_export)),
    "card": Target("megatron/mcore_longctx.json", half_and_half, fingerprint_kept),
    "manifest": Target("megatron/manifest.json", half_and_half, fingerprint_kept),
    "backend": Target("megatron/metadata.json", half_and_half, same_tensors("megatron", planned=plan_export)),
    "metadata": Target("megatron/.metadata", pickle_mutations, chunks_of_the_original),
    "common": Target("megatron/common.pt", mutations, described),
    "items": Target("megatron/__0_0.distcp", mutations, described),
    "journal": Target("half.partial/journal-0.jsonl", journal_mutations, goes_on_right),
}


# ------------------------------------------------------------------------------------------------------------------ the loop


def run(target: Target, folder: Path, seed: int, count: int) -> dict[str, Any]:
    """Judge `count` damaged copies."""
    work = folder / f"work-{os.getpid()}"
    work.mkdir()
    for name in {target.file.split("/")[0], "hf"}:
        shutil.copytree(folder / name, work / name)
    path = work / target.file
    data = path.read_bytes()
    judge = target.judge(folder)
    report: dict[str, Any] = {"refused": 0, "accepted": 0, "slowest": 0.0, "wrong": []}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, damaged in enumerate(target.mutate(data, count, seed)):
        path.write_bytes(damaged)
        began = time.process_time()
        wrong: str | None = None
        try:
            wrong = judge(work)
        except LongctxError as error:
            report["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 2000:
                wrong = f"not a line: {str(error)[:300]!r}"
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"[:300]
        else:
            report["accepted"] += wrong is None
        report["slowest"] = max(report["slowest"], time.process_time() - began)
        if wrong is not None:
            report["wrong"].append(f"case {number}: {wrong}")
    report["grown"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    shutil.rmtree(work)
    return report


def prepare(folder: Path) -> None:
    """Make `megatron`, `original.json` and `half.partial` from `hf`."""
    import_hf(folder / "hf", folder / "megatron", how=QUICK)
    (folder / "original.json").write_text(json.dumps(tensors_of(folder / "hf")))
    export_hf(folder / "megatron", folder / "exported", how=QUICK)
    assert tensors_of(folder / "exported") == tensors_of(folder / "hf")


def main() -> None:
    """The command line."""
    target, folder, seed, count = sys.argv[1:]
    units.UNIT_BYTES = UNIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    json.dump(run(TARGETS[target], Path(folder), int(seed), int(count)), sys.stdout)


if __name__ == "__main__":
    main()
