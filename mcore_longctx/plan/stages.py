"""The plan of a recipe: each stage as it stands in the recipe, priced."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.families import ModelShape
from mcore_longctx.plan.intervals import Intervals
from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.recipe import ClusterSection, Stage

__all__ = ["StagePlan", "plan_stage"]


@dataclass(frozen=True)
class StagePlan:
    """One stage with its layout as written."""

    name: str
    setup: Setup
    memory: Memory
    time: StepTime
    intervals: Intervals
    hours: float  # of all iterations
    fits: bool
    problem: str  # why not: the largest term, its bytes, what the board has


def plan_stage(stage: Stage, shape: ModelShape, cluster: ClusterSection) -> StagePlan | None:
    """Price one stage of a recipe. None for a cluster without GPUs (`cluster.gpu: none`): there is no formula for CPUs.

    Raises:
        ConfigError: an unknown GPU, a bad hardware file.
    """
    raise NotImplementedError
