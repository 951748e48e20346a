"""What stands between documents, as ids: encoded alone, because text joined before encoding merges across the seam."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_longctx.data.planning.layout import Separator
from mcore_longctx.data.tokens.job import TokenJob
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.schema import DataSection

if TYPE_CHECKING:  # most plans need no tokenizer library
    from mcore_longctx.data.tokenizers import Tokenizer

__all__ = ["job_tokenizer", "make_separator"]


def make_separator(section: DataSection, job: TokenJob) -> Separator:
    """What stands between documents, as ids. The tokenizer is loaded only for a separator of one's own.

    Raises:
        DataError: the tokenizer has no such control token, or names no BOS or EOS.
        ConfigError: the tokenizer has changed since the tokens were made.
    """

    def role(name: str) -> tuple[int, ...]:
        if name not in job.ids:
            raise DataError(f"separator_kind bos_eos: no {name} is named", where=job.tokenizer, fix="use another separator")
        return tuple(job.ids[name])

    loss = section.separator_loss
    if section.separator_kind == "none":
        return Separator(loss=loss)
    if section.separator_kind == "bos_eos":
        return Separator(before=role("bos_token"), after=role("eos_token"), loss=loss)
    text = section.separator
    if section.separator_kind == "text" and text in job.ids:
        return Separator(after=tuple(job.ids[text]), loss=loss)
    tokenizer = job_tokenizer(job)
    if section.separator_kind == "text":
        return Separator(after=tuple(int(token) for token in tokenizer.encode(text)), loss=loss)
    token = tokenizer.control_id(text)
    if token is None:
        raise DataError(
            f"separator_kind token: {text!r} is no token of its own", where=job.tokenizer, fix="use another separator"
        )
    return Separator(after=(token,), loss=loss)


def job_tokenizer(job: TokenJob) -> Tokenizer:
    """The tokenizer that the tokens were made with.

    Raises:
        DataError: it is gone.
        ConfigError: it has changed since.
    """
    from mcore_longctx.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(job.tokenizer)
    if tokenizer.sha256 != job.tokenizer_sha256:
        raise ConfigError("has changed since the tokens were made", where=job.tokenizer, fix="tokenize into another folder")
    return tokenizer
