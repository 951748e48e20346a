"""What Megatron-LM's program cannot do by itself on this machine, put right from outside while it runs.

Four functions are replaced by name, because no configuration reaches them, and given back afterwards.

1. `compile_helpers` runs `make` beside the dataset code and ends the process when that fails. The wheel ships the compiled helper and
   no Makefile, so everybody who has only the wheel is stopped, on GPUs too. Where the helper can be imported, nothing is compiled.
2. `get_megatron_optimizer`: the state of torch's Adam, which megatron-core falls back to, does not survive a checkpoint
   (`mcore_longctx.megatron_lm.optimizer`).
3. `initialize_megatron` (without CUDA) asks for CUDA unless told otherwise, and nobody can tell it.
4. `set_jit_fusion_options` (without CUDA) warms up fused functions that are off, and draws from the random state that the weights
   come from: how much it draws depends on the layout.
"""

from __future__ import annotations

import functools
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import quiet_import, seed_rng
from mcore_longctx.megatron_lm.optimizer import resumable

__all__ = ["hosted", "join_without_cuda"]


@contextmanager
def hosted() -> Iterator[None]:
    """Run Megatron-LM's `pretrain` inside."""
    with quiet_import():
        from megatron.core.datasets import utils as datasets
        from megatron.training import training

    replaced: list[tuple[Any, str, Any]] = [
        (training, "get_megatron_optimizer", functools.partial(_build_resumable, training.get_megatron_optimizer))
    ]
    has_makefile = (Path(datasets.__file__).parent / "Makefile").exists()
    if not has_makefile and importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        replaced.append((datasets, "compile_helpers", lambda: None))
    if not torch.cuda.is_available():
        without_cuda = functools.partial(training.initialize_megatron, allow_no_cuda=True)
        replaced.append((training, "initialize_megatron", without_cuda))
        replaced.append((training, "set_jit_fusion_options", lambda **options: None))
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, replacement in replaced:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


def _build_resumable(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return resumable(build(*args, **kwargs))


def join_without_cuda(args: Namespace, embedding_ranks: Callable[..., Any] | None) -> None:
    """Meet the other ranks and build Megatron's groups. Its own program leaves both out where no device is counted.

    Does nothing where CUDA is available.

    Raises:
        ConfigError: `--async-save`. Its writer divides by the number of devices and dies, and the ranks wait for it for ever.
    """
    if torch.cuda.is_available():
        return
    if args.async_save:
        raise ConfigError(
            "--async-save: megatron-core writes in a process of its own that needs CUDA",
            where="command line",
            fix="leave it out",
        )
    with quiet_import():
        from megatron.core import mpu

    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    if args.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # one process needs no port
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        get_embedding_ranks=embedding_ranks,
        create_gloo_process_groups=args.use_gloo_process_groups,
    )
    seed_rng(args.seed)
