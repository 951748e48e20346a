"""Logits of a torch_dist checkpoint against those of a Hugging Face folder through transformers, up to the end of the context.

Each side reads its own files: Megatron the checkpoint and the rope of its card, transformers the folder and its config.json. Rope
is relative, so a shifted text proves nothing: two blocks of tokens far apart, positions 0..31 and P..P+31 in one sequence, make the
angles at P count. transformers is the independent reader and is imported only here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
from mcore_longctx.model.rotary import hf_inverse_frequencies
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.recipe.card import CheckpointCard, read_card
from mcore_longctx.recipe.schema import Parallel

__all__ = ["BLOCK", "TOLERANCE", "LogitsReport", "PositionDifference", "compare_logits"]

BLOCK = 32
CONTIGUOUS = 256
TOLERANCE = 1e-5  # of the largest logit: float32 rounding of two programs; 0 to 4e-6 was measured


@dataclass(frozen=True)
class PositionDifference:
    """How far the logits are apart on one sequence. `positions` in words; `scale` is the largest logit."""

    positions: str
    max_abs: float
    scale: float
    argmax_equal: float  # share of rows

    @property
    def relative(self) -> float:
        """Largest difference as a share of the largest logit."""
        return self.max_abs / self.scale if self.scale else inf


@dataclass(frozen=True)
class LogitsReport:
    """What `compare_logits` found. `equal`: inverse frequencies bit for bit, attention factor and logits within `TOLERANCE`."""

    checkpoint: Path
    hf: Path
    rope: str
    inverse_frequencies_equal: bool
    attention_factors: tuple[float, float]
    differences: tuple[PositionDifference, ...]
    transformers: str

    @property
    def equal(self) -> bool:
        """The verdict."""
        ours, theirs = self.attention_factors
        close = all(difference.relative <= TOLERANCE for difference in self.differences)  # NaN is not close
        return self.inverse_frequencies_equal and abs(ours - theirs) <= 1e-6 * abs(ours) and close

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        rows = [{**asdict(difference), "relative": difference.relative} for difference in self.differences]
        # JSON knows no NaN
        finite = [
            {name: value if isinstance(value, str) or isfinite(value) else None for name, value in row.items()} for row in rows
        ]
        whole = {**asdict(self), "checkpoint": str(self.checkpoint), "hf": str(self.hf), "differences": finite}
        return {"equal": self.equal, **whole, "tolerance": TOLERANCE}

    def text(self) -> str:
        """For people: the verdict last."""
        ours, theirs = self.attention_factors
        frequencies = "equal bit for bit" if self.inverse_frequencies_equal else "DIFFERENT"
        lines = [
            f"rope of the checkpoint: {self.rope}",
            f"inverse frequencies in float32: {frequencies}",
            f"attention factor: {ours:.9g} and {theirs:.9g}",
        ]
        lines += [
            f"logits at {difference.positions}: max difference {difference.max_abs:.2e} of {difference.scale:.3g} "
            f"({difference.relative:.1e}), same most probable token in {100 * difference.argmax_equal:.1f} % of the rows"
            for difference in self.differences
        ]
        within = f"within {TOLERANCE:g}" if self.equal else f"NOT within {TOLERANCE:g}"
        lines.append(f"{'equal' if self.equal else 'DIFFERENT'}: logits {within} of transformers {self.transformers}")
        return "\n".join(lines)


def compare_logits(checkpoint: Path, hf: Path, *, tokens: Sequence[int] | None = None) -> LogitsReport:
    """Compare the logits of a checkpoint and a Hugging Face folder in float32, in one process.

    Args:
        checkpoint: torch_dist folder with its card.
        hf: Hugging Face folder of safetensors.
        tokens: ids to feed, at least 256; None: pseudo-random ids, the same each time.

    Raises:
        ConfigError: transformers is not installed, or ids outside the vocabulary.
        CheckpointError: one of the folders cannot be read, or they have different vocabularies.
    """
    card = read_card(checkpoint)
    sequences = _sequences(card, tokens)
    theirs, their_rope, version = _hf_logits(hf, card, sequences)
    differences = []
    with _megatron(checkpoint, card, max(len(ids) for ids, _, _ in sequences)) as model:
        for (ids, positions, words), reference in zip(sequences, theirs, strict=True):
            rows = torch.arange(len(ids), device=training_device())
            ours = model.logits_at(ids[None].to(training_device()), positions[None].to(training_device()), rows).cpu()
            differences.append(
                PositionDifference(
                    words,
                    (ours - reference).abs().max().item(),
                    reference.abs().max().item(),
                    (ours.argmax(-1) == reference.argmax(-1)).double().mean().item(),
                )
            )
    inv_freq, attention_factor = their_rope
    return LogitsReport(
        checkpoint=checkpoint,
        hf=hf,
        rope=card.rope.describe(),
        inverse_frequencies_equal=bool(torch.equal(hf_inverse_frequencies(card.rope).cpu(), inv_freq)),
        attention_factors=(card.rope.frequencies()[1], attention_factor),
        differences=tuple(differences),
        transformers=version,
    )


def _sequences(card: CheckpointCard, tokens: Sequence[int] | None) -> list[tuple[Tensor, Tensor, str]]:
    """(ids, positions, words) of each comparison: the beginning, and pairs of blocks up to the end of the context."""
    vocabulary = card.shape.vocab_size
    if tokens is None:
        ids = torch.randint(vocabulary, (CONTIGUOUS,), generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.tensor(list(tokens)[:CONTIGUOUS], dtype=torch.int64)
        if len(ids) < CONTIGUOUS or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ConfigError(f"logits are compared on at least {CONTIGUOUS} ids of 0 to {vocabulary - 1:,}", where="tokens")
    longest = card.rope.resolved_max_position_embeddings or CONTIGUOUS
    original = card.rope.original_max_position_embeddings or longest
    reach = min(CONTIGUOUS, longest)
    found = [(ids[:reach], torch.arange(reach), f"0..{reach - 1:,}")]
    starts = {original - BLOCK // 2, longest // 2, longest * 9 // 10, longest - BLOCK}
    first = torch.arange(BLOCK)
    for start in sorted(start for start in starts if BLOCK <= start <= longest - BLOCK):
        positions = torch.cat([first, first + start])
        found.append((ids[: 2 * BLOCK], positions, f"0..{BLOCK - 1} and {start:,}..{start + BLOCK - 1:,}"))
    return found


def _hf_logits(
    hf: Path, card: CheckpointCard, sequences: list[tuple[Tensor, Tensor, str]]
) -> tuple[list[Tensor], tuple[Tensor, float], str]:
    """Logits [s, v] of each sequence by transformers, its inverse frequencies and attention factor, and its version."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "comparing logits needs transformers, which is not installed", fix="pip install 'transformers>=4.57'"
        ) from None
    if not (hf / "config.json").is_file():
        raise CheckpointError("no config.json: not a Hugging Face folder", where=hf, fix="check the path")
    try:
        model = transformers.LlamaForCausalLM.from_pretrained(
            str(hf.absolute()), dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers {transformers.__version__} cannot load it: {first_line}", where=hf) from error
    if model.config.vocab_size != card.shape.vocab_size:
        raise CheckpointError(
            f"vocabulary has {model.config.vocab_size:,} entries, the checkpoint's {card.shape.vocab_size:,}", where=hf
        )
    logits = []
    with torch.no_grad():
        for ids, positions, _ in sequences:
            # the mask of ones matters: without it transformers takes a jump in the positions for a new document
            whole = torch.ones(1, len(ids), dtype=torch.int64)
            out = model(input_ids=ids[None], position_ids=positions[None], attention_mask=whole, use_cache=False)
            logits.append(out.logits[0].float())
    rotary = model.model.rotary_emb
    rope = (rotary.original_inv_freq.float().clone(), float(rotary.attention_scaling))
    del model
    gc.collect()
    return logits, rope, str(transformers.__version__)


@contextmanager
def _megatron(checkpoint: Path, card: CheckpointCard, seq_length: int) -> Iterator[Any]:
    """The checkpoint's model in float32 with the rope of its own card, in this process alone."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError("logits are compared in one process", fix="start it without torchrun")
    had_world = dist.is_initialized()
    init_process_groups(Parallel(), seed=0)
    try:
        with device_context():
            model = build_gpt_model(card.shape, card.rope, Parallel(), precision="fp32", seq_length=seq_length, seed=None)
            load_model_weights(model, checkpoint)
            yield model.eval()
    finally:
        if not had_world:
            destroy_process_groups()
