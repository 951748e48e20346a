"""The training job of a stage, and whether it is finished. No torch."""

from __future__ import annotations

from pathlib import Path

from mcore_longctx.checkpoint_folder import iteration_folder, iteration_of, latest_checkpoint
from mcore_longctx.convert.sidecars import tokenizer_sha256
from mcore_longctx.data.methods.positions import sentence_end_ids
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.manifest import verify_manifest
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import Resolved
from mcore_longctx.recipe.schema import Stage
from mcore_longctx.run.checkpoints import final_checkpoint
from mcore_longctx.train import TrainJob
from mcore_longctx.train.job import data_fingerprint, refuse_changed_settings

__all__ = ["finished_checkpoint", "train_job"]


def train_job(file: RecipeFile, resolved: Resolved, stage_name: str | None) -> TrainJob:
    """The job of one stage of a recipe; None means the only one.

    Raises:
        ConfigError: no such stage, or the stage before it is not finished.
    """
    recipe = file.recipe
    names = [stage.name for stage in recipe.stages]
    if stage_name is None and len(names) == 1:
        stage_name = names[0]
    if stage_name not in names:
        what = "--stage is missing" if stage_name is None else f"no stage {stage_name!r}"
        raise ConfigError(what, where=file.file, fix=f"stages: {', '.join(names)}")
    at = names.index(stage_name)
    stage, folder = recipe.stages[at], recipe.run_folder
    start, start_rope = folder / "checkpoints" / "base", resolved.own_rope
    before = recipe.stages[at - 1] if at > 0 else None
    if before is not None and before.merge is not None:
        start, start_rope = final_checkpoint(recipe, before.name), resolved.rope_of(before.name)
    elif before is not None:
        checkpoints = folder / "checkpoints" / before.name
        newest, start, start_rope = (
            latest_checkpoint(checkpoints),
            iteration_folder(checkpoints, before.iterations),
            resolved.rope_of(before.name),
        )
        if newest != start:
            state = f"is at {newest.name}" if newest is not None else "has no checkpoint"
            raise ConfigError(
                f"stage {before.name}, which {stage.name} goes on from, {state}, its end is {start.name}",
                where=checkpoints,
                fix=f"train stage {before.name} to its end first",
            )
    return TrainJob(
        shape=resolved.shape,
        rope=resolved.rope_of(stage.name),
        start_rope=start_rope,
        stage=stage,
        data_prefix=folder / "data" / stage.name / stage.data,
        start_checkpoint=start,
        checkpoints=folder / "checkpoints" / stage.name,
        metrics_path=folder / "metrics" / f"{stage.name}.jsonl",
        tensorboard=folder / "tensorboard" / stage.name,
        log_folder=folder / "logs" / stage.name,
        phase_dtype=recipe.rope_section(stage.name).phase_dtype,
        backend=recipe.model.backend,
        tokenizer_sha256=tokenizer_sha256(recipe.tokenizer_folder),
        seed=recipe.seed,
        sentence_ends=_sentence_ends(stage, recipe.tokenizer_folder),
    )


def _sentence_ends(stage: Stage, tokenizer: Path) -> tuple[int, ...]:
    if stage.positions is None or stage.positions.type != "segments":
        return ()
    return tuple(sentence_end_ids(load_tokenizer(tokenizer)).tolist())


def finished_checkpoint(job: TrainJob) -> Path | None:
    """The last checkpoint of a stage that is trained to its end with these settings; None: there is something left to train.

    Looks at names and sizes, not at every byte: whoever loads it does that.

    Raises:
        CheckpointError: it is damaged, belongs to another stage, or was trained with other settings or data.
    """
    newest = latest_checkpoint(job.checkpoints)
    if newest is None or iteration_of(newest) < job.stage.iterations:
        return None
    manifest = verify_manifest(newest, "checkpoint", hashes=False)
    if manifest.get("stage") != job.stage.name:
        raise CheckpointError(f"belongs to stage {manifest.get('stage')!r}, not {job.stage.name!r}", where=newest)
    now = job.settings(data=data_fingerprint(job.data_prefix, tokenizer_sha256=job.tokenizer_sha256))
    refuse_changed_settings(manifest["settings"], now, where=newest)
    return newest
