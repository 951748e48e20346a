"""A rank that no longer moves ends the job: within the bound, with one line, the stacks of who waits, and STATUS `hung`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.train.heartbeat import Heartbeat, Phase
from tests.train.jobs import Ranks, make_job, make_world, rows, train

MINUTE = 60.0


def quiet(tmp_path: Path, timeout: float = 60 * MINUTE, rank: int = 0, **options: Any) -> Heartbeat:
    return Heartbeat(tmp_path, rank, timeout_seconds=timeout, **{"hung": lambda line: None, "end": lambda code: None} | options)


def advance(pulse: Heartbeat, clock: list[float], *borders: tuple[Phase, float]) -> None:
    """Pass borders: each phase takes some seconds."""
    for phase, seconds in borders:
        pulse.passed(phase, "somewhere")
        clock[0] += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("mcore_longctx.train.heartbeat.time.monotonic", lambda: now[0])
    return now


def test_three_medians_of_a_micro_batch_are_the_limit_once_a_step_is_done(tmp_path: Path, clock: list[float]) -> None:
    pulse = quiet(tmp_path)
    most = (54 * MINUTE, "nine tenths of the timeout of the process groups")
    assert pulse.limit("loading") == most
    advance(pulse, clock, ("micro-batch", 1500.0), ("micro-batch", 480.0))
    assert pulse.limit("micro-batch") == most  # the first step compiles
    advance(pulse, clock, ("micro-batch", 500.0), ("update", 30.0), ("micro-batch", 0.0))
    assert pulse.limit("micro-batch") == (1500.0, "3 x the median of 500 s")
    assert pulse.limit("update") == (90.0, "3 x the median of 30 s")
    assert pulse.limit("saving") == most


def test_the_limit_is_never_less_than_a_sixtieth_of_the_timeout_nor_more_than_nine_tenths(
    tmp_path: Path, clock: list[float]
) -> None:
    pulse = quiet(tmp_path)
    advance(pulse, clock, ("micro-batch", 0.1), ("update", 2000.0), ("micro-batch", 0.0))
    assert pulse.limit("micro-batch") == (60.0, "the least; 3 x the median of 0.1 s is less")
    assert pulse.limit("update")[0] == 54 * MINUTE


def test_the_file_tells_where_a_rank_is_and_is_written_rarely(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat" / "rank7"
    with quiet(tmp_path, timeout=60.0, rank=7) as pulse:  # written every quarter of a second at most
        seen, end = set(), time.monotonic() + 1.1
        number = 0
        while time.monotonic() < end:
            number += 1
            pulse.passed("micro-batch", f"iteration 3, micro-batch {number}")
            text = path.read_text()
            assert len(text) in (0, 160)
            seen.add(text)
            time.sleep(0.005)
        assert 2 <= len(seen) <= 7
        last = max(seen, key=lambda text: text[:14]).split()
        assert abs(float(last[0]) - time.time()) < 2
        assert last[2:] == ["micro-batch", "iteration", "3,", "micro-batch", last[1]]


def test_a_rank_that_moves_is_left_alone_and_one_that_stands_is_ended(tmp_path: Path) -> None:
    said: list[str] = []
    ended: list[int] = []
    with quiet(tmp_path, timeout=12.0, hung=said.append, end=ended.append) as pulse:  # least 0.2 s
        for number in range(60):
            pulse.passed("update" if number % 2 else "micro-batch", f"iteration {number}")
            time.sleep(0.02)
        assert not said
        (tmp_path / "heartbeat" / "rank4").write_text("1.0 17 micro-batch iteration 9, micro-batch 2   \n")
        pulse.passed("micro-batch", "iteration 61, micro-batch 1")
        began = time.monotonic()
        while not ended and time.monotonic() < began + 10:
            time.sleep(0.01)
    assert ended == [1]
    (line,) = said
    assert line.startswith("rank 0: no micro-batch for 0.2")
    assert line.endswith(
        f"; rank 4 is behind, last seen: micro-batch iteration 9, micro-batch 2; stacks in {tmp_path / 'rank0.stacks'}"
    )
    stacks = (tmp_path / "rank0.stacks").read_text()
    assert stacks.startswith(line)
    assert "test_a_rank_that_moves_is_left_alone" in stacks


def test_the_watch_ends_with_the_training(tmp_path: Path) -> None:
    said: list[str] = []
    with quiet(tmp_path, timeout=0.6, hung=said.append):
        pass
    time.sleep(1.0)
    assert not said
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_rare_long_document_is_not_late_and_a_light_sample_still_is(tmp_path: Path, clock: list[float]) -> None:
    """Seconds = rows + pairs, as of a micro-batch with a mask between documents: 64 documents of 1, now and then one of 64."""
    light, heavy = 64.0, 64.0**2
    pulse = quiet(tmp_path, timeout=10 * 60 * MINUTE)
    for _ in range(20):
        pulse.passed("micro-batch", "somewhere", work=light)
        clock[0] += 100 + light
        advance(pulse, clock, ("update", 1.0))
    assert pulse.limit("micro-batch", light)[0] == pytest.approx(600.0)  # a sixtieth of the timeout
    assert 100 + heavy < pulse.limit("micro-batch", heavy)[0] < 3 * 64 * 164.001
    for _ in range(20):  # once heavy ones are known, what they tell is used for them and for the light ones
        pulse.passed("micro-batch", "somewhere", work=heavy)
        clock[0] += 100 + heavy
        advance(pulse, clock, ("update", 1.0))
        assert 100 + heavy < pulse.limit("micro-batch", heavy)[0]


def test_the_watchdog_ends_the_process_when_nothing_can_be_written(tmp_path: Path) -> None:
    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    ended: list[int] = []
    (tmp_path / "rank0.stacks").mkdir()  # cannot be opened
    with quiet(tmp_path, timeout=12.0, hung=full, end=ended.append) as pulse:
        for number in range(6):
            pulse.passed("update" if number % 2 else "micro-batch", f"iteration {number}")
        began = time.monotonic()
        while not ended and time.monotonic() < began + 10:
            time.sleep(0.01)
    assert ended == [1]


SUSPENDED = """
import sys, time
from pathlib import Path
from mcore_longctx.train.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), 0, timeout_seconds=60, hung=lambda line: print(line, flush=True)) as pulse:
    for number in range(6):
        pulse.passed("update" if number % 2 else "micro-batch", f"iteration {number}")
    pulse.passed("micro-batch", "suspended here")
    print("ready", flush=True)
    time.sleep(0.5)
    print("went on", flush=True)
    time.sleep(60)
"""


def test_a_job_that_was_suspended_as_a_whole_is_not_late_and_is_watched_again(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SUSPENDED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)  # the limit is a second, of faulthandler two
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "went on\n"
        assert process.wait(20) == 1
        said = re.search(r"no micro-batch for ([\d.]+) s", process.stdout.readline())
        assert said is not None
        assert 1 < float(said[1]) < 5, "the six seconds count"
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


# ---------------------------------------------------------------------- whole jobs

TIMEOUT = 3.0  # minutes: nothing is late before 3 s


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def stand_still(rank: int, who: int, how: str) -> None:
    """Rank `who` stops in the fourth step: asleep, stopped by a signal, or in a collective that the other does not join."""
    import os

    import torch

    from mcore_longctx.train.loop import Trainer

    step = Trainer._step

    def until_the_fourth(self: Trainer) -> None:
        if self.finished == 3 and rank == who:
            if how == "asleep":
                time.sleep(600)
            elif how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                torch.distributed.recv(torch.zeros(1), src=1 - rank)
        step(self)

    Trainer._step = until_the_fourth


@pytest.mark.multiproc
@pytest.mark.parametrize("how", ["asleep", "stopped", "collective"])
def test_a_rank_that_stands_still_ends_the_job(world: Path, how: str) -> None:
    job = make_job(world, f"still-{how}", context_parallel_size=2, save_interval=2, distributed_timeout_minutes=TIMEOUT)
    ranks = Ranks(job, before=stand_still, args=(1, how))
    ranks.wait_for("iteration 3/8")
    began = time.monotonic()
    waiting = ranks.processes[0]
    waiting.join(30)
    took = time.monotonic() - began
    if how == "stopped":
        assert ranks.processes[1].is_alive()  # what SLURM and torchrun end with KILL
        ranks.kill()
    else:
        assert ranks.wait() == [1, 1]
    assert waiting.exitcode == 1
    limit = 60 * TIMEOUT / 60
    assert limit <= took < limit + 5 + 8  # the limit, the pause for the stacks of others, the machine
    status = (job.log_folder / "STATUS").read_text()
    assert status.startswith("hung 1 rank ")
    assert "no micro-batch for 3" in status or "update for 3" in status
    if status.startswith("hung 1 rank 0:"):
        assert "; rank 1 is behind, last seen: " in status
        if how != "stopped":  # that one could not write any more
            assert "; rank 1 is behind, last seen: update iteration 3; stacks in " in status
    assert len(ranks.errors()) == 1
    stacks = (job.log_folder / "rank0.stacks").read_text()
    assert "_pass_border" in stacks
    assert "largest" in stacks
    if how != "stopped":
        assert "until_the_fourth" in (job.log_folder / "rank1.stacks").read_text()
    train(make_job(world, f"still-{how}", context_parallel_size=2))
    assert [row["step"] for row in rows(job)] == list(range(1, 9))
