"""The folder of a stage's checkpoints: which is the newest, what may be removed, who works on it. No torch.

checkpoints/<stage>/iter_0000012/                     one checkpoint; it has this name only when it is complete
checkpoints/<stage>/iter_0000024.partial-HOST-PID/    one that is being written, or was when its process died
checkpoints/<stage>/latest_checkpointed_iteration.txt Megatron's tracker, for others: nothing here reads it
checkpoints/<stage>/.lock
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mcore_longctx.errors import CheckpointError, InUseError, TrainingError
from mcore_longctx.manifest import MANIFEST, fsync_folder, fsync_tree, partial_path, readable_bytes, verify_manifest, write_atomic

__all__ = [
    "FolderLock",
    "begin_checkpoint",
    "check_free_space",
    "checkpoints_to_come",
    "iteration_folder",
    "iteration_of",
    "latest_checkpoint",
    "lock_owner",
    "publish",
    "remove_leftovers",
    "remove_old",
    "write_tracker",
]

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
_COMPLETE = re.compile(r"iter_(\d{7,})")
_PARTIAL = re.compile(r"iter_\d{7,}\.partial-.+")
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def iteration_folder(checkpoints: Path, iteration: int) -> Path:
    """`checkpoints/iter_0000012`, as Megatron-LM names it."""
    return checkpoints / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The number in the name of a checkpoint folder."""
    match = _COMPLETE.fullmatch(folder.name)
    if match is None:
        raise CheckpointError("not a checkpoint folder (iter_0000012)", where=folder)
    return int(match[1])


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the highest iteration, or None. A folder gets this name only when it is complete.

    The folder itself is not read: whoever loads it verifies it. There is no falling back to an older one, because a damaged
    newest checkpoint is something that a person must know about.
    """
    return max(_complete(checkpoints), key=iteration_of, default=None)


def _complete(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    return [path for path in checkpoints.iterdir() if _COMPLETE.fullmatch(path.name) and path.is_dir()]


class FolderLock:
    """Holds a checkpoint folder for one training. The kernel gives it back when the process ends, however it ends.

    A POSIX record lock: it works over NFS, and child processes do not inherit it.

    Raises:
        InUseError: another process holds it; the message names it.
        CheckpointError: the file system has no locks.
    """

    def __init__(self, checkpoints: Path) -> None:
        self._path = checkpoints / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+", encoding="utf-8")
        try:
            owner = _lock(file, self._path.parent)
            if owner:
                raise InUseError(
                    f"{owner} trains into this folder", where=self._path.parent, fix="wait for it, stop it, or use another output"
                )
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
        file.flush()
        self._file = file
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None


def lock_owner(checkpoints: Path) -> str:
    """Who holds the folder, in the words of `FolderLock`; empty: nobody.

    Raises:
        CheckpointError: the file system has no locks.
    """
    try:
        with (checkpoints / ".lock").open("r+", encoding="utf-8") as file:
            return _lock(file, checkpoints)
    except FileNotFoundError:
        return ""


def _lock(file: IO[str], folder: Path) -> str:
    """Take the lock and return "", or return who has it. An error of the disk (EIO, ESTALE) is raised as it is."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise CheckpointError(
                f"cannot be locked ({error.strerror})", where=folder, fix="use a file system with locks (Lustre: mount -o flock)"
            ) from None
        if error.errno not in _LOCKED:
            raise
        file.seek(0)
        return file.read().strip() or "an unknown process"
    return ""


def begin_checkpoint(final: Path) -> Path:
    """A new folder beside `final` to write the checkpoint into. Only for the holder of the lock.

    Raises:
        CheckpointError: there is a checkpoint of this iteration.
    """
    if final.exists():
        raise CheckpointError("is already there", where=final, fix="move it away")
    remove_leftovers(final.parent)
    partial = partial_path(final)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Give a checkpoint that has its manifest its name, once every byte of it is on the disk."""
    verify_manifest(partial, "checkpoint", hashes=False)
    fsync_tree(partial)
    if final.exists():
        raise CheckpointError("appeared while it was being written", where=final)
    partial.rename(final)
    fsync_folder(final.parent)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed saves left behind. Only for the holder of the lock: then nobody is writing them."""
    for path in checkpoints.glob("iter_*.partial-*"):
        if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            logger.info("removing %s: a save that was not finished", path.name)
            shutil.rmtree(path)
    for path in checkpoints.glob(f"{TRACKER}.partial-*"):
        path.unlink()


def remove_old(checkpoints: Path, keep: int, stage: str) -> None:
    """Remove all but the newest `keep` checkpoints of this stage. What is not ours stays, with a warning."""
    for folder in sorted(_complete(checkpoints), key=iteration_of)[:-keep]:
        reason = _not_ours(folder, stage)
        if reason:
            logger.warning("%s is not removed: %s", folder.name, reason)
            continue
        # renamed first: a removal that is cut short leaves something that nobody takes for a checkpoint
        doomed = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _not_ours(folder: Path, stage: str) -> str:
    if folder.is_symlink():
        return "a link"
    try:
        manifest = verify_manifest(folder, "checkpoint", hashes=False)
    except CheckpointError as error:
        return error.what
    if manifest.get("stage") != stage:
        return f"it belongs to stage {manifest.get('stage')!r}"
    known = set(manifest["files"]) | {MANIFEST}
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    foreign = [path for path in files if path.relative_to(folder).as_posix() not in known]
    return f"it holds {foreign[0].name}, which is not in its manifest" if foreign else ""


def write_tracker(checkpoints: Path, iteration: int) -> None:
    """Megatron's `latest_checkpointed_iteration.txt`, for Megatron-LM and Bridge."""
    write_atomic(checkpoints / TRACKER, f"{iteration}")


def check_free_space(checkpoints: Path, needed_bytes: int, files: int = 64, *, count: int = 1) -> None:
    """Raise TrainingError unless the file system has room for `count` more checkpoints.

    Args:
        checkpoints: the folder, existing.
        needed_bytes: estimated size of one checkpoint; a fifth is added.
        files: inodes that one checkpoint takes.
        count: how many will be there at once that are not there now.
    """
    status = os.statvfs(checkpoints)
    free = status.f_bavail * status.f_frsize
    needed, inodes = count * needed_bytes * 6 // 5, count * files
    what = "a checkpoint needs" if count == 1 else f"{count} checkpoints (those that are kept and one being written) need"
    newest = latest_checkpoint(checkpoints)
    fix = "free some space and start again" + (" or lower keep_checkpoints" if count > 1 else "")
    fix += f"; the newest checkpoint, {newest.name}, is untouched" if newest else ""
    if free < needed:
        raise TrainingError(f"{readable_bytes(free)} free, {what} {readable_bytes(needed)}", where=checkpoints, fix=fix)
    if status.f_files and status.f_favail < inodes:
        raise TrainingError(f"{status.f_favail:,} inodes free, {what} {inodes:,}", where=checkpoints, fix=fix)


def checkpoints_to_come(checkpoints: Path, keep: int, saves: int) -> int:
    """How many more checkpoints will lie here at once: until `keep` are complete, and one beside them that is being written.

    Args:
        checkpoints: the folder, existing.
        keep: complete ones that are kept.
        saves: that will be made.
    """
    return max(1, min(saves, keep + 1 - len(_complete(checkpoints))))
