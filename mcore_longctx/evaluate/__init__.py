"""Measuring a model under context parallelism: needles, RULER-like tasks, loss by position, short suite, logits of two checkpoints."""

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # must come before any module of megatron
from mcore_longctx.evaluate.job import EvaluateJob, evaluate_column
from mcore_longctx.evaluate.logits import LogitsReport, compare_logits
from mcore_longctx.evaluate.loss_by_position import score_windows
from mcore_longctx.evaluate.needles import score_needles

__all__ = ["EvaluateJob", "LogitsReport", "compare_logits", "evaluate_column", "score_needles", "score_windows"]
