"""One column of the evaluation: one checkpoint under one rope, all tasks, on all ranks of the job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from tqdm import tqdm

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.errors import CheckpointError
from mcore_longctx.evaluate.loss_by_position import score_windows, window_rows
from mcore_longctx.evaluate.needles import needle_rows, score_needles
from mcore_longctx.evaluate.prepare import ColumnTasks, prepare_tasks
from mcore_longctx.evaluate.rows import RowFile, on_first_rank
from mcore_longctx.evaluate.ruler import ruler_rows, score_ruler_tasks
from mcore_longctx.evaluate.short_suite import choice_rows, score_choices
from mcore_longctx.families import ModelShape
from mcore_longctx.manifest import MANIFEST, sha256_file, verify_manifest
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
from mcore_longctx.model.te import check_backend
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.plan.evaluation_checks import check_section
from mcore_longctx.recipe.card import read_card
from mcore_longctx.recipe.schema import EvaluateSection
from mcore_longctx.rope import RopeScaling

__all__ = ["CACHE", "EvaluateJob", "evaluate_column"]

CACHE = "cache"  # below RUN_FOLDER/evaluate, beside the columns


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What is measured, of which checkpoint, under which rope.

    Attributes:
        evaluate: tasks, layout and precision; its `level` says how much of it is measured.
        shape: sizes that the checkpoint must have.
        rope: rope to measure with; for a base "with scaled rope" not the one that its weights were trained with.
        checkpoint: torch_dist folder with manifest and card.
        checkpoint_rope: rope that the checkpoint's card must state.
        tokenizer: folder with tokenizer.json.
        out: folder of the column; results are added to what it holds. Texts and prompts that are dear to make lie in `cache` beside it.
        phase_dtype: of the rope's angles.
        backend: whose layers compute it.
        seed: of the samples: the same seed gives the same samples to every column.
    """

    evaluate: EvaluateSection
    shape: ModelShape
    rope: RopeScaling
    checkpoint: Path
    checkpoint_rope: RopeScaling
    tokenizer: Path
    out: Path
    phase_dtype: Literal["float32", "float64"] = "float32"
    backend: Literal["local", "te"] = "local"
    seed: int = 1234


def evaluate_column(job: EvaluateJob, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Measure one column. Every rank of the layout calls it; rank 0 writes the files of `job.out` and speaks.

    Samples whose line is there already are skipped, so an evaluation that was stopped goes on where it was. What cannot be measured is
    found before the model is built.

    Args:
        job: what to do.
        say: takes lines of progress, on rank 0.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged, of another model, rope or tokenizer.
        ConfigError, DataError, LayoutError: lengths, tasks, texts, tokenizer or ranks that do not fit.
        StorageError: the disk is full.
    """
    section = job.evaluate.at_level()
    tokenizer = _check(job, section)
    check_backend(job.backend)
    init_process_groups(section.parallel, seed=job.seed)
    try:
        on_first_rank(lambda: verify_manifest(job.checkpoint, "checkpoint"))
        identity = {
            "seed": job.seed,
            "model": on_first_rank(lambda: sha256_file(job.checkpoint / MANIFEST))[:16],
            "rope": job.rope.fingerprint()[:16],
        }
        tasks = prepare_tasks(section, tokenizer, seed=job.seed, cache=job.out.parent / CACHE)
        rows = _open_rows(job.out, tasks, identity)
        with device_context():
            model = build_gpt_model(
                job.shape,
                job.rope,
                section.parallel,
                precision=section.precision,
                seq_length=tasks.longest,
                phase_dtype=job.phase_dtype,
                seed=None,
                backend=job.backend,
            )
            load_model_weights(model, job.checkpoint)
            model.eval()
            _measure(job, tasks, model, rows, say)
    finally:
        destroy_process_groups()


def _check(job: EvaluateJob, section: EvaluateSection) -> EvaluationTokenizer:
    """What can be wrong with section, checkpoint and tokenizer. The same on every rank, so every rank stops alike."""
    check_section(section, backend=job.backend)
    card = read_card(job.checkpoint)
    card.check(shape=job.shape, rope=job.checkpoint_rope, where=job.checkpoint)
    tokenizer = EvaluationTokenizer(job.tokenizer, job.shape.vocab_size)
    if card.tokenizer_sha256 is not None and card.tokenizer_sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"was made with another tokenizer than {job.tokenizer}",
            where=job.checkpoint,
            fix="set tokenizer in the recipe to its own",
        )
    return tokenizer


def _open_rows(out: Path, tasks: ColumnTasks, identity: Mapping[str, Any]) -> dict[str, RowFile]:
    """The files of all tasks, read and checked: rows that do not go with this evaluation are no news for hours later."""
    section, found = tasks.section, {}

    def of(task: str) -> dict[str, Any]:
        return {**identity, "text": tasks.texts[task]}

    if section.needle is not None:
        found["needle"] = needle_rows(out, section.needle, of("needle"))
    if section.ruler is not None:
        found["ruler"] = ruler_rows(out, section.ruler, of("ruler"))
    if section.loss_by_position is not None:
        found |= {task: window_rows(out, task, of(task)) for task in ("loss_by_position", "short_context")}
    if section.short_suite is not None:
        found["short_suite"] = choice_rows(out, of("short_suite"))
    return found


def _measure(job: EvaluateJob, tasks: ColumnTasks, model: Any, rows: Mapping[str, RowFile], say: Callable[[str], None]) -> None:
    is_first, section = dist.get_rank() == 0, tasks.section
    hidden = not (is_first and sys.stdout.isatty())
    with tqdm(total=tasks.samples, desc=job.out.name, file=sys.stdout, disable=hidden, leave=False) as bar:

        def speak(line: str) -> None:
            if is_first:
                bar.clear()
                say(f"{job.out.name:<10} {line}")

        def settings(task: str) -> dict[str, Any]:
            return {"rows": rows[task], "say": speak, "step": bar.update}

        if section.needle is not None:
            score_needles(model, section.needle, tasks.needle, tasks.tokenizer, seed=job.seed, **settings("needle"))
        if tasks.ruler is not None:
            score_ruler_tasks(model, tasks.ruler, **settings("ruler"))
        for task, windows in (("loss_by_position", tasks.long), ("short_context", tasks.short)):
            if windows is not None:
                score_windows(model, windows, task=task, **settings(task))
        if tasks.questions:
            score_choices(model, tasks.questions, tasks.tokenizer, **settings("short_suite"))
