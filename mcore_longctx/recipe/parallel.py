"""The layout of one job over tensor-, pipeline-, context- and data-parallel ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mcore_longctx.errors import LayoutError
from mcore_longctx.layout.heads import key_head_replicas

__all__ = ["CpCommType", "Parallel"]

CpCommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Layout of one job. `data_parallel_size` is what is left of the ranks: world = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    cp_comm_type: CpCommType | tuple[CpCommType, ...] = "p2p"  # one for all layers, or a list with one for each
    hierarchical_context_parallel_sizes: tuple[int, ...] | None = None  # a2a+p2p: [ranks of the a2a, ranks of the ring]

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "data_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size above 1")
        if not self.cp_comm_types or not set(self.cp_comm_types) <= set(get_args(CpCommType)):
            raise ValueError(
                f"cp_comm_type is {self.cp_comm_type!r}, expected {', '.join(get_args(CpCommType))}, or one for each layer"
            )
        sizes, is_hierarchical = self.hierarchical_context_parallel_sizes, "a2a+p2p" in self.cp_comm_types
        if is_hierarchical and sizes is None and self.context_parallel_size > 1:
            raise ValueError(
                "cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes: [ranks of the a2a, ranks of the ring]"
            )
        if sizes is not None and not is_hierarchical:
            raise ValueError("hierarchical_context_parallel_sizes are given, but cp_comm_type is not a2a+p2p")
        if sizes is not None and (len(sizes) != 2 or min(sizes) < 1 or math.prod(sizes) != self.context_parallel_size):
            raise ValueError(
                f"hierarchical_context_parallel_sizes are {list(sizes)}, expected two sizes whose product is "
                f"context_parallel_size {self.context_parallel_size}"
            )

    @property
    def cp_comm_types(self) -> tuple[CpCommType, ...]:
        """The exchanges that are used: one for all layers, or one for each."""
        return (self.cp_comm_type,) if isinstance(self.cp_comm_type, str) else tuple(self.cp_comm_type)

    @property
    def attention_neighbours(self) -> int:
        """Context-parallel ranks that share the heads of their rows in every layer: `inner` of `layout.pack_layout`."""
        sizes = self.hierarchical_context_parallel_sizes
        of_kind = {"p2p": 1, "all_gather": 1, "a2a": self.context_parallel_size, "a2a+p2p": sizes[0] if sizes is not None else 1}
        return min(of_kind[kind] for kind in self.cp_comm_types)

    def check_attention(
        self,
        num_layers: int,
        num_attention_heads: int,
        num_query_groups: int,
        *,
        backend: Literal["local", "te"] = "local",
        where: object = None,
    ) -> None:
        """Raise LayoutError unless the exchanges fit the model: one for each layer, heads that divide over the ranks of an a2a.

        Our exchange repeats key heads where there are fewer of them than ranks. TransformerEngine's (`backend: te`) repeats none: it
        asserts that query and key heads both divide.
        """
        tp, sizes = self.tensor_model_parallel_size, self.hierarchical_context_parallel_sizes
        if not isinstance(self.cp_comm_type, str) and len(self.cp_comm_type) != num_layers:
            raise LayoutError(
                f"cp_comm_type lists {len(self.cp_comm_type)} exchanges, the model has {num_layers} layers", where=where
            )
        of_kind = {"a2a": self.context_parallel_size, "a2a+p2p": sizes[0] if sizes is not None else 1}
        for kind in sorted({kind for kind in self.cp_comm_types if kind in of_kind}):
            query_heads, key_heads, ranks = num_attention_heads // tp, num_query_groups // tp, of_kind[kind]
            if key_head_replicas(query_heads, key_heads, ranks, where=where) > 1 and backend == "te":
                works = ", ".join(str(size) for size in range(1, key_heads + 1) if key_heads % size == 0)
                raise LayoutError(
                    f"TransformerEngine's a2a over {ranks} ranks cannot divide {key_heads} key heads (of one tensor-parallel rank)",
                    where=where,
                    fix=f"use a2a over {works} ranks, and p2p for the rest (a2a+p2p), or model.backend=local, which repeats key heads",
                )

    @property
    def world_size(self) -> int:
        """Ranks that the layout needs."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    def describe(self) -> str:
        """For example `TP 8 (SP) x PP 1 x CP 16 p2p x DP 2 = 256 ranks`."""
        sp = " (SP)" if self.sequence_parallel else ""
        sizes = self.hierarchical_context_parallel_sizes
        hierarchy = f" ({sizes[0]} x {sizes[1]})" if sizes is not None else ""
        kinds = "/".join(sorted(set(self.cp_comm_types)))
        comm = f" {kinds}{hierarchy}" if self.context_parallel_size > 1 else ""
        return (
            f"TP {self.tensor_model_parallel_size}{sp} x PP {self.pipeline_model_parallel_size} x CP {self.context_parallel_size}{comm}"
            f" x DP {self.data_parallel_size} = {self.world_size:,} ranks"
        )
