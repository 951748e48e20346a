"""How heads divide over the ranks of an `a2a` exchange."""

from __future__ import annotations

import math

from mcore_longctx.errors import LayoutError

__all__ = ["key_head_replicas"]


def key_head_replicas(query_heads: int, key_heads: int, ranks: int, *, where: object = None) -> int:
    """How often each key head is repeated so that `ranks` ranks get equally many, whole groups of heads.

    1 where the key heads divide by the ranks. All numbers are those of one tensor-parallel rank.

    >>> key_head_replicas(8, 2, 4)
    2

    Raises:
        LayoutError: the heads cannot be divided.
    """
    replicas = _replicas(query_heads, key_heads, ranks)
    if replicas is None:
        works = [str(n) for n in range(1, query_heads + 1) if _replicas(query_heads, key_heads, n)]
        raise LayoutError(
            f"a2a over {ranks} ranks cannot divide {query_heads} query heads and {key_heads} key heads (of one tensor-parallel rank)",
            where=where,
            fix=f"use a2a over {', '.join(works)} ranks, and p2p for the rest (a2a+p2p)",
        )
    return replicas


def _replicas(query_heads: int, key_heads: int, ranks: int) -> int | None:
    replicas = ranks // math.gcd(key_heads, ranks)
    per_group = query_heads // key_heads
    return replicas if query_heads % ranks == 0 and per_group % replicas == 0 else None
