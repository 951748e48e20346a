"""The checkpoint folder: the newest by its number, one owner at a time, nothing removed that is not ours."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_longctx import checkpoint_folder as store
from mcore_longctx.errors import CheckpointError, InUseError, TrainingError
from mcore_longctx.manifest import write_manifest


def checkpoint(folder: Path, iteration: int, stage: str = "extend") -> Path:
    path = store.iteration_folder(folder, iteration)
    (path / "hf").mkdir(parents=True)
    (path / "weights.distcp").write_text(f"weights of {iteration}")
    (path / "hf" / "config.json").write_text("{}")
    write_manifest(path, "checkpoint", stage=stage, iteration=iteration)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_has_the_highest_number_and_partial_folders_do_not_count(tmp_path: Path) -> None:
    assert store.latest_checkpoint(tmp_path / "absent") is None
    for iteration in (2, 10_000_000, 9_999_999):
        checkpoint(tmp_path, iteration)
    for name in ("iter_0000099.partial-host-1", "iter_12", "iterations", "iter_99999999x"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_99999999").write_text("a file")
    newest = store.latest_checkpoint(tmp_path)
    assert newest == tmp_path / "iter_10000000"
    assert store.iteration_of(newest) == 10_000_000
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        store.iteration_of(tmp_path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (2, 4, 6, 8):
        checkpoint(tmp_path, iteration)
    store.remove_old(tmp_path, 2, "extend")
    assert names(tmp_path) == ["iter_0000006", "iter_0000008"]


def test_what_is_not_ours_is_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoint(tmp_path, 1) / "notes.txt").write_text("mine")
    checkpoint(tmp_path, 2, stage="instruct")
    (tmp_path / "iter_0000003").mkdir()
    outside = checkpoint(tmp_path / "elsewhere", 4)
    (tmp_path / "iter_0000004").symlink_to(outside)
    (checkpoint(tmp_path, 5) / "weights.distcp").write_text("of another size now")
    (checkpoint(tmp_path, 6) / "hf" / "link").symlink_to(outside)
    for iteration in (7, 8):
        checkpoint(tmp_path, iteration)
    before = names(tmp_path)
    with caplog.at_level("WARNING"):
        store.remove_old(tmp_path, 1, "extend")
    assert names(tmp_path) == [name for name in before if name != "iter_0000007"]
    assert (outside / "weights.distcp").exists()
    for words in (
        "iter_0000001 is not removed: it holds notes.txt, which is not in its manifest",
        "iter_0000002 is not removed: it belongs to stage 'instruct'",
        "iter_0000003 is not removed: no checkpoint here",
        "iter_0000004 is not removed: a link",
        "iter_0000006 is not removed: it holds link",
    ):
        assert words in caplog.text
    assert "iter_0000005 is not removed: 19 bytes" in caplog.text


def test_leftovers_of_killed_saves_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (
        "iter_0000004.partial-node07-4711",
        "iter_0000002",
        "iter_4.partial-x-1",
        "iter_0000004.partial",
        "other.partial-x-1",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "iter_0000005.partial-a-file").write_text("")
    (tmp_path / "latest_checkpointed_iteration.txt.partial-node07-4711").write_text("4")
    store.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(
        ["iter_0000002", "iter_4.partial-x-1", "iter_0000004.partial", "other.partial-x-1", "iter_0000005.partial-a-file"]
    )


HOLDER = """
import sys, time
from pathlib import Path
from mcore_longctx.checkpoint_folder import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_kill_gives_the_folder_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "extend"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match=rf"checkpoints/extend: process {holder.pid} on \S+ trains into this folder; wait"):
            store.FolderLock(folder).__enter__()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with store.FolderLock(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_not_somebody_who_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / ".lock").touch()

    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    for take in (store.FolderLock(tmp_path).__enter__, lambda: store.lock_owner(tmp_path)):
        with pytest.raises(CheckpointError, match=rf"cannot be locked \({os.strerror(number)}\); use a file system with locks"):
            take()
    number = errno.EIO  # the disk's doing: another start may help
    for take in (store.FolderLock(tmp_path).__enter__, lambda: store.lock_owner(tmp_path)):
        with pytest.raises(OSError, match="Input/output error"):
            take()


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store.check_free_space(tmp_path, 1 << 20)
    with pytest.raises(TrainingError, match=r"GB free, a checkpoint needs 1,288,490\.2 GB; free some space and start again$"):
        store.check_free_space(tmp_path, 1_000_000 << 30)
    checkpoint(tmp_path, 12)
    with pytest.raises(TrainingError, match=r"the newest checkpoint, iter_0000012, is untouched$"):
        store.check_free_space(tmp_path, 1_000_000 << 30)
