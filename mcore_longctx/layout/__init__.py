"""Index mathematics without tensors: zigzag order, context-parallel slices, divisibility."""

from mcore_longctx.layout.zigzag import check_seq_length, zigzag_chunks, zigzag_owner, zigzag_positions

__all__ = ["check_seq_length", "zigzag_chunks", "zigzag_owner", "zigzag_positions"]
