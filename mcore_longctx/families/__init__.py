"""Model families: sizes from a config.json, and the table that maps Hugging Face tensors to Megatron's. No numpy, no torch."""

from mcore_longctx.families.family import Family
from mcore_longctx.families.registry import FAMILIES, model_tensors, read_shape
from mcore_longctx.families.shape import ModelShape
from mcore_longctx.families.table import Line, MappedTensor, RowBlock, expand, extra_state_keys, hf_shapes

__all__ = [
    "FAMILIES",
    "Family",
    "Line",
    "MappedTensor",
    "ModelShape",
    "RowBlock",
    "expand",
    "extra_state_keys",
    "hf_shapes",
    "model_tensors",
    "read_shape",
]
