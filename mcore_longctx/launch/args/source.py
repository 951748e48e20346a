"""One stage of a recipe as other programs need to know it: sizes, rope, files, ranks, and how long a rank may wait."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.families import ModelShape
from mcore_longctx.plan.stages import plan_stage
from mcore_longctx.recipe import ClusterSection, Recipe, RopeSection, Stage
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import Resolved
from mcore_longctx.rope import RopeScaling

__all__ = ["StageRun", "stage_run"]

_MINUTES_WITHOUT_PLAN = 30  # ranks on CPUs: there is no formula for their step time, and this is what `train` waits


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """What a command line for another program is made of. `where(key)` places a recipe key for an error message."""

    file: RecipeFile
    name: str  # of the recipe
    stage: Stage
    previous: str | None  # the stage that this one goes on from
    shape: ModelShape
    rope: RopeScaling
    section: RopeSection
    backend: Literal["local", "te"]
    cluster: ClusterSection
    seed: int
    tokenizer: Path
    folder: Path  # of the run
    separator_loss: bool
    timeout_minutes: int
    nodes: int
    ranks_per_node: int

    def where(self, key: str) -> str:
        """File, line and dotted path of a key as `Flag.keys` names it."""
        own_rope = self.stage.rope is not None and key.partition(".")[0] == "rope"
        return self.file.where(
            f"stages.{self.stage.name}.{key.removeprefix('stage.')}" if own_rope or key.startswith("stage.") else key
        )

    @property
    def data_prefix(self) -> Path:
        """Of the packed samples."""
        return self.folder / "data" / self.stage.name / self.stage.data

    @property
    def work(self) -> Path:
        """Where Megatron-LM's own files of this stage go: beside ours, never among them."""
        return self.work_of(self.stage.name)

    def work_of(self, stage: str) -> Path:
        """The same of another stage."""
        return self.folder / "megatron-lm" / stage


def stage_run(file: RecipeFile, resolved: Resolved, stage_name: str | None) -> StageRun:
    """One stage of a recipe.

    Args:
        file: the recipe.
        resolved: its sizes and ropes.
        stage_name: which; None if there is one.

    Raises:
        ConfigError: no such stage; an unknown GPU.
        LayoutError: ranks that do not fill whole nodes.
    """
    recipe = file.recipe
    names = [stage.name for stage in recipe.stages]
    if stage_name is None and len(names) == 1:
        stage_name = names[0]
    if stage_name is None or stage_name not in names:
        what = "--stage is missing" if stage_name is None else f"no stage {stage_name!r}"
        raise ConfigError(what, where=file.file, fix=f"stages: {', '.join(names)}")
    at = names.index(stage_name)
    stage, cluster = recipe.stages[at], recipe.cluster
    ranks_per_node = min(cluster.nproc_per_node, stage.parallel.world_size)
    nodes, rest = divmod(stage.parallel.world_size, ranks_per_node)
    if rest:
        raise LayoutError(
            f"{stage.parallel.world_size:,} ranks do not fill nodes of {ranks_per_node}",
            where=file.where(f"stages.{stage_name}.parallel"),
            fix="change the layout, or cluster.nproc_per_node",
        )
    return StageRun(
        file=file,
        name=recipe.name,
        stage=stage,
        previous=names[at - 1] if at else None,
        shape=resolved.shape,
        rope=resolved.rope_of(stage.name),
        section=recipe.rope_section(stage.name),
        backend=recipe.model.backend,
        cluster=cluster,
        seed=recipe.seed,
        tokenizer=recipe.tokenizer_folder,
        folder=recipe.run_folder,
        separator_loss=recipe.data[stage.data].separator_loss,
        timeout_minutes=_timeout_minutes(stage, resolved.shape, recipe),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
    )


def _timeout_minutes(stage: Stage, shape: ModelShape, recipe: Recipe) -> int:
    """Whole minutes, as Megatron counts them: those of the recipe, else those that follow from the planned step time."""
    if stage.distributed_timeout_minutes is not None:
        return math.ceil(stage.distributed_timeout_minutes)
    plan = plan_stage(stage, shape, recipe.cluster, backend=recipe.model.backend)
    return _MINUTES_WITHOUT_PLAN if plan is None else math.ceil(plan.intervals.distributed_timeout.value / 60)
