"""The data sections of a recipe: sources, length sampling, packing, and what is done to the plan of a data set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mcore_longctx.recipe.values import TokenCount

__all__ = ["AugmentSection", "ChunkSet", "DataSection", "DocumentSource", "LengthSampling", "SentenceSection"]

_MOST_PIECES = 1024  # of a document: utk makes a label for every piece of a sample, and two knots for every cut
_MOST_COPIES = 1_000_000  # of a document: each is drawn by itself, in memory


@dataclass(frozen=True, kw_only=True)
class ChunkSet:
    """Pieces of exactly `length` tokens, each from one document (mode `prolong`)."""

    length: TokenCount
    share: float | None = None  # share of the token budget


@dataclass(frozen=True, kw_only=True)
class DocumentSource:
    """One source of documents: a file (JSONL plain or packed, Parquet, text), or a folder of them."""

    name: str
    path: Path
    share: float | None = None  # share of the token budget; None: see DataSection.mode
    text_field: str = "text"
    id_field: str = "id"
    document: Literal["record", "folder"] = "record"  # folder: each folder directly below `path` is one document (a repository)
    chunks: tuple[ChunkSet, ...] = ()  # mode prolong: its documents in chunks; a document goes to the longest that it fills

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable():  # bytes that are no UTF-8 are not printable either
            raise ValueError(f"{self.name!r} cannot be the name of a source; use letters, digits and the like")
        lengths = [chunk.length for chunk in self.chunks]
        if len(set(lengths)) < len(lengths):
            raise ValueError("two chunks have the same length")
        if self.chunks and self.share is not None:
            raise ValueError("share stands in the chunks of a source that has chunks")


@dataclass(frozen=True, kw_only=True)
class LengthSampling:
    """Length sampling inside each source: short documents are kept with a probability, long ones repeated, others dropped."""

    short_below: TokenCount = TokenCount(4096)
    keep_probability: float = 1.0
    long_above: TokenCount = TokenCount(8192)
    repetition: float = 1.0
    min_length: TokenCount = TokenCount(1)  # shorter documents are dropped
    max_length: TokenCount | None = None  # longer ones are dropped

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep_probability <= 1.0:
            raise ValueError(f"keep_probability is {self.keep_probability}, expected 0 to 1")
        if not 1.0 <= self.repetition <= _MOST_COPIES:  # not for nan either
            raise ValueError(f"repetition is {self.repetition}, expected 1 to {_MOST_COPIES:,}")
        for name in ("short_below", "long_above", "min_length"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):,}, expected 0 or more")
        if self.short_below > self.long_above:
            raise ValueError(f"short_below {self.short_below:,} is larger than long_above {self.long_above:,}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length:,} is below min_length {self.min_length:,}")


@dataclass(frozen=True, kw_only=True)
class AugmentSection:
    """Documents of a sample cut into pieces that are spread over the sample.

    cip: chunk-interleaved (LongSkywork, arXiv 2406.00605): D1.1 D2.1 ... D1.2 D2.2 ..., every token kept.
    utk: Untie the Knots (arXiv 2409.04774): pieces shuffled, each document's in order; labels, knots and a backtrace of the labels.
    """

    type: Literal["cip", "utk"]
    chunks: tuple[int, ...] = (2,)  # pieces of a document; utk draws one of these for each document, cip takes one number
    probability: float = 1.0  # share of the samples that are changed (utk: 0.8 was best)
    documents_per_group: int | None = None  # cip: documents that are interleaved with each other; None: all of the sample
    keep_order: bool = True  # utk: pieces of a document keep their order
    backtrace: bool = True  # utk: after its last piece, the labels of a document in order, learned

    def __post_init__(self) -> None:
        if not self.chunks or min(self.chunks) < 1 or max(self.chunks) < 2:
            raise ValueError(f"chunks is {list(self.chunks)}, expected numbers of pieces, one of them 2 or more")
        if max(self.chunks) > _MOST_PIECES:
            raise ValueError(f"chunks is {list(self.chunks)}, expected at most {_MOST_PIECES:,} pieces of a document")
        if self.type == "cip" and len(self.chunks) != 1:
            raise ValueError(f"chunks is {list(self.chunks)}, cip takes one number")
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"probability is {self.probability}, expected more than 0, at most 1")
        if self.documents_per_group is not None and self.documents_per_group < 2:
            raise ValueError(f"documents_per_group is {self.documents_per_group}, expected 2 or more")
        if self.type == "cip" and not (self.keep_order and self.backtrace):
            raise ValueError("keep_order and backtrace belong to utk")
        if self.type == "utk" and self.documents_per_group is not None:
            raise ValueError("documents_per_group belongs to cip")


@dataclass(frozen=True, kw_only=True)
class SentenceSection:
    """Of each document only sentences that hold impactful tokens, until a share of its tokens is left (LongRecipe, arXiv 2409.00509).

    digits: sentences with a digit, as the released code. logit_offset: sentences with the tokens whose logits a long training moved
    most, by the table that `data token-offsets` wrote from two models, as the paper.
    """

    rule: Literal["digits", "logit_offset"]
    keep: float = 0.3  # share of a document's tokens
    offsets: Path | None = None  # logit_offset: the table

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep is {self.keep}, expected more than 0, at most 1")
        if (self.rule == "logit_offset") != (self.offsets is not None):
            raise ValueError("offsets names the table of rule logit_offset, and of no other")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """A data set: documents for `pretrain` stages, chats for `sft` stages.

    mode `ultralong`: a source without a share keeps the part of the tokens that it holds after length sampling; `fu`: the part that
    it holds before (Fu et al., arXiv 2402.10171: lengths shift inside a source, the mixture stays); `prolong` (arXiv 2410.02660):
    as `ultralong`, and sources may have chunks.
    """

    sources: tuple[DocumentSource, ...]
    mode: Literal["ultralong", "fu", "prolong"] = "ultralong"
    length_sampling: LengthSampling = field(default_factory=LengthSampling)
    separator: str = "<s>"  # between documents; with separator_kind bos_eos and none it has no meaning
    separator_kind: Literal["text", "token", "bos_eos", "none"] = "text"  # text: ordinary characters; token: a control token
    separator_loss: bool = True  # whether separators are learned
    packing: Literal["concatenate", "single", "best_fit", "intact"] = "concatenate"
    repeat_to_fill: bool = False  # take documents again where a source is too small for its share; else that is an error
    max_bad: int = 0  # records that cannot be read and are left out
    augment: AugmentSection | None = None  # what is done with the documents of a sample
    sentences: SentenceSection | None = None  # which sentences of a document are taken
    prompt_loss: Literal["none", "long_only", "all"] = "none"  # chats: prompts that are learned too (Llama 2 Long)
    prompt_loss_from: TokenCount = TokenCount(4096)  # long_only: prompts of at least so many tokens

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty")
        if len(set(names)) < len(names):
            raise ValueError(f"two sources share the name {next(n for n in names if names.count(n) > 1)!r}")
        shares = [chunk.share for source in self.sources for chunk in source.chunks or (source,)]
        if shares.count(None) not in (0, len(shares)) or not all(share is None or 0 < share < math.inf for share in shares):
            raise ValueError("give every source a positive share, or none")
        if self.mode != "prolong" and any(source.chunks for source in self.sources):
            raise ValueError("chunks belong to mode prolong")
        if self.separator_kind in ("text", "token") and not self.separator:
            raise ValueError("separator is empty; for nothing between documents use separator_kind none")
        if self.augment is not None and (self.packing == "single" or any(source.chunks for source in self.sources)):
            what = "packing single fills" if self.packing == "single" else "chunks fill"
            raise ValueError(f"augment {self.augment.type} mixes the documents of a sample, {what} samples with one document")
        if self.max_bad < 0:
            raise ValueError(f"max_bad is {self.max_bad}, expected 0 or more")
        if self.prompt_loss_from < 1:
            raise ValueError(f"prompt_loss_from is {self.prompt_loss_from}, expected 1 or more tokens")
        if self.prompt_loss != "long_only" and self.prompt_loss_from != 4096:
            raise ValueError(f"prompt_loss_from belongs to prompt_loss long_only, it is {self.prompt_loss}")

    @property
    def prompt_loss_tokens(self) -> int | None:
        """Prompts of at least so many tokens are learned; None: none are."""
        return {"none": None, "long_only": int(self.prompt_loss_from), "all": 1}[self.prompt_loss]

    @property
    def separator_text(self) -> str:
        """What stands between documents, in words."""
        if self.separator_kind in ("bos_eos", "none"):
            return {"bos_eos": "BOS and EOS", "none": "nothing"}[self.separator_kind]
        return f"the {self.separator_kind} {self.separator!r}"
