"""`mcore_longctx.json`: what must travel with the weights (model sizes, rope, vocabulary, tokenizer)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.errors import CheckpointError
from mcore_longctx.families import FAMILIES, ModelShape
from mcore_longctx.manifest import write_atomic
from mcore_longctx.reading import read_json_object
from mcore_longctx.rope import RopeScaling

__all__ = ["CARD", "CheckpointCard", "read_card", "write_card"]

CARD = "mcore_longctx.json"
_MAX_BYTES = 1 << 20  # ours have 2 KB; a list of factors for each pair of a head is 20 KB


@dataclass(frozen=True, kw_only=True)
class CheckpointCard:
    """Facts that a checkpoint's own format does not hold.

    The rope fingerprint is stored beside the rope and compared when the card is read: a rope edited by hand is refused.
    """

    shape: ModelShape
    rope: RopeScaling
    tokenizer_sha256: str | None = None
    stage: str = "base"
    iteration: int = 0

    def check(self, *, shape: ModelShape, rope: RopeScaling, where: object) -> None:
        """Raise CheckpointError unless the checkpoint is of this model and this rope."""
        if self.shape.vocab_size != shape.vocab_size:
            raise CheckpointError(
                f"vocabulary has {self.shape.vocab_size:,} entries, the recipe's model {shape.vocab_size:,}",
                where=where,
                fix="use the checkpoint that belongs to this recipe",
            )
        if self.shape != shape:
            wrong = [key for key, value in shape.as_dict().items() if self.shape.as_dict()[key] != value]
            raise CheckpointError(
                f"{wrong[0]} is {self.shape.as_dict()[wrong[0]]}, the recipe's model has {shape.as_dict()[wrong[0]]}", where=where
            )
        if self.rope.fingerprint() != rope.fingerprint():
            raise CheckpointError(
                f"rope differs: the checkpoint has {self.rope.describe()} [{self.rope.fingerprint()[:12]}], "
                f"expected {rope.describe()} [{rope.fingerprint()[:12]}]",
                where=where,
                fix="set rope in the recipe to the checkpoint's, or choose another checkpoint",
            )


def write_card(folder: Path, card: CheckpointCard) -> None:
    """Write `folder/mcore_longctx.json`."""
    text = {
        "format": 1,
        "family": card.shape.family,
        "stage": card.stage,
        "iteration": card.iteration,
        "shape": card.shape.as_dict(),
        "rope": card.rope.as_dict(),
        "rope_fingerprint": card.rope.fingerprint(),
        "rope_in_words": card.rope.describe(),
        "tokenizer_sha256": card.tokenizer_sha256,
    }
    write_atomic(folder / CARD, json.dumps(text, indent=1) + "\n")


def read_card(folder: Path) -> CheckpointCard:
    """Read `folder/mcore_longctx.json`.

    Raises:
        CheckpointError: missing or damaged, no regular file, or the rope does not give the stored fingerprint.
    """
    path = folder / CARD
    try:
        text = read_json_object(path, _MAX_BYTES, f"a {CARD}")
        card = CheckpointCard(
            shape=ModelShape.from_dict(text["shape"]),
            rope=RopeScaling.from_dict(text["rope"]),
            tokenizer_sha256=text["tokenizer_sha256"],
            stage=str(text["stage"]),
            iteration=_iteration(text["iteration"]),
        )
        stored = text["rope_fingerprint"]
    except FileNotFoundError:
        raise CheckpointError(
            f"no {CARD} here: not a checkpoint of mcore-longctx", where=folder, fix="make one with `mcore-longctx convert import`"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise CheckpointError("damaged or of another version", where=path, fix="use another copy of the checkpoint") from None
    if card.shape.family not in FAMILIES:
        raise CheckpointError(
            f"the model is of family {card.shape.family[:60]!r}",
            where=path,
            fix=f"known are {', '.join(FAMILIES)}; docs/families.md",
        )
    if card.rope.fingerprint() != stored:
        raise CheckpointError("the rope in this file does not give the rope fingerprint stored beside it", where=path)
    return card


def _iteration(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"iteration is {value!r}")
    return value
