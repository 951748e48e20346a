"""Killed anywhere, filled disks, signals: what is left never looks finished, and the same command goes on to the same bytes."""

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.convert.copying import execute as module
from mcore_longctx.convert.copying import kernels, units
from mcore_longctx.errors import StorageError
from tests.convert.made_plans import Made, forked, hashes, make_plan, run, wait, wait_for

CALLS = ["copy_file_range", "pwrite", "ftruncate", "open", "mkdir", "rename", "unlink", "fsync", "fdatasync", "lseek"]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    monkeypatch.setattr(module, "SYNC_BYTES", 2000)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_plan(tmp_path / "sources", 12, tensors=8, size=60)


@pytest.fixture
def expected(made: Made, tmp_path: Path) -> dict[str, str]:
    run(made.plan, tmp_path / "whole", checksum=True)
    return hashes(tmp_path / "whole")


def count_calls(before: Callable[[str, int], None]) -> None:
    """Let `before(name, number)` see every call that changes something on the disk."""
    seen = [0]

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before(name, seen[0])
            seen[0] += 1
            if name == "pwrite" and len(args[1]) > 1:  # a kill between its halves leaves a torn line, a torn header
                half = len(args[1]) // 2
                real(args[0], args[1][:half], args[2])
                before(name, seen[0])
                seen[0] += 1
                return half + real(args[0], args[1][half:], args[2] + half)
            if name in ("fsync", "fdatasync"):  # a kill cannot tell whether they did anything
                return None
            return real(*args, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("out"))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------ kill -9
@pytest.mark.parametrize("fsync", [True, False])
def test_killed_before_every_single_change_on_the_disk(made: Made, expected: dict[str, str], tmp_path: Path, fsync: bool) -> None:
    out = tmp_path / "out"

    def killed_at(number: int) -> None:
        def before(_name: str, seen: int) -> None:
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        count_calls(before)
        run(made.plan, out, checksum=True, fsync=fsync)

    for number in range(10_000):
        code = wait(forked(lambda number=number: killed_at(number)))
        if code == 0:  # fewer calls than that
            break
        assert code == -signal.SIGKILL
        if out.exists():  # the kill came after the last rename
            assert hashes(out) == expected
            assert leftovers(tmp_path) in (["out"], ["out", "out.partial-journal"])
            (tmp_path / "moved").mkdir(exist_ok=True)
            out.rename(tmp_path / "moved" / str(number))
        assert run(made.plan, out, checksum=True, fsync=False)
        assert hashes(out) == expected
        assert leftovers(tmp_path) == ["out"]
        out.rename(tmp_path / f"done-{number}")
    assert number > 60


def test_killed_at_fifty_random_moments_with_three_workers(
    made: Made, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, dice, real, kills, ended = tmp_path / "out", random.Random(1), kernels.Copier.copy, 0, 0

    def slow(self: kernels.Copier, unit: units.Unit) -> object:
        time.sleep(0.004)
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", slow)
    while kills < 50:
        pid = forked(lambda: run(made.plan, out, workers=3, checksum=True))
        time.sleep(dice.random() * 0.04)
        workers = children(pid)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            ended += 1
        else:
            kills += 1
        wait_for(lambda workers=workers: not any(map(is_alive, workers)))
        if out.exists():
            assert hashes(out) == expected
            out.rename(tmp_path / f"done-{kills}-{ended}")
    run(made.plan, out, checksum=True)
    assert hashes(out) == expected


def test_units_in_the_journal_are_not_copied_again(made: Made, expected: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    real = kernels.Copier.copy

    def killed() -> None:
        count_calls(lambda name, seen: os.kill(os.getpid(), signal.SIGKILL) if seen == 120 else None)
        run(made.plan, tmp_path / "out", checksum=True)

    assert wait(forked(killed)) == -signal.SIGKILL
    listed = (tmp_path / "out.partial" / "journal-0.jsonl").read_text().count('"unit"')
    copied: list[units.Unit] = []
    monkeypatch.setattr(kernels.Copier, "copy", lambda self, unit: (copied.append(unit), real(self, unit))[1])
    run(made.plan, tmp_path / "out", checksum=True)
    assert hashes(tmp_path / "out") == expected
    assert listed > 0
    assert len(copied) == len(units.cut(made.plan)) - listed


def test_a_killed_worker_ends_the_run_in_one_line(made: Made, expected: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    real = kernels.Copier.copy

    def deadly(self: kernels.Copier, unit: units.Unit) -> object:
        if unit == units.cut(made.plan)[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", deadly)
    before = set(children(os.getpid()))
    with pytest.raises(StorageError, match=r"a worker was killed by signal 9 .*; run it again to go on") as caught:
        run(made.plan, tmp_path / "out", workers=3, checksum=True)
    assert caught.value.exit_code == 1
    assert set(children(os.getpid())) <= before
    monkeypatch.undo()
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    run(made.plan, tmp_path / "out", workers=2, checksum=True)
    assert hashes(tmp_path / "out") == expected


def interruptible() -> bool:
    """Ctrl-C works, also where the tests were started in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return True


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 99)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_it_and_the_next_start_goes_on(
    made: Made, expected: dict[str, str], tmp_path: Path, monkeypatch, number: int, code: int, workers: int
) -> None:
    real = kernels.Copier.copy

    def slow(self: kernels.Copier, unit: units.Unit) -> object:
        time.sleep(0.02)
        return real(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Copier, "copy", slow)
        pid = forked(lambda: interruptible() and run(made.plan, tmp_path / "out", workers=workers, checksum=True))
        journal = tmp_path / "out.partial" / "journal-0.jsonl"
        wait_for(lambda: journal.exists() and '"unit"' in journal.read_text())
        inside = children(pid)
        assert len(inside) == (workers if workers > 1 else 0)
        for process in (*inside, pid):  # as a terminal or SLURM does
            os.kill(process, number)
        assert wait(pid) == code
    assert not any(map(is_alive, inside))
    assert journal.exists()
    run(made.plan, tmp_path / "out", checksum=True)
    assert hashes(tmp_path / "out") == expected


def test_workers_end_in_the_middle_of_a_unit_when_their_parent_is_killed(made: Made, tmp_path: Path, monkeypatch) -> None:
    def endless(self: kernels.Copier, unit: units.Unit) -> object:
        while True:
            self.pause()  # as between two pieces of a large range
            time.sleep(0.01)

    monkeypatch.setattr(kernels.Copier, "copy", endless)
    pid = forked(lambda: run(made.plan, tmp_path / "out", workers=2))
    wait_for(lambda: len(children(pid)) == 2)
    workers = children(pid)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    try:
        wait_for(lambda: not any(map(is_alive, workers)))
    finally:
        for worker in filter(is_alive, workers):
            os.kill(worker, signal.SIGKILL)


# ------------------------------------------------------------------ full disks
@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_may_not_grow_are_one_line_at_any_size(made: Made, expected, tmp_path: Path, workers: int, capfd) -> None:
    largest = max(file.bytes for file in made.plan.files)

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run(made.plan, tmp_path / "out", workers=workers, checksum=True)

    for size in (0, 10, 200, 1000, largest // 2, largest - 1):
        assert wait(forked(lambda size=size: limited(size))) == 1
        assert not (tmp_path / "out").exists()
    assert capfd.readouterr().err == ""
    run(made.plan, tmp_path / "out", checksum=True)
    assert hashes(tmp_path / "out") == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_up_is_one_line_and_room_lets_it_go_on(made: Made, expected, tmp_path: Path, monkeypatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr("mcore_longctx.convert.copying.partial.check_free_space", lambda *_: None)  # room can go at any moment
    for size in (4, 8, 12, 16, 20):
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=False).returncode:
            pytest.skip("no mount here")
        try:
            with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\); make room and run") as caught:
                run(made.plan, disk / "out", checksum=True)
            assert caught.value.exit_code == 1
            assert not (disk / "out").exists()
            subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
            run(made.plan, disk / "out", checksum=True)
            assert hashes(disk / "out") == expected
        finally:
            subprocess.run(["umount", disk], check=True)


def test_a_device_that_fails_while_it_is_made_last(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(StorageError, match=r"weights-\d.bin: cannot be written \(Input/output error\); run it again to go on"):
        run(made.plan, tmp_path / "out")
    assert run(made.plan, tmp_path / "out", fsync=False)  # which promises nothing


# ------------------------------------------------------------------ made last
def test_everything_is_made_last_before_it_gets_its_name(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def note(fd: int, real: Callable[[int], None] = real) -> None:
            events.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
            real(fd)

        monkeypatch.setattr(os, name, note)
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(f"rename {b}"), rename(a, b))[1])
    run(made.plan, tmp_path / "out")
    at = events.index(f"rename {tmp_path / 'out'}")
    partial = tmp_path / "out.partial"
    last = events.index(f"rename {tmp_path / 'out.partial-journal'}")
    for name in (*made.expected, "config.json", ""):
        assert str(partial / name) in events[last:at]
    assert events[at + 1] == str(tmp_path)
    events.clear()
    run(made.plan, tmp_path / "out2", fsync=False)
    assert not [event for event in events if not event.startswith("rename")]
