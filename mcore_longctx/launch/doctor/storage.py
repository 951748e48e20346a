"""The run folder's file system: what kind it is, and whether it holds all that the run will keep."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mcore_longctx.families import ModelShape
from mcore_longctx.launch.doctor.findings import Finding, note, ok, wrong
from mcore_longctx.manifest import readable_bytes
from mcore_longctx.plan.models import parameters
from mcore_longctx.recipe import Recipe, Stage

__all__ = ["checkpoint_bytes", "disk", "file_system", "nearest_folder"]

_MEMORY = ("tmpfs", "ramfs")
_OF_ONE_NODE = ("overlay", "aufs", *_MEMORY)


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def checkpoint_bytes(stage: Stage, shape: ModelShape) -> int:
    """Bytes of one checkpoint as the trainer counts them: weights, and fp32 copies of them and of both moments of Adam."""
    return parameters(shape) * ((4 if stage.precision == "fp32" else 2) + 12)


def disk(recipe: Recipe, shape: ModelShape, planned: Mapping[str, float], *, is_here: bool) -> Iterator[Finding]:
    """Free bytes and inodes against all that the run keeps: imported and exported weights, data, checkpoints by the keep rule.

    Args:
        recipe: the recipe.
        shape: sizes of its model.
        planned: bytes of a checkpoint by stage name, where the plan knows them.
        is_here: False: this is not where the run will be made (the model is not here either), so that too little is no fault.
    """
    folder = nearest_folder(recipe.run_folder)
    parts = dict(_parts(recipe, shape, planned))
    inodes = sum((stage.keep_checkpoints + 1) * (4 * stage.parallel.world_size + 64) for stage in recipe.stages) + 1000
    status = os.statvfs(folder)
    free, there = status.f_bavail * status.f_frsize, _bytes_below(recipe.run_folder)
    needed = max(0, round(sum(parts.values())) - there)
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    detail = ", ".join(f"{name} {readable_bytes(round(size))}" for name, size in largest)
    text = f"{readable_bytes(free)} free at {folder}, the run still takes about {readable_bytes(needed)} ({detail})"
    fix = "free some space, set output to another file system, or lower keep_checkpoints"
    if needed > free:
        yield wrong("disk", text, fix) if is_here else note("disk", text, fix)
    else:
        yield ok("disk", text)
    if status.f_files and status.f_favail < inodes:
        text = f"{status.f_favail:,} inodes free at {folder}, the run takes about {inodes:,}"
        yield wrong("disk", text, fix) if is_here else note("disk", text, fix)


def _parts(recipe: Recipe, shape: ModelShape, planned: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    weights = 2.0 * parameters(shape)
    yield "imported weights", weights
    yield "export", weights
    bytes_per_token = 2 if shape.vocab_size <= 65_500 else 4
    for stage in recipe.stages:
        tokens = stage.iterations * stage.global_batch_size * stage.seq_length
        yield f"data of {stage.name}", float(tokens * bytes_per_token)
        size = planned.get(stage.name, float(checkpoint_bytes(stage, shape)))
        # the next one is written before the oldest goes
        yield f"{stage.keep_checkpoints} + 1 checkpoints of {stage.name}", (stage.keep_checkpoints + 1) * size

        if stage.merge is not None:
            yield f"merged weights of {stage.name}", (2.0 if stage.precision == "fp32" else 1.0) * weights


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            except OSError:  # removed meanwhile
                continue
    return total


def file_system(folder: Path, nodes: int, *, root: Path = Path("/")) -> Finding:
    """What holds the run folder. Every node of a job must see it, and it must outlive the job."""
    kind, mounted = _mount_of(nearest_folder(folder), root / "proc/mounts")
    text = f"{kind} mounted at {mounted}"
    if nodes > 1 and kind in _OF_ONE_NODE:
        where = "in the memory of this node" if kind in _MEMORY else "in the container's own layer"
        fix = "set output to a folder of the shared file system"
        return wrong("run folder", f"{text}: {where}, the other {nodes - 1} nodes do not see it", fix)
    if kind in _MEMORY:
        return note("run folder", f"{text}: in memory, gone with this machine's next start")
    if kind in _OF_ONE_NODE:
        return note("run folder", f"{text}: in the container's own layer, gone with the container")
    if kind.startswith("nfs"):
        return note(
            "run folder", f"{text}: other nodes see new files up to a minute late, and many ranks writing at once are slow"
        )
    return ok("run folder", text)


def _mount_of(folder: Path, mounts: Path) -> tuple[str, Path]:
    """Kind and mount point of the file system that holds `folder`: the longest mount point above it, the latest of equals."""
    best, folder = ("unknown", Path("/")), folder.resolve()
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), point)
        if folder.is_relative_to(point) and len(Path(point).parts) >= len(best[1].parts):
            best = (kind, Path(point))
    return best
