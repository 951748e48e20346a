"""`data pack`: tokens copied by a plan into `.bin/.idx`, with the sidecar that says where every token came from.

One sequence, and one document, of exactly seq_length tokens per sample. Stored with seq_length + 1, Megatron's GPTDataset would
drift by one token a sample; this way it reads the very samples (except the last one of an epoch, see `docs/data.md`).

    OUT/NAME.packing/            while it goes on: tokens.bin, and 000012.crc for every block of samples that is on disk
    OUT/NAME.runs .bin .idx      the samples; the index is renamed after the tokens, so Megatron finds a whole pair or nothing
    OUT/manifest.json            last: hashes of all of them
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.arrays import map_arrays, new_arrays, write_arrays
from mcore_longctx.data.files.index_file import IndexColumns, write_index
from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import LITERAL, RUN_COLUMNS, Runs
from mcore_longctx.data.planning.plan import read_plan
from mcore_longctx.data.tokens.job import TokenJob, open_job, read_documents_table
from mcore_longctx.data.workspace import remove_aside, remove_leftovers, run_tasks
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import MANIFEST, read_sealed, verify_manifest, versions, write_manifest, write_sealed

__all__ = ["PackReport", "pack"]

IntArray = npt.NDArray[np.int64]

_BLOCK_BYTES = 64 << 20  # of samples a task
_SUFFIXES = ("runs", "bin", "idx")  # in the order in which they get their names
_ROWS = 1 << 20  # runs or ids that are copied into the sidecar at once


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What was packed. `str(report)` is the text for the screen."""

    folder: Path
    name: str
    samples: int
    seq_length: int
    bin_sha256: str
    was_done: bool

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return vars(self) | {"folder": str(self.folder)}

    def __str__(self) -> str:
        done = " (done before)" if self.was_done else ""
        total = self.samples * self.seq_length
        return f"{self.samples:,} samples of {self.seq_length:,} tokens, {total:,} tokens: {self.folder / self.name}.bin .idx .runs{done}"


def pack(
    out: Path,
    name: str,
    *,
    workers: int = 1,
    facts: Mapping[str, Any] | None = None,
    on_block: Callable[[int], None] = lambda tokens: None,
) -> PackReport:
    """Write OUT/NAME.bin, .idx and .runs by the plan in OUT/plan. A run that was killed goes on where it was.

    The caller holds the lock of OUT.

    Args:
        out: run folder with tokens and a plan.
        name: of the files.
        workers: processes.
        facts: what else the manifest should say.
        on_block: called with the tokens of every block that is written.

    Raises:
        ConfigError: OUT holds other packed data.
        DataError: tokens or plan are missing, damaged, or do not belong together; or no space is left.
    """
    check_name(name)
    job = open_job(out)
    runs, plan = read_plan(out / "plan")
    done = _done_before(out, name, plan)
    if done is not None:
        return done
    table = read_documents_table(job)
    if plan["documents_sha256"] != table.sha256():
        raise DataError("was made from other tokens", where=out / "plan", fix="run `data plan` again")
    work = _work_folder(out, name, job, plan)
    pad_token_id = _pad_id(job) if plan["tokens_of_padding"] else None
    packer = _Packer(job, table, runs, work, pad_token_id)
    blocks = [block for block in range(packer.blocks) if not packer.mark(block).is_file()]
    for tokens in run_tasks(packer.write_block, blocks, workers):
        on_block(tokens)
    crc32 = np.concatenate([map_arrays(packer.mark(block))[0]["crc32"] for block in range(packer.blocks)])
    index = IndexColumns(np.full(len(runs), runs.seq_length, np.int32), np.arange(len(runs) + 1))
    sidecar_facts = {
        "idx_crc32": write_index(work / "samples.idx", job.dtype, [index]),
        "dtype": job.dtype.name,
        "tokenizer_sha256": job.tokenizer_sha256,
        "vocab_size": job.vocab_size,
        "plan_sha256": plan["plan_sha256"],
        "seed": plan["seed"],
        "pad_token_id": pad_token_id,
        "begin_tokens": plan["begin_tokens"],
        "versions": versions(),
    }
    if "augment" in plan:
        sidecar_facts["augment"] = plan["augment"]
    _write_sidecar(work / "samples.runs", runs, table, crc32, sidecar_facts)
    _publish(out, name, work)
    for picture in ("lengths.json", "lengths.png"):
        shutil.copyfile(out / "plan" / picture, out / picture)
    files = (f"{name}.bin", f"{name}.idx", f"{name}.runs", "lengths.json", "lengths.png")
    write_manifest(
        out,
        "data",
        files=files,
        name=name,
        seq_length=runs.seq_length,
        samples=len(runs),
        **{count: plan[count] for count in plan if count.startswith("tokens")},
        tokenizer={"sha256": job.tokenizer_sha256, "vocab_size": job.vocab_size},
        plan_sha256=plan["plan_sha256"],
        seed=plan["seed"],
        settings=plan["settings"],
        sources=plan["lengths"],
        **(facts or {}),
    )
    remove_aside(work)
    done = _done_before(out, name, plan)
    assert done is not None
    return PackReport(**(vars(done) | {"was_done": False}))


def check_name(name: str) -> None:
    """Raise ConfigError if `name` cannot be the name of packed data."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ConfigError(f"{name!r} cannot be a file name", where="data", fix="rename the data set")


def _done_before(out: Path, name: str, plan: Mapping[str, Any]) -> PackReport | None:
    """The packed data that OUT holds, if it is the one that is asked for.

    Raises:
        ConfigError: it holds another.
    """
    remove_leftovers(out)
    if not (out / MANIFEST).is_file():
        return None
    manifest = verify_manifest(out, "data", hashes=False)
    remove_aside(out / f"{manifest['name']}.packing")  # a kill may have come before that
    if manifest["name"] != name or manifest["plan_sha256"] != plan["plan_sha256"]:
        raise ConfigError(
            f"holds packed data {manifest['name']!r} of another name or plan", where=out, fix="use another output folder"
        )
    return PackReport(
        folder=out,
        name=name,
        samples=int(manifest["samples"]),
        seq_length=int(manifest["seq_length"]),
        bin_sha256=str(manifest["files"][f"{name}.bin"]["sha256"]),
        was_done=True,
    )


def _work_folder(out: Path, name: str, job: TokenJob, plan: Mapping[str, Any]) -> Path:
    """OUT/NAME.packing for this plan: begun before, or new. What an unfinished pack of another plan or name left is removed."""
    work = out / f"{name}.packing"
    settings = {"kind": "packing", "plan_sha256": plan["plan_sha256"], "dtype": job.dtype.name, "block_bytes": _BLOCK_BYTES}
    for other in sorted(out.glob("*.packing")):
        found = _packing_settings(other)
        if found is None or (other == work and found == settings):
            continue
        for suffix in reversed(_SUFFIXES):  # the index first: it says that the rest is there
            (out / f"{other.name.removesuffix('.packing')}.{suffix}").unlink(missing_ok=True)
        remove_aside(other)  # last: as long as it is there, its files of a final name are known for ours
    remove_leftovers(out)
    if _packing_settings(work) is None:
        for suffix in _SUFFIXES:
            if (out / f"{name}.{suffix}").exists():
                raise ConfigError(
                    "is already there, and not from this plan", where=out / f"{name}.{suffix}", fix="use another name"
                )
        remove_leftovers(work, of=("settings.json",))
        if work.exists() and any(work.iterdir()):
            raise ConfigError(
                "is no folder of an unfinished pack, or a damaged one", where=work, fix="remove it or use another name"
            )
        work.mkdir(exist_ok=True)
        write_sealed(work / "settings.json", settings)
    remove_leftovers(work)
    return work


def _packing_settings(work: Path) -> dict[str, Any] | None:
    """What an unfinished pack was begun with; None if it is not sure that this is such a folder."""
    try:
        settings = read_sealed(work / "settings.json")
    except (ValueError, KeyError, OSError):
        return None
    return settings if settings.get("kind") == "packing" else None


def _publish(out: Path, name: str, work: Path) -> None:
    """The files get their names, the index last. What an earlier start has renamed is already there."""
    for suffix in _SUFFIXES:
        source = work / ("tokens.bin" if suffix == "bin" else f"samples.{suffix}")
        if source.exists():
            source.replace(out / f"{name}.{suffix}")


def _pad_id(job: TokenJob) -> int:
    """The id that fills samples: the tokenizer's pad token, else its EOS.

    Raises:
        DataError: it names neither.
    """
    for role in ("pad_token", "eos_token"):
        if role in job.ids:
            return job.ids[role][0]
    where = job.tokenizer.parent / "tokenizer_config.json"
    raise DataError("no pad_token and no eos_token that the tokenizer knows", where=where, fix="name one of them there")


class _Packer:
    """Copies blocks of samples. Each block is a task: any process may write any of them, in any order."""

    def __init__(self, job: TokenJob, table: DocumentTable, runs: Runs, work: Path, pad_id: int | None) -> None:
        self.table, self.runs, self.dtype, self.work, self.pad_id = table, runs, job.dtype, work, pad_id
        self.literals = runs.literals.astype(job.dtype)
        self.offset = table.token_offset  # computed here once: the workers inherit it
        sample_bytes = runs.seq_length * job.dtype.itemsize
        self.block_samples = max(1, _BLOCK_BYTES // sample_bytes)
        self.blocks = -(-len(runs) // self.block_samples)
        self.path = work / "tokens.bin"
        self._shard_tokens = lru_cache(512)(lambda shard: table.shards[shard].tokens())
        published = work.parent / f"{work.name.removesuffix('.packing')}.bin"
        if not self.path.exists() and not published.exists():
            for mark in work.glob("*.crc"):  # of a file that is gone
                mark.unlink()
            _reserve(self.path, len(runs) * sample_bytes)

    def mark(self, block: int) -> Path:
        """The file that says that a block is on disk, with its checksums."""
        return self.work / f"{block:06d}.crc"

    def write_block(self, block: int) -> int:
        """Write one block and then its mark; the number of its tokens.

        Raises:
            DataError: a shard is damaged, or no space is left.
        """
        first = block * self.block_samples
        stop = min(first + self.block_samples, len(self.runs))
        sample = np.empty(self.runs.seq_length, self.dtype)
        crc32 = np.empty(stop - first, np.uint32)
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(first * sample.nbytes)
                for index in range(first, stop):
                    self._fill(sample, index)
                    raw: memoryview = sample.data.cast("B")
                    crc32[index - first] = zlib.crc32(raw)
                    while raw:  # one call writes at most 2 GiB
                        raw = raw[file.write(raw) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"cannot be written ({error.strerror})", where=self.path, fix="make room and start again") from None
        write_arrays(self.mark(block), {"crc32": crc32}, {})
        return (stop - first) * self.runs.seq_length

    def _fill(self, sample: npt.NDArray[Any], index: int) -> None:
        rows = self.runs.rows(index)
        document = self.runs.document[rows]
        known = np.maximum(document, 0)
        shard = np.searchsorted(self.table.shard_first, known, side="right") - 1
        begin = np.where(document >= 0, self.offset[known] if len(self.offset) else 0, 0) + self.runs.start[rows]
        at = 0
        columns = (document.tolist(), shard.tolist(), begin.tolist(), self.runs.length[rows].tolist())
        for which, number, start, length in zip(*columns, strict=True):
            if which >= 0:
                sample[at : at + length] = self._shard_tokens(number)[start : start + length]
            elif which == LITERAL:
                sample[at : at + length] = self.literals[start : start + length]
            else:
                sample[at : at + length] = self.pad_id
            at += length
        assert at == len(sample)


def _reserve(path: Path, size: int) -> None:
    """A file of `size` bytes whose space is there: a full disk is noticed before hours of copying."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            aside.unlink()
            raise DataError(f"no room for {size:,} bytes ({error.strerror})", where=path.parent, fix="make room") from None
    aside.replace(path)


# ------------------------------------------------------------------ sidecar
def _write_sidecar(path: Path, runs: Runs, table: DocumentTable, crc32: npt.NDArray[np.uint32], facts: dict[str, Any]) -> None:
    """The runs of the plan, with only those documents that are used, numbered as they appear, and their ids."""
    number, used = _by_appearance(runs, len(table))
    id_length = _id_lengths(table, used)
    columns: dict[str, Any] = {name: (dtype, len(runs.length)) for name, dtype in RUN_COLUMNS.items()}
    columns |= {"first_run": (np.int64, len(runs.first_run)), "literals": (np.int32, len(runs.literals))}
    columns |= {"crc32": (np.uint32, len(crc32)), "document_source": (np.uint16, len(used)), "id_stop": (np.int64, len(used))}
    columns["ids"] = (np.uint8, int(id_length.sum()))
    head = {"format": 1, "kind": "sidecar", "seq_length": runs.seq_length, "sources": runs.sources, "documents": len(used)}
    with new_arrays(path, columns, head | facts) as file:
        for low in range(0, len(runs.length), _ROWS):
            block = slice(low, low + _ROWS)
            document = runs.document[block]
            file["document"][block] = (
                np.where(document >= 0, number[np.maximum(document, 0)], document) if len(used) else document
            )
            for name in ("start", "length", "loss"):
                file[name][block] = getattr(runs, name)[block]
        file["first_run"][:], file["literals"][:], file["crc32"][:] = runs.first_run, runs.literals, crc32
        file["document_source"][:], file["id_stop"][:] = table.source[used], np.cumsum(id_length)
        _copy_ids(file["ids"], table, used, id_length)


def _by_appearance(runs: Runs, documents: int) -> tuple[IntArray, IntArray]:
    """Number of each row of the table in the order in which the samples use them (-1: unused), and the rows in that order.

    The order of the table is that of the input files: it must not show in the result.
    """
    number = np.full(documents, -1)
    used: list[IntArray] = []
    count = 0
    for low in range(0, len(runs.document), _ROWS):
        document = runs.document[low : low + _ROWS]
        rows, first = np.unique(document[document >= 0], return_index=True)
        is_new = number[rows] < 0
        new = rows[is_new][np.argsort(first[is_new])]
        number[new] = np.arange(count, count + len(new))
        used.append(new)
        count += len(new)
    return number, np.concatenate(used)


def _id_lengths(table: DocumentTable, used: IntArray) -> IntArray:
    """Bytes of the ids of documents, int64 [used]."""
    lengths = [np.diff(shard.id_stop, prepend=0) for shard in table.shards]
    return np.concatenate(lengths)[used] if lengths else np.zeros(0, np.int64)


def _copy_ids(out: npt.NDArray[np.uint8], table: DocumentTable, used: IntArray, length: IntArray) -> None:
    begins = np.cumsum(length) - length
    for low in range(0, len(used), _ROWS):
        rows, size, begin = (column[low : low + _ROWS] for column in (used, length, begins))
        shards = np.searchsorted(table.shard_first, rows, side="right") - 1
        for number in np.unique(shards).tolist():
            mine = shards == number
            sizes = size[mine]
            inner = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # place of each byte in its id
            stops = table.shards[number].id_stop[rows[mine] - int(table.shard_first[number])]
            out[np.repeat(begin[mine], sizes) + inner] = table.shards[number].ids[np.repeat(stops - sizes, sizes) + inner]
