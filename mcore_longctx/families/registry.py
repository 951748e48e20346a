"""The families that are known, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.family import Family
from mcore_longctx.families.llama import LLAMA
from mcore_longctx.families.shape import ModelShape
from mcore_longctx.families.table import MappedTensor, expand

__all__ = ["FAMILIES", "model_tensors", "read_shape"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA,)}


def read_shape(config: Mapping[str, Any], *, where: object = "config.json") -> ModelShape:
    """The sizes of the model that a Hugging Face config.json describes.

    Raises:
        ConfigError: another family, a missing or impossible size, or a feature that a Megatron decoder cannot express.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError(
            f"model_type {config.get('model_type')!r} is not supported", where=where, fix=f"known are {', '.join(FAMILIES)}"
        )
    return family.read_shape(config, where)


def model_tensors(shape: ModelShape) -> list[MappedTensor]:
    """Every weight of a model of these sizes, in the order of the layers. Raises as `expand`."""
    return expand(FAMILIES[shape.family].table, shape)
