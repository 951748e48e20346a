"""The families that are known, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import check_architecture
from mcore_longctx.families.llama import LLAMA
from mcore_longctx.families.mistral import MISTRAL
from mcore_longctx.families.qwen2 import QWEN2
from mcore_longctx.families.qwen3 import QWEN3
from mcore_longctx.families.shape import ModelShape
from mcore_longctx.families.skywork import SKYWORK
from mcore_longctx.families.table import MappedTensor, expand

__all__ = ["FAMILIES", "config_for_export", "family_of", "model_tensors", "read_shape", "register"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, SKYWORK)}


def register(family: Family) -> None:
    """Make a family known to this process: `docs/families.md`.

    Raises:
        ConfigError: another family has this model_type.
    """
    if FAMILIES.setdefault(family.model_type, family) is not family:
        raise ConfigError(f"model_type {family.model_type!r} is registered already", fix="a family has one table")


def family_of(config: Mapping[str, Any], *, where: object = "config.json") -> Family:
    """The family of a model that a Hugging Face config.json describes. Raises ConfigError where it is not known."""
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        found = "is missing" if name is None else f"{str(name)[:60]!r} is not supported"
        raise ConfigError(f"model_type {found}", where=where, fix=f"known are {', '.join(FAMILIES)}; docs/families.md adds one")
    return family


def read_shape(config: Mapping[str, Any], *, where: object = "config.json") -> ModelShape:
    """The sizes of the model that a Hugging Face config.json describes.

    Raises:
        ConfigError: another family, a missing or impossible size, or a feature that a Megatron decoder cannot express.
    """
    family = family_of(config, where=where)
    check_architecture(config, where, family.architectures)
    return family.read_shape(config, where)


def model_tensors(shape: ModelShape) -> list[MappedTensor]:
    """Every weight of a model of these sizes, in the order of the layers. Raises as `expand`, and ConfigError for an unknown family."""
    return expand(family_of({"model_type": shape.family}).table, shape)


def config_for_export(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as an export holds it: without the settings that only a model's own code could read."""
    return {**config, **family_of(config).exported_as}
