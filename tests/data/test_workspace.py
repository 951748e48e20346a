"""Tasks in forked workers: every result once, errors as they are, nobody left behind; one writer a folder."""

import fcntl
import os
import signal
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from mcore_longctx.data.workspace import lock_folder, remove_leftovers, run_tasks
from mcore_longctx.errors import DataError, DifferenceFound, InUseError
from mcore_longctx.manifest import partial_path

FORK = get_context("fork")
DEADLINE = 20.0  # seconds


def wait_until(condition) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "deadline"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_task_is_done_once(workers: int, tmp_path: Path) -> None:
    offset = 7  # known to the workers through the fork, not through a pickle

    def do(task: int) -> int:
        with (tmp_path / str(task)).open("x"):
            return task * task + offset

    assert sorted(run_tasks(do, range(40), workers)) == [task * task + 7 for task in range(40)]
    assert list(run_tasks(do, [], workers)) == []


def test_an_error_of_a_worker_arrives_as_it_is_and_stops_the_rest(tmp_path: Path) -> None:
    def do(task: int) -> int:
        (tmp_path / str(task)).touch()
        if task == 3:
            raise DifferenceFound("seven is not eight", where="sums.txt:3", fix="count again")
        time.sleep(0.02)  # the error has time to arrive, also on a busy machine
        return task

    with pytest.raises(DifferenceFound) as caught:
        list(run_tasks(do, range(1000), 2))
    assert str(caught.value) == "sums.txt:3: seven is not eight; count again"
    assert len(list(tmp_path.iterdir())) < 100


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    def do(task: int) -> int:
        if task == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    with pytest.raises(DataError, match=r"a worker was killed .*fewer workers"):
        list(run_tasks(do, range(100), 2))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    def do(task: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    parent = FORK.Process(target=lambda: list(run_tasks(do, range(8), 3)))
    parent.start()
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
        workers = [int(path.name) for path in tmp_path.iterdir()]
        assert all(map(is_alive, workers))
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)))
    finally:
        parent.kill()
        parent.join()


def test_a_writer_that_has_not_said_its_name_yet_is_not_named(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a") as file:  # another open file: its lock is another's
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InUseError) as raised, lock_folder(tmp_path):
            pass
    assert raised.value.what == "another run works on this folder"


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    def hold() -> None:
        with lock_folder(tmp_path):
            (tmp_path / "held").touch()
            time.sleep(60)

    holder = FORK.Process(target=hold)
    holder.start()
    try:
        wait_until((tmp_path / "held").exists)
        with (
            pytest.raises(InUseError, match=rf"another run works on this folder \(process {holder.pid} on "),
            lock_folder(tmp_path),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        with lock_folder(tmp_path):  # the kernel gave it back
            pass
    finally:
        holder.kill()


def test_a_worker_that_lingers_does_not_keep_the_folder(tmp_path: Path) -> None:
    """Workers that are stopped cannot notice the end of their parent; the same command can start again all the same."""

    def do(task: int) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    def hold() -> None:
        with lock_folder(tmp_path):
            list(run_tasks(do, range(8), 2))

    parent = FORK.Process(target=hold)
    parent.start()
    workers: list[int] = []
    try:
        wait_until(lambda: len([path for path in tmp_path.iterdir() if path.name != ".lock"]) == 2)
        workers = [int(path.name) for path in tmp_path.iterdir() if path.name != ".lock"]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        os.kill(parent.pid, signal.SIGKILL)
        parent.join()
        assert all(map(is_alive, workers))
        with lock_folder(tmp_path):
            pass
    finally:
        parent.kill()
        for pid in workers:
            os.kill(pid, signal.SIGKILL)


def test_only_leftovers_of_the_dead_of_this_host_are_removed(tmp_path: Path) -> None:
    dead = FORK.Process(target=lambda: None)
    dead.start()
    dead.join()
    zombie = os.fork()
    if not zombie:
        os._exit(0)
    wait_until(lambda: not is_alive(zombie))  # it has ended, and this process has not asked how
    host = socket.gethostname()
    names = {
        f"b.tokens.partial-{host}-{zombie}": False,
        f"a.tokens.partial-{host}-{dead.pid}": False,
        f"a.tokens.partial-{host}-{os.getpid()}": True,
        f"a.tokens.partial-{host}-99999999999999": False,
        f"a.tokens.partial-elsewhere-{dead.pid}": True,
        f"a.tokens.partial-{host}-x": True,
        "a.tokens": True,
    }
    for name in names:
        (tmp_path / name).touch()
    assert partial_path(tmp_path / "a.tokens").name in names
    remove_leftovers(tmp_path)
    os.waitpid(zombie, 0)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}
