"""Ranks from torchrun, from srun, or alone."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.model.process_groups import RankInfo, _own_device, first_host, rank_info
from mcore_longctx.recipe.schema import Parallel
from tests.multiproc import free_port, run_processes

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host7", "MASTER_PORT": "29501"}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
}


def test_ranks_are_read_from_torchrun_then_srun_else_there_is_one() -> None:
    assert rank_info(TORCHRUN | SRUN) == RankInfo(5, 8, 1, "host7", 29501)
    assert rank_info(SRUN) == RankInfo(9, 16, 1, "gpu07", 10_000 + 123456 % 20_000)
    assert rank_info(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == RankInfo(9, 16, 1, "a", 1)
    assert rank_info({}) == RankInfo(0, 1, 0)


def test_a_batch_script_without_srun_and_a_step_of_one_task_are_one_process() -> None:
    assert rank_info({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}) == RankInfo(0, 1, 0)
    assert rank_info(SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == RankInfo(0, 1, 0)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[3-4]", "n3"), ("gpu-a[007,009],x", "gpu-a007"), ("r1-n3,r2-n1", "r1-n3")],
)
def test_the_first_host_of_a_node_list_is_the_master(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"environment: {name} is not set; start with torchrun or srun"):
        rank_info({key: value for key, value in TORCHRUN.items() if key != name})


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigError, match="environment: RANK is 'x', expected a number"):
        rank_info(TORCHRUN | {"RANK": "x"})


def test_each_rank_has_a_cuda_device_of_its_own() -> None:
    assert [_own_device(rank, 4).index for rank in range(4)] == [0, 1, 2, 3]
    assert _own_device(3, 1).index == 0  # the launcher shows each rank only its own
    with pytest.raises(LayoutError, match="rank 4 of this machine has no CUDA device: there are 4; start fewer ranks here"):
        _own_device(4, 4)


def test_a_layout_of_another_size_is_refused_with_the_whole_product() -> None:
    with pytest.raises(LayoutError) as caught:
        init_process_groups(Parallel(tensor_model_parallel_size=2, context_parallel_size=4), seed=0)
    assert str(caught.value) == (
        "the layout needs TP 2 x PP 1 x CP 4 p2p x DP 1 = 8 ranks, but 1 was started; "
        "start 8 (torchrun --nproc-per-node, srun --ntasks) or change the layout"
    )
    assert not dist.is_initialized()


def test_one_process_needs_no_launcher_and_no_port_and_can_start_again() -> None:
    for _ in range(2):
        init_process_groups(Parallel(), seed=0)
        assert dist.get_world_size() == 1
        assert parallel_state.get_context_parallel_world_size() == 1
        destroy_process_groups()
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
    destroy_process_groups()


def join_and_sum(as_srun: bool) -> tuple[int, float, int]:
    if as_srun:
        os.environ.update(SLURM_PROCID=os.environ["RANK"], SLURM_LOCALID=os.environ["RANK"], SLURM_NTASKS="2", SLURM_STEP_ID="0")
        os.environ.update(SLURM_JOB_ID="77", SLURM_STEP_NODELIST="localhost")
        del os.environ["RANK"]
    init_process_groups(Parallel(context_parallel_size=2), seed=0)
    tensor = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(tensor, group=parallel_state.get_context_parallel_group())
    return dist.get_rank(), tensor.item(), parallel_state.get_context_parallel_rank()


@pytest.mark.multiproc
@pytest.mark.parametrize("as_srun", [False, True])
def test_two_ranks_meet_as_torchrun_and_as_srun_started_them(as_srun: bool) -> None:
    environment = {"MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}
    assert run_processes(join_and_sum, 2, as_srun, init=False, environment=environment) == [(0, 1.0, 0), (1, 1.0, 1)]


def hierarchical_ranks() -> list[list[int]]:
    layout = Parallel(context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=(2, 2))
    init_process_groups(layout, seed=0)
    return [dist.get_process_group_ranks(group) for group in parallel_state.get_hierarchical_context_parallel_groups()]


@pytest.mark.multiproc
def test_the_first_hierarchical_size_is_of_neighbours() -> None:
    assert run_processes(hierarchical_ranks, 4) == [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]


def test_hierarchical_groups_without_einops_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "einops" else find_spec(name, *rest))
    monkeypatch.setenv("WORLD_SIZE", "4")
    layout = Parallel(context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=(2, 2))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        init_process_groups(layout, seed=0)
    assert str(caught.value) == "megatron-core builds hierarchical context-parallel groups with einops; pip install einops"
    assert not dist.is_initialized()
