"""The timeout of a stage is that of the process groups: of all of them, not only of the world."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import pytest

from mcore_longctx.recipe import Parallel
from tests.multiproc import run_processes
from tests.train.jobs import Ranks, make_job, make_world

pytestmark = pytest.mark.multiproc


def timeout_of(group: Any) -> timedelta:
    import torch

    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def timeouts(minutes: float) -> dict[str, timedelta]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from mcore_longctx.model import init_process_groups

    init_process_groups(Parallel(context_parallel_size=2), seed=0, timeout_minutes=minutes)
    return {
        "world": timeout_of(dist.group.WORLD),
        "context": timeout_of(parallel_state.get_context_parallel_group()),
        "tensor": timeout_of(parallel_state.get_tensor_model_parallel_group()),
        "data and context": timeout_of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        "gloo": timeout_of(parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)),
        "model": timeout_of(parallel_state.get_model_parallel_group()),
    }


def test_every_group_waits_as_long_as_is_asked() -> None:
    for found in run_processes(timeouts, 2, 7.5, init=False):
        assert set(found.values()) == {timedelta(minutes=7.5)}, found


def say_timeout(rank: int) -> None:
    from megatron.core import parallel_state

    from mcore_longctx.train import loop

    build = loop.build_gpt_model

    def build_and_say(*args: Any, **kwargs: Any) -> Any:
        sys.stdout.write(f"waits {timeout_of(parallel_state.get_context_parallel_group()).total_seconds():g} s\n")
        return build(*args, **kwargs)

    loop.build_gpt_model = build_and_say


def test_a_stage_gives_its_own_or_an_hour(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = make_world(tmp_path_factory.mktemp("world"))
    for minutes, words in ((None, "waits 3600 s"), (90.5, "waits 5430 s")):
        job = make_job(world, f"waits-{minutes}", train_iters=3, distributed_timeout_minutes=minutes)
        ranks = Ranks(job, before=say_timeout)
        assert ranks.wait() == [0]
        assert words in ranks.output(0)
