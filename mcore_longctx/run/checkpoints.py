"""Where the checkpoints of a run lie: `checkpoints/base`, `checkpoints/STAGE/iter_...`, `checkpoints/STAGE-merged`."""

from __future__ import annotations

from pathlib import Path

from mcore_longctx.errors import ConfigError
from mcore_longctx.manifest import MANIFEST
from mcore_longctx.recipe.schema import Recipe

__all__ = ["final_checkpoint", "merged_checkpoint", "newest_checkpoint"]


def final_checkpoint(recipe: Recipe, name: str) -> Path:
    """What `base` or a stage ends with, for whoever goes on from it: the merged checkpoint where there is to be one, else its newest.

    Raises:
        ConfigError: it is not there yet.
    """
    if name == "base":
        return recipe.run_folder / "checkpoints" / "base"
    stage = next(stage for stage in recipe.stages if stage.name == name)
    if stage.merge is None:
        return newest_checkpoint(recipe.run_folder / "checkpoints" / name)
    merged = merged_checkpoint(recipe, name)
    if not (merged / MANIFEST).is_file():
        raise ConfigError("not merged yet", where=merged, fix=f"mcore-longctx run RECIPE --steps merge-{name}")
    return merged


def merged_checkpoint(recipe: Recipe, stage_name: str) -> Path:
    """The folder that the merge after a stage makes."""
    return recipe.run_folder / "checkpoints" / f"{stage_name}-merged"


def newest_checkpoint(folder: Path) -> Path:
    """The newest finished checkpoint of a stage.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(path for path in folder.glob("iter_*") if (path / MANIFEST).is_file())
    if not found:
        raise ConfigError("no finished checkpoint here", where=folder, fix="run the training stage first")
    return found[-1]
