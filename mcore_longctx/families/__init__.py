"""Model families: sizes from a config.json, and the table that maps Hugging Face tensors to Megatron's. No numpy, no torch."""

from mcore_longctx.families.family import Family
from mcore_longctx.families.registry import FAMILIES, config_for_export, family_of, model_tensors, read_shape, register
from mcore_longctx.families.shape import ModelShape
from mcore_longctx.families.table import Line, MappedTensor, RowBlock, expand, extra_state_keys, hf_shapes

__all__ = [
    "FAMILIES",
    "Family",
    "Line",
    "MappedTensor",
    "ModelShape",
    "RowBlock",
    "config_for_export",
    "expand",
    "extra_state_keys",
    "family_of",
    "hf_shapes",
    "model_tensors",
    "read_shape",
    "register",
]
