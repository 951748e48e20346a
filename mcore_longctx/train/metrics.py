"""Numbers of each step: one readable line, one JSON line, TensorBoard. Only rank 0 writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from mcore_longctx.manifest import write_atomic

__all__ = ["MetricsWriter", "StepMetrics", "iteration_line", "sample_digest"]


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step. Each field is a key of the JSON line."""

    step: int  # 1 is the first
    loss: float  # mean over the tokens that carry loss, before the step
    lr: float  # with which this step was taken
    grad_norm: float  # before clipping
    tokens_per_second: float  # of the whole job, loss or not
    memory_bytes: int  # of the rank that uses most: peak of the CUDA allocator, or resident memory
    seconds: float
    consumed_samples: int
    loss_tokens: int  # tokens that carry loss
    samples: str  # digest of the sample ids in their order, see sample_digest


def sample_digest(sample_ids: Sequence[int]) -> str:
    """16 hexadecimal digits over the ids of a step's samples: two runs that saw the same data show the same digest."""
    return hashlib.sha256(",".join(str(number) for number in sample_ids).encode()).hexdigest()[:16]


def iteration_line(metrics: StepMetrics, *, iterations: int, global_batch_size: int, eta_seconds: float | None) -> str:
    """The step as Megatron-LM prints it, with its field names, so that existing log readers work."""
    width = len(str(iterations))
    fields = (
        f"iteration {metrics.step:{width}d}/{iterations:{width}d}",
        f"consumed samples: {metrics.consumed_samples:,}".replace(",", ""),
        f"elapsed time per iteration (ms): {1000 * metrics.seconds:.1f}",
        f"learning rate: {metrics.lr:.6E}",
        f"global batch size: {global_batch_size}",
        f"lm loss: {metrics.loss:.6E}",
        f"grad norm: {metrics.grad_norm:.3f}",
        f"tokens/s: {metrics.tokens_per_second:,.0f}",
        f"mem: {metrics.memory_bytes / 2**30:.2f} GiB",
        f"ETA: {'-' if eta_seconds is None else _clock(eta_seconds)}",
    )
    return f" {' | '.join(fields)} |"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class MetricsWriter:
    """Appends to `metrics/<stage>.jsonl` and to TensorBoard.

    Args:
        path: the JSON lines.
        tensorboard: folder of event files.
        resumed_step: steps that the job starts after. Lines of later steps are dropped: they were written by a process that died
            before it saved, and will be written again.
    """

    def __init__(self, path: Path, tensorboard: Path, *, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_until(path, resumed_step)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        # imported here: a second of CPU that only rank 0 pays
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        """Write one step; a reader sees it at once."""
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._file.flush()
        for name, value in (
            ("lm loss", metrics.loss),
            ("learning-rate", metrics.lr),
            ("grad-norm", metrics.grad_norm),
            ("tokens per second", metrics.tokens_per_second),
            ("memory bytes", metrics.memory_bytes),
            ("iteration-time", metrics.seconds),
        ):
            self._board.add_scalar(name, value, metrics.step)

    def sync(self) -> None:
        """Make the lines so far survive a power loss; called before a checkpoint of that step appears."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that was cut off."""
    if not path.exists():
        return
    kept, whole = [], path.read_text(encoding="utf-8", errors="replace")
    for line in whole.splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    text = "".join(f"{line}\n" for line in kept)
    if text != whole:
        write_atomic(path, text)
