"""Index mathematics without tensors: zigzag order, context-parallel slices, divisibility."""

from mcore_longctx.layout.packed import PackLayout, pack_layout
from mcore_longctx.layout.zigzag import check_seq_length, zigzag_chunks, zigzag_owner, zigzag_positions

__all__ = ["PackLayout", "check_seq_length", "pack_layout", "zigzag_chunks", "zigzag_owner", "zigzag_positions"]
