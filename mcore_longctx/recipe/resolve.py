"""What a recipe means for the model at hand: its sizes, its own rope, the rope that each stage trains with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.families import ModelShape, read_shape
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.model import RopeSection
from mcore_longctx.rope import RopeScaling, read_hf_rope
from mcore_longctx.rope.spec import MissingField, usable_rope

__all__ = ["Resolved", "resolve"]

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")


@dataclass(frozen=True)
class Resolved:
    """Sizes and ropes of a run. `own_rope` is the one that the model's weights come with."""

    shape: ModelShape
    own_rope: RopeScaling
    stage_ropes: Mapping[str, RopeScaling]  # by stage, in the order of the recipe
    model_found: bool

    @property
    def rope(self) -> RopeScaling:
        """The rope that the run ends with: the last stage's."""
        return list(self.stage_ropes.values())[-1]

    def rope_of(self, checkpoint: str) -> RopeScaling:
        """The rope that a checkpoint of the run carries: `base`, or a stage's name."""
        return self.own_rope if checkpoint == "base" else self.stage_ropes[checkpoint]


def resolve(file: RecipeFile, *, need_model: bool = True) -> Resolved:
    """Read the model's config.json and check the recipe against it.

    Args:
        file: the recipe.
        need_model: False lets a dry run work from the sizes in the recipe when the model's folder is not there.

    Raises:
        ConfigError, LayoutError: sizes that disagree or do not divide; a sequence longer than the rope reaches; no model.
    """
    recipe = file.recipe
    path = recipe.model.path / "config.json"
    found = path.is_file()
    if found:
        config = _read_json(path)
        shape = read_shape(config, where=path)
        own_rope = read_hf_rope(config, where=path)
        _compare_sizes(file, shape)
    elif need_model:
        raise ConfigError(
            "no config.json here: not a Hugging Face model folder", where=file.where("model.path") + f" ({recipe.model.path})"
        )
    else:
        shape = _shape_of_recipe(file)
        if recipe.rope.rope_theta is None:
            raise ConfigError(
                "missing; without the model's config.json the base must stand in the recipe", where=file.where("rope.rope_theta")
            )
        own_rope = RopeScaling(type="none", head_dim=shape.kv_channels, rope_theta=recipe.rope.rope_theta)
    rope = _rope(file, recipe.rope, "rope", own_rope)
    ropes = {
        stage.name: rope if stage.rope is None else _rope(file, stage.rope, f"stages.{stage.name}.rope", own_rope)
        for stage in recipe.stages
    }
    _check_layouts(file, shape)
    _check_lengths(file, ropes)
    return Resolved(shape, own_rope, ropes, found)


def _rope(file: RecipeFile, section: RopeSection, at: str, own_rope: RopeScaling) -> RopeScaling:
    """The rope of a section. What cannot be trained with or written for others is refused before anything is spent on it."""
    try:
        if section.type == "abf" and section.rope_theta is None:
            raise MissingField("rope_theta", "type abf is a changed base")
        return usable_rope(section.scaling(own_rope), own_rope)
    except ValueError as error:
        raise ConfigError(str(error), where=file.where(at)) from None
    except MissingField as error:
        raise ConfigError(error.what, where=file.where(f"{at}.{error.field}")) from None
    except LongctxError as error:
        where = error.where if error.where is not None else file.where(at)
        raise ConfigError(error.what, where=where, fix=error.fix) from None


def _read_json(path: Any) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot be read as JSON: {error}", where=path) from None
    if not isinstance(value, dict):
        raise ConfigError("is not a JSON object", where=path)
    return value


def _compare_sizes(file: RecipeFile, shape: ModelShape) -> None:
    for name in _SIZES:
        stated = getattr(file.recipe.model, name)
        if stated is not None and stated != getattr(shape, name):
            raise ConfigError(
                f"{stated:,} here, {getattr(shape, name):,} in the model's config.json",
                where=file.where(f"model.{name}"),
                fix="remove it or correct it",
            )


def _shape_of_recipe(file: RecipeFile) -> ModelShape:
    sizes = {name: getattr(file.recipe.model, name) for name in _SIZES}
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        raise ConfigError(
            f"{file.recipe.model.path} has no config.json, and the recipe does not give {missing[0]}",
            where=file.where("model"),
            fix="give model.path",
        )
    return ModelShape(**sizes)


def _check_layouts(file: RecipeFile, shape: ModelShape) -> None:
    layouts = {f"stages.{stage.name}.parallel": stage.parallel for stage in file.recipe.stages}
    layouts["evaluate.parallel"] = file.recipe.evaluate.parallel
    backend = file.recipe.model.backend
    for name, parallel in layouts.items():
        where = file.where(name)
        shape.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, where=where)
        parallel.check_attention(
            shape.num_layers, shape.num_attention_heads, shape.num_query_groups, backend=backend, where=where
        )


def _check_lengths(file: RecipeFile, ropes: Mapping[str, RopeScaling]) -> None:
    """Each stage within its own rope; what is measured within the rope that the run ends with."""
    recipe = file.recipe
    lengths = []
    for stage in recipe.stages:
        lengths.append((f"stages.{stage.name}.seq_length", stage.seq_length, stage.name))
        if stage.positions is not None:
            lengths.append((f"stages.{stage.name}.positions.target", stage.positions.target, stage.name))
    evaluate, last = recipe.evaluate, recipe.stages[-1].name
    if evaluate.needle is not None:
        lengths += [("evaluate.needle.lengths", length, last) for length in evaluate.needle.lengths]
    if evaluate.ruler is not None:
        lengths += [("evaluate.ruler.lengths", length, last) for length in evaluate.ruler.lengths]
    if evaluate.loss_by_position is not None:
        lengths.append(("evaluate.loss_by_position.seq_length", evaluate.loss_by_position.seq_length, last))
    for name, length, stage_name in lengths:
        limit = ropes[stage_name].resolved_max_position_embeddings
        if limit is not None and length > limit:
            own = any(stage.name == stage_name and stage.rope is not None for stage in recipe.stages)
            raise ConfigError(
                f"{length:,} tokens, but the rope reaches {limit:,}",
                where=file.where(name),
                fix=f"raise {f'stages.{stage_name}.' if own else ''}rope.factor or shorten it",
            )
