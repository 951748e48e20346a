"""From chosen documents to samples: where each piece, each separator and the padding stand. Signatures; the code follows."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Separator"]


@dataclass(frozen=True, kw_only=True)
class Separator:
    """Token ids that stand beside documents.

    With `before`, every document is wrapped: `before` + document + `after` (BOS and EOS). Without, `after` stands between documents:
    behind every one but the last. Both empty: nothing.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    loss: bool = True  # whether they are learned
