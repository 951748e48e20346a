"""What a family is: names, a table, and how its config.json is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mcore_longctx.families.shape import ModelShape
from mcore_longctx.families.table import Line

__all__ = ["Family"]


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: as in config.json.
        architectures: class names that config.json may give; the first is what transformers calls the model.
        table: its tensors.
        read_shape: (config.json, where it stands) -> sizes, whose `family` names the table that their tensors follow. Raises
            ConfigError for what Megatron's dense decoder cannot express.
        exported_as: keys of config.json that an export gets, where it can be read without the code that the original came with.
    """

    model_type: str
    architectures: tuple[str, ...]
    table: tuple[Line, ...]
    read_shape: Callable[[Mapping[str, Any], object], ModelShape]
    exported_as: Mapping[str, Any] = field(default_factory=dict)
