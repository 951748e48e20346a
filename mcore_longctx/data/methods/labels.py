"""What Untie the Knots adds to a sample, as literal tokens: labels `<D> id </D>`, knots at cuts, and the words of the backtrace.

Llama 3's reserved tokens serve as markers where the tokenizer has enough of them, so that the vocabulary stays as it is; else short
texts in ordinary characters do. An id is six random letters and digits, tokenized alone. All of it stands in the literals of a plan:

    separator | <S> | </S> | head1 tail1 head2 tail2 ... | label 0 | label 1 | ...        a label: <D> id </D> id <,>
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mcore_longctx.data.files.shards import hash64
from mcore_longctx.data.files.sidecar import Runs
from mcore_longctx.errors import DataError

__all__ = ["LabelLayout", "Marker", "TextEncoder", "literal_names", "make_labels", "separator_tokens"]

IntArray = npt.NDArray[np.int64]

_TEXTS = {"open": "<D>", "close": "</D>", "ask": "<S>", "stop": "</S>", "next": "<,>"}
_RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(256)]
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_ID_LETTERS = 6
_SALT = 16
_BATCH = 1024  # ids tried at once
_MOST_TRIES = 64  # ids tried for one that is taken


class TextEncoder(Protocol):
    """What labels need of a tokenizer."""

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Ids of ordinary text."""

    def control_id(self, text: str) -> int | None:
        """Id of a token of its own, None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Marker:
    """One marker: what it is in the text, and where it stands in the literals."""

    text: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class LabelLayout:
    """Where markers and labels stand in the literals. Stands in plan.json and in the sidecar."""

    markers: Mapping[str, Marker]  # ask, stop, head1, tail1, ...; open, close and next stand in each label (here: in the first)
    cuts: int  # of a document, at most
    first: int  # literal at which label 0 begins
    count: int  # labels, a power of two
    id_tokens: int

    @property
    def label_length(self) -> int:
        """Tokens of `<D> id </D>`."""
        return self.markers["open"].length + self.id_tokens + self.markers["close"].length

    @property
    def next_tokens(self) -> int:
        """Tokens of `<,>`."""
        return self.markers["next"].length

    @property
    def stride(self) -> int:
        """Literals of one label."""
        return self.label_length + self.id_tokens + self.next_tokens

    def label(self, number: IntArray) -> IntArray:
        """Literal at which `<D> id </D>` of these labels begins."""
        return self.first + number * self.stride

    def id(self, number: IntArray) -> IntArray:
        """Literal at which the id alone begins."""
        return self.label(number) + self.markers["open"].length

    def id_next(self, number: IntArray) -> IntArray:
        """Literal at which `id <,>` begins."""
        return self.label(number) + self.label_length

    def kind(self, start: int) -> tuple[str, int]:
        """What a literal run that begins there is: (`separator`, 0), (`label`, number), (`id`, number), or (marker, 0)."""
        if start >= self.first:
            number, within = divmod(start - self.first, self.stride)
            return ("label" if within == 0 else "id"), number
        for name, marker in self.markers.items():
            if marker.start <= start < marker.start + marker.length:
                return name, 0
        return "separator", 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> LabelLayout:
        """Back from JSON. Raises KeyError, TypeError or AttributeError if it is something else."""
        markers = {name: Marker(**marker) for name, marker in facts["markers"].items()}
        numbers = {name: int(facts[name]) for name in ("cuts", "first", "count", "id_tokens")}
        return cls(markers=markers, **numbers)


def make_labels(tokenizer: TextEncoder, *, cuts: int, count: int, base: int, where: object) -> tuple[LabelLayout, IntArray]:
    """Markers and labels, and the literals that hold them.

    Args:
        tokenizer: of the data.
        cuts: of a document, at most.
        count: labels, a power of two.
        base: literals that stand before them.
        where: for errors.

    Raises:
        DataError: the tokenizer cannot tell markers or ids apart.
    """
    names = [*_TEXTS, *(f"{kind}{cut + 1}" for cut in range(cuts) for kind in ("head", "tail"))]
    reserved = [(text, token) for text in _RESERVED if (token := tokenizer.control_id(text)) is not None]
    if len(reserved) >= len(names):
        chosen = {name: (text, [token]) for name, (text, token) in zip(names, reserved, strict=False)}
    else:
        texts = _TEXTS | {name: f"<{name}>" for name in names if name not in _TEXTS}
        chosen = {name: (text, tokenizer.encode(text).tolist()) for name, text in texts.items()}
    if len({tuple(ids) for _, ids in chosen.values()} - {()}) < len(chosen):
        raise DataError("has no different tokens for the markers of augment utk", where=where, fix="use augment cip")
    ids = _ids(tokenizer, count, where)
    alone = [name for name in names if name not in ("open", "close", "next")]
    at, markers = base, {}
    for name in alone:
        text, tokens = chosen[name]
        markers[name] = Marker(text=text, start=at, length=len(tokens))
        at += len(tokens)
    # in a label: <D> id </D> id <,>
    place = at
    for name, behind in (("open", ids.shape[1]), ("close", ids.shape[1]), ("next", 0)):
        text, tokens = chosen[name]
        markers[name] = Marker(text=text, start=place, length=len(tokens))
        place += len(tokens) + behind
    layout = LabelLayout(markers=markers, cuts=cuts, first=at, count=count, id_tokens=ids.shape[1])
    opened, closed, following = (np.tile(np.array(chosen[name][1], np.int64), (count, 1)) for name in ("open", "close", "next"))
    heads = [np.array(chosen[name][1], np.int64) for name in alone]
    return layout, np.concatenate([*heads, np.concatenate([opened, ids, closed, ids, following], axis=1).ravel()])


def separator_tokens(runs: Runs) -> int:
    """Literals of a sidecar that are separators; those behind them were added by `augment`."""
    return int(runs.facts["augment"]["separator_tokens"]) if "augment" in runs.facts else len(runs.literals)


def literal_names(runs: Runs) -> Callable[[int], str]:
    """Says what the literal run of a sidecar is that begins at a place of the literals."""
    facts = runs.facts.get("augment")
    if facts is None or "labels" not in facts:
        return lambda start: "separator"
    layout = LabelLayout.from_dict(facts["labels"])

    def name(start: int) -> str:
        kind, _ = layout.kind(start)
        if kind in ("ask", "id", "stop"):
            return "backtrace"
        return f"knot {kind}" if kind in layout.markers else kind

    return name


def _ids(tokenizer: TextEncoder, count: int, where: object) -> IntArray:
    """So many different ids of one number of tokens, [count, tokens]: those of the number that is met most often."""
    size: int | None = None
    found: dict[tuple[int, ...], None] = {}
    for batch in range(max(1, _MOST_TRIES * count // _BATCH)):
        tried = [tuple(tokenizer.encode(text).tolist()) for text in _texts(batch)]
        if size is None:
            size = Counter(map(len, tried)).most_common(1)[0][0]
        found |= dict.fromkeys(each for each in tried if len(each) == size and size)
        if len(found) >= count:
            return np.array([*found][:count], np.int64)
    raise DataError(f"gives no {count:,} different ids for the labels of augment utk", where=where, fix="use augment cip")


def _texts(batch: int) -> Iterator[str]:
    numbers = np.arange(batch * _BATCH, (batch + 1) * _BATCH)
    for word in hash64(_SALT, numbers).tolist():
        yield "".join(_LETTERS[word // len(_LETTERS) ** place % len(_LETTERS)] for place in range(_ID_LETTERS))
