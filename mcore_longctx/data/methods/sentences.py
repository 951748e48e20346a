"""`sentences`: of each document only some sentences, those with impactful tokens first (LongRecipe, arXiv 2409.00509, section 4.1).

    digits         a sentence with a digit is wanted: numerals were the largest part of the tokens that the paper found
    logit_offset   a sentence with a token of the table is wanted: `data token-offsets` compares two models and writes it

Wanted sentences are taken first, in an order drawn from (seed, document, sentence), then others in the same way, until their tokens
are `keep` of the document's; what is taken stays in the order of the text. (The released code keeps sentences with a digit and half
of the others, of the first 24K tokens of a sample, whatever share that makes.) A sentence ends at the tokens at which positions of type
`segments` jump.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import hash64
from mcore_longctx.data.methods.positions import segment_lengths, sentence_end_ids
from mcore_longctx.data.tokenizers import Tokenizer
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import read_sealed, write_sealed
from mcore_longctx.recipe.data import SentenceSection

__all__ = ["SentenceChoice", "make_choice", "read_offsets", "write_offsets"]

Segment = tuple[npt.NDArray[Any], bool]

_SALT = 17
_KIND = "token offsets"


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceChoice:
    """Chooses sentences; a pure function of the document's id and tokens.

    Args:
        end_ids: tokens that end a sentence, ascending.
        wanted: whether a sentence with this token is wanted, [vocabulary].
        keep: share of a document's tokens.
        seed: of the order in which sentences are taken.
    """

    end_ids: npt.NDArray[np.int64]
    wanted: npt.NDArray[np.bool_]
    keep: float
    seed: int

    def mask(self, document_id: str, tokens: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which tokens of a document are kept, bool [tokens]: whole sentences, the one that fills the share included."""
        if not len(tokens):
            return np.zeros(0, np.bool_)
        length = segment_lengths(tokens, self.end_ids)
        begin = np.cumsum(length) - length
        is_wanted = np.logical_or.reduceat(self.wanted[tokens], begin)
        key = int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")
        order = np.lexsort((hash64(self.seed, _SALT, key, np.arange(len(length))), ~is_wanted))
        taken_before = np.cumsum(length[order]) - length[order]
        chosen = np.zeros(len(length), np.bool_)
        chosen[order[taken_before < self.keep * len(tokens)]] = True
        return np.repeat(chosen, length)

    def choose(self, document_id: str, segments: Sequence[Segment]) -> list[Segment]:
        """A document in stretches of equal loss flag, without the sentences that are not taken."""
        kept = self.mask(document_id, np.concatenate([tokens for tokens, _ in segments] or [np.zeros(0, np.int32)]))
        stops = np.cumsum([len(tokens) for tokens, _ in segments])
        return [
            (tokens[kept[stop - len(tokens) : stop]], loss) for (tokens, loss), stop in zip(segments, stops.tolist(), strict=True)
        ]


def make_choice(section: SentenceSection, tokenizer: Tokenizer, *, seed: int) -> SentenceChoice:
    """What a recipe asks for, with this tokenizer.

    Raises:
        DataError: the table of offsets is missing or damaged. That it is of this tokenizer, `prepare_job` has seen.
    """
    if section.rule == "digits":
        texts = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
        wanted = np.array([any(letter.isdigit() for letter in text) for text in texts], np.bool_)
    else:
        assert section.offsets is not None
        wanted = np.zeros(tokenizer.vocab_size, np.bool_)
        wanted[read_offsets(section.offsets)["impactful"]] = True
    return SentenceChoice(end_ids=sentence_end_ids(tokenizer), wanted=wanted, keep=section.keep, seed=seed)


# ------------------------------------------------------------------ the table of offsets
def write_offsets(
    path: Path,
    *,
    count: npt.NDArray[np.int64],
    total: npt.NDArray[np.float64],
    share: float,
    least: int,
    tokenizer_sha256: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Rank token types by how far a training moved them, and write the table; its contents.

    Args:
        path: of the table, a JSON file.
        count: how often each type was met, [vocabulary].
        total: sum of the absolute offsets of its places, [vocabulary].
        share: of the ranked types that are impactful.
        least: places that a type needs to be ranked.
        tokenizer_sha256: of the tokenizer.
        facts: what else the table should say.

    Raises:
        ConfigError: a share that is none.
        DataError: no type was met often enough, or the file cannot be written.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share is {share}, expected more than 0, at most 1", where="token-offsets")
    ranked = np.flatnonzero(count >= max(1, least))
    if not len(ranked):
        raise DataError(f"no token was met {least:,} times", where="token-offsets", fix="give a longer text or lower --least")
    mean = total[ranked] / count[ranked]
    order = np.lexsort((ranked, -mean))
    rows = [
        {"id": int(ranked[at]), "count": int(count[ranked[at]]), "offset": round(float(mean[at]), 6)} for at in order.tolist()
    ]
    impactful = sorted(row["id"] for row in rows[: math.ceil(share * len(rows))])
    table = {"format": 1, "kind": _KIND, "tokenizer_sha256": tokenizer_sha256, "share": share, "least": least, **facts}
    table |= {"types": rows, "impactful": impactful}
    try:
        write_sealed(path, table)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=path, fix="choose another place") from None
    return table


def read_offsets(path: Path) -> dict[str, Any]:
    """A table that `write_offsets` wrote.

    Raises:
        DataError: missing, damaged, or no such table.
    """
    fix = "make it with `data token-offsets`"
    try:
        facts = read_sealed(path)
    except FileNotFoundError:
        raise DataError("no such file", where=path, fix=fix) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None
    except (ValueError, KeyError):
        facts = {}
    if facts.get("kind") != _KIND or facts.get("format") != 1:
        raise DataError("damaged, or no table of token offsets", where=path, fix=fix)
    return facts
