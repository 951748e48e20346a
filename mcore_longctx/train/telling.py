"""What a training says about itself in its log: before the first step, and after each."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core import parallel_state

from mcore_longctx.megatron_compat import MEGATRON_VERSION, training_device
from mcore_longctx.train.dataset import StepData
from mcore_longctx.train.job import TrainJob
from mcore_longctx.train.metrics import MetricsWriter, StepMetrics, iteration_line

__all__ = ["announce", "own_parameters", "report"]

logger = logging.getLogger(__name__)


def announce(job: TrainJob, data: StepData, start: Path, resumed_at: int | None, parameters: int) -> None:
    """What is trained, how, and from where. `resumed_at`: finished iterations of this stage, None at its beginning."""
    stage = job.stage
    logger.info(
        "stage %s (%s): %s iterations x %s sequences x %s tokens, %s, %s",
        *(stage.name, stage.kind, f"{stage.iterations:,}", stage.global_batch_size, f"{stage.seq_length:,}"),
        *(stage.precision, stage.parallel.describe()),
    )
    logger.info("%s", stage.activations.describe())
    for line in stage.methods():
        logger.info("%s", line)
    logger.info("%s parameters, rope: %s", f"{parameters:,}", job.rope.describe())
    logger.info("%s samples in %s, order of seed %s", f"{len(data.samples):,}", job.data_prefix, job.seed)
    logger.info("megatron-core %s, torch %s, %s", MEGATRON_VERSION, torch.__version__, training_device().type)
    logger.info("%s from %s", "starting" if resumed_at is None else f"going on after iteration {resumed_at}", start)


def own_parameters(wrapped: Any) -> int:
    """Parameters that this rank alone counts: replicas over data and context, and what tensor parallelism repeats, once."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True):
        return 0
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return sum(p.numel() for p in wrapped.parameters() if getattr(p, "tensor_model_parallel", False) or first)


def report(metrics: MetricsWriter, data: StepData, seconds: list[float], step: StepMetrics) -> None:
    """One line a step, in the metrics and in the log, and a word when a pass over the data ends. `seconds`: of this start's steps."""
    stage = data.stage
    metrics.write(step)
    # the first step of a start also pays for allocations and compilation
    typical = statistics.median(seconds[1:]) if len(seconds) > 1 else None
    left = None if typical is None else typical * (stage.iterations - step.step)
    logger.info(
        "%s",
        iteration_line(step, iterations=stage.iterations, global_batch_size=stage.global_batch_size, eta_seconds=left),
    )
    passes = data.passes_begun(step.step - 1)
    if step.step > 1 and passes > data.passes_begun(step.step - 2):
        logger.info(
            "iteration %s: all %s samples have been seen %s, pass %s goes on in a new order",
            *(step.step, f"{len(data.samples):,}", "once" if passes == 2 else f"{passes - 1} times", passes),
        )
