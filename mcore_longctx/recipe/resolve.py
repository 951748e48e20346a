"""What a recipe means for the model at hand: its sizes, its own rope, the rope that it is trained with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.families import ModelShape, read_shape
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.rope import RopeScaling, read_hf_rope
from mcore_longctx.rope.spec import MissingField, usable_rope

__all__ = ["Resolved", "resolve"]

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size")


@dataclass(frozen=True)
class Resolved:
    """Sizes and ropes of a run. `own_rope` is the one that the model's weights come with."""

    shape: ModelShape
    own_rope: RopeScaling
    rope: RopeScaling
    model_found: bool


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
    rope = _rope(file, own_rope)
    _check_layouts(file, shape)
    _check_lengths(file, rope)
    return Resolved(shape, own_rope, rope, found)


def _rope(file: RecipeFile, own_rope: RopeScaling) -> RopeScaling:
    """The recipe's rope. What cannot be trained with or written for others is refused before anything is spent on it."""
    section = file.recipe.rope
    try:
        if section.type == "abf" and section.rope_theta is None:
            raise MissingField("rope_theta", "type abf is a changed base")
        return usable_rope(section.scaling(own_rope), own_rope)
    except ValueError as error:
        raise ConfigError(str(error), where=file.where("rope")) from None
    except MissingField as error:
        raise ConfigError(error.what, where=file.where(f"rope.{error.field}")) from None
    except LongctxError as error:
        where = error.where if error.where is not None else file.where("rope")
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


def _check_lengths(file: RecipeFile, rope: RopeScaling) -> None:
    limit = rope.resolved_max_position_embeddings
    lengths = [(f"stages.{stage.name}.seq_length", stage.seq_length) for stage in file.recipe.stages]
    evaluate = file.recipe.evaluate
    if evaluate.needle is not None:
        lengths += [("evaluate.needle.lengths", length) for length in evaluate.needle.lengths]
    if evaluate.loss_by_position is not None:
        lengths.append(("evaluate.loss_by_position.seq_length", evaluate.loss_by_position.seq_length))
    for name, length in lengths:
        if limit is not None and length > limit:
            raise ConfigError(
                f"{length:,} tokens, but the rope reaches {limit:,}",
                where=file.where(name),
                fix="raise rope.factor or shorten it",
            )
