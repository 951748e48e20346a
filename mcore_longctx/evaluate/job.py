"""One column of the evaluation: one checkpoint under one rope, all tasks, on all ranks of the job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mcore_longctx.errors import CheckpointError
from mcore_longctx.evaluate.held_out import EvaluationTokenizer, Windows, cut_windows, read_documents
from mcore_longctx.evaluate.loss_by_position import score_windows
from mcore_longctx.evaluate.rows import on_first_rank
from mcore_longctx.evaluate.scoring import score_needles
from mcore_longctx.families import ModelShape
from mcore_longctx.layout import check_seq_length
from mcore_longctx.manifest import MANIFEST, sha256_file, verify_manifest
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
from mcore_longctx.model.te import check_backend
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.recipe.card import read_card
from mcore_longctx.recipe.schema import EvaluateSection, LossByPositionSection
from mcore_longctx.rope import RopeScaling
from mcore_longctx.tasks import Haystack

__all__ = ["EvaluateJob", "evaluate_column"]


@dataclass(frozen=True, kw_only=True)
class EvaluateJob:
    """What is measured, of which checkpoint, under which rope.

    Attributes:
        evaluate: tasks, layout and precision.
        shape: sizes that the checkpoint must have.
        rope: rope to measure with; for a base "with scaled rope" not the one that its weights were trained with.
        checkpoint: torch_dist folder with manifest and card.
        checkpoint_rope: rope that the checkpoint's card must state.
        tokenizer: folder with tokenizer.json.
        out: folder of the column; results are added to what it holds.
        phase_dtype: of the rope's angles.
        backend: whose layers compute it.
        seed: of the needle samples: the same seed gives the same samples to every column.
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

    Samples whose line is there already are skipped, so an evaluation that was stopped goes on where it was.

    Args:
        job: what to do.
        say: takes lines of progress, on rank 0.

    Raises:
        CheckpointError: a checkpoint that is missing, damaged, of another model, rope or tokenizer.
        ConfigError, DataError, LayoutError: lengths, texts, tokenizer or ranks that do not fit.
    """
    tasks = _prepare(job)
    check_backend(job.backend)
    init_process_groups(job.evaluate.parallel, seed=job.seed)
    try:
        on_first_rank(lambda: verify_manifest(job.checkpoint, "checkpoint"))
        identity = {
            "seed": job.seed,
            "model": on_first_rank(lambda: sha256_file(job.checkpoint / MANIFEST))[:16],
            "rope": job.rope.fingerprint()[:16],
        }
        with device_context():
            model = build_gpt_model(
                job.shape,
                job.rope,
                job.evaluate.parallel,
                precision=job.evaluate.precision,
                seq_length=max(_lengths(job.evaluate)),
                phase_dtype=job.phase_dtype,
                seed=None,
                backend=job.backend,
            )
            load_model_weights(model, job.checkpoint)
            model.eval()
            _measure(job, tasks, model, identity, say)
    finally:
        destroy_process_groups()


@dataclass(frozen=True)
class _Tasks:
    tokenizer: EvaluationTokenizer
    haystack: Haystack | None
    long: Windows | None
    short: Windows | None

    def count(self, section: EvaluateSection) -> int:
        """Forwards of the whole column."""
        needle = section.needle
        needles = len(needle.lengths) * needle.depths * needle.samples if needle is not None else 0
        return needles + sum(len(windows.starts) for windows in (self.long, self.short) if windows is not None)


def _prepare(job: EvaluateJob) -> _Tasks:
    """Everything that can be wrong without a model. The same on every rank, so every rank stops alike."""
    cp_size = job.evaluate.parallel.context_parallel_size
    needle, loss = job.evaluate.needle, job.evaluate.loss_by_position
    for length in _lengths(job.evaluate):
        check_seq_length(length, cp_size, where="evaluate")
    card = read_card(job.checkpoint)
    card.check(shape=job.shape, rope=job.checkpoint_rope, where=job.checkpoint)
    tokenizer = EvaluationTokenizer(job.tokenizer, job.shape.vocab_size)
    if card.tokenizer_sha256 is not None and card.tokenizer_sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"was made with another tokenizer than {job.tokenizer}",
            where=job.checkpoint,
            fix="set tokenizer in the recipe to its own",
        )
    haystack = None
    if needle is not None:
        haystack = Haystack.from_documents(read_documents(needle.haystack), tokenizer, where=needle.haystack)
    long, short = _windows(loss, tokenizer) if loss is not None else (None, None)
    return _Tasks(tokenizer, haystack, long, short)


def _windows(section: LossByPositionSection, tokenizer: EvaluationTokenizer) -> tuple[Windows, Windows]:
    text = "".join(document if document.endswith("\n") else document + "\n" for document in read_documents(section.path))
    tokens = tokenizer.encode_array(text)
    return (
        cut_windows(tokens, tokenizer.prefix, count=section.windows, length=section.seq_length, where=section.path),
        cut_windows(tokens, tokenizer.prefix, count=section.short_windows, length=section.short_length, where=section.path),
    )


def _lengths(section: EvaluateSection) -> list[int]:
    needle, loss = section.needle, section.loss_by_position
    return [*(needle.lengths if needle is not None else ()), *((loss.seq_length, loss.short_length) if loss is not None else ())]


def _measure(job: EvaluateJob, tasks: _Tasks, model: Any, identity: dict[str, Any], say: Callable[[str], None]) -> None:
    import torch.distributed as dist

    is_first = dist.get_rank() == 0
    hidden = not (is_first and sys.stdout.isatty())
    with tqdm(total=tasks.count(job.evaluate), desc=job.out.name, file=sys.stdout, disable=hidden, leave=False) as bar:

        def speak(line: str) -> None:
            if is_first:
                bar.clear()
                say(f"{job.out.name:<10} {line}")

        common: dict[str, Any] = {"identity": identity, "say": speak, "step": bar.update}
        if job.evaluate.needle is not None and tasks.haystack is not None:
            out = job.out / "needle.jsonl"
            score_needles(model, job.evaluate.needle, tasks.haystack, tasks.tokenizer, seed=job.seed, out=out, **common)
        for task, windows in (("loss_by_position", tasks.long), ("short_context", tasks.short)):
            if windows is not None:
                score_windows(model, windows, task=task, out=job.out / f"{task}.jsonl", **common)
