"""The launcher of multi-process tests: results by rank, tracebacks, deadlines, nobody left behind."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.multiproc import ProcessFailed, run_processes

pytestmark = pytest.mark.multiproc


def rank_and_sum(offset: int) -> tuple[int, float, int]:
    tensor = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item(), os.getpid()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def sleep(_: str) -> None:
    time.sleep(60)


def environment_of_rank() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "EXTRA"))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_order_of_rank_and_no_process_is_left() -> None:
    results = run_processes(rank_and_sum, 2, 10)
    assert [(rank, total) for rank, total, _ in results] == [(0, 21.0), (1, 21.0)]
    assert not any(is_alive(pid) for _, _, pid in results)


def test_the_traceback_of_the_rank_that_raised_is_shown_while_others_wait() -> None:
    with pytest.raises(ProcessFailed, match=r"(?s)rank 1 of 2 raised.*rank one is unhappy"):
        run_processes(fail_on_rank_one, 2, timeout=30)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(ProcessFailed, match="rank 1 of 2 died without a result"):
        run_processes(die_on_rank_one, 2, timeout=30)


def test_the_deadline_ends_ranks_that_hang() -> None:
    start = time.monotonic()
    with pytest.raises(ProcessFailed, match=r"ranks \[0, 1\] of 2 gave no result in 3 s"):
        run_processes(sleep, 2, "x", timeout=3)
    assert time.monotonic() - start < 15


def test_without_init_ranks_find_what_torchrun_sets() -> None:
    results = run_processes(environment_of_rank, 2, init=False, environment={"EXTRA": "yes"})
    assert results == [("0", "0", "2", "127.0.0.1", "yes"), ("1", "1", "2", "127.0.0.1", "yes")]
