"""Process groups of one job: from torchrun, from srun, or a single process without any port."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.megatron_compat import seed_rng

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcore_longctx.recipe.schema import Parallel

__all__ = ["RankInfo", "destroy_process_groups", "init_process_groups", "rank_info"]


@dataclass(frozen=True)
class RankInfo:
    """Who this process is, and where the ranks meet (None: it is alone)."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str | None = None
    master_port: int | None = None


def rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """Read rank and meeting point from what torchrun sets, else from what srun sets, else: one process.

        torchrun    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
        srun        SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID; the first host of SLURM_STEP_NODELIST unless MASTER_ADDR is set;
                    a port made of SLURM_JOB_ID unless MASTER_PORT is set

    Raises:
        ConfigError: some of the variables are there and others are missing, or are no numbers.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        return RankInfo(
            _number(env, "RANK"),
            _number(env, "WORLD_SIZE"),
            _number(env, "LOCAL_RANK"),
            _text(env, "MASTER_ADDR"),
            _number(env, "MASTER_PORT"),
        )
    # a batch script has SLURM_PROCID too, but no step: it is one process
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _number(env, "SLURM_NTASKS") > 1:
        nodes = env.get("SLURM_STEP_NODELIST") or _text(env, "SLURM_JOB_NODELIST")
        # below the range that Linux gives to outgoing connections; jobs that share a host get different ports
        port = 10_000 + _number(env, "SLURM_JOB_ID") % 20_000
        return RankInfo(
            _number(env, "SLURM_PROCID"),
            _number(env, "SLURM_NTASKS"),
            _number(env, "SLURM_LOCALID"),
            env.get("MASTER_ADDR") or first_host(nodes),
            _number(env, "MASTER_PORT") if "MASTER_PORT" in env else port,
        )
    return RankInfo(0, 1, 0)


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list.

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    >>> first_host("rack1-n3,rack2-n1")
    'rack1-n3'
    """
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodelist)
    if found is None:
        raise ConfigError(f"cannot read the node list {nodelist!r}", where="SLURM_STEP_NODELIST", fix="set MASTER_ADDR")
    return found[1] + (found[2] or "")


def init_process_groups(parallel: Parallel, *, seed: int, timeout_minutes: float = 30.0) -> None:
    """Join the job's ranks, build Megatron's groups for the layout and seed all random states.

    NCCL with CUDA (one device a rank, by LOCAL_RANK), else gloo. A torch.distributed world that is already there is used as it is,
    so that one process can build one layout after the other.

    Args:
        parallel: the layout; its world size must be the number of ranks.
        seed: of Python, numpy, torch and Megatron's tracker.
        timeout_minutes: how long a rank waits for another before the job fails.

    Raises:
        LayoutError: the number of ranks is not that of the layout.
        ConfigError: the launcher's environment variables are incomplete; hierarchical sizes without einops.
    """
    ranks = rank_info()
    world_size = dist.get_world_size() if dist.is_initialized() else ranks.world_size
    if world_size != parallel.world_size:
        raise LayoutError(
            f"the layout needs {parallel.describe()}, but {world_size:,} {'was' if world_size == 1 else 'were'} started",
            fix=f"start {parallel.world_size:,} (torchrun --nproc-per-node, srun --ntasks) or change the layout",
        )
    sizes = parallel.hierarchical_context_parallel_sizes
    if sizes is not None and importlib.util.find_spec("einops") is None:
        raise ConfigError("megatron-core builds hierarchical context-parallel groups with einops", fix="pip install einops")
    if not dist.is_initialized():
        _join(ranks, timedelta(minutes=timeout_minutes))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        hierarchical_context_parallel_sizes=None if sizes is None else list(sizes),
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=True,
    )
    seed_rng(seed)


def destroy_process_groups() -> None:
    """Leave all groups. Safe to call when there are none."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(ranks: RankInfo, timeout: timedelta) -> None:
    backend, device_id = "gloo", None
    if torch.cuda.is_available():
        backend, device_id = "nccl", _own_device(ranks.local_rank, torch.cuda.device_count())
        torch.cuda.set_device(device_id)
    if ranks.master_addr is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id)
        return
    # torchrun's agent already serves the store at its address, and only env:// knows that
    meeting = "env://" if "RANK" in os.environ else f"tcp://{ranks.master_addr}:{ranks.master_port}"
    dist.init_process_group(
        backend, init_method=meeting, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout, device_id=device_id
    )


def _own_device(local_rank: int, devices: int) -> torch.device:
    """The CUDA device of this rank. A launcher that shows each rank one device of its own (srun --gpus-per-task) is fine."""
    if devices > 1 and local_rank >= devices:
        raise LayoutError(
            f"rank {local_rank} of this machine has no CUDA device: there are {devices}", fix="start fewer ranks here"
        )
    return torch.device("cuda", 0 if devices == 1 else local_rank)


def _text(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise ConfigError(f"{name} is not set", where="environment", fix="start with torchrun or srun, which set it")
    return env[name]


def _number(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    if not text.isdigit():
        raise ConfigError(f"{name} is {text!r}, expected a number", where="environment")
    return int(text)
