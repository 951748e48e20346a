"""`run.json`: what each step of a run was made from and how it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from mcore_longctx.errors import ConfigError
from mcore_longctx.manifest import sha256_file, versions, write_atomic
from mcore_longctx.recipe.load import dump_recipe
from mcore_longctx.recipe.schema import Recipe
from mcore_longctx.run.steps import Step

__all__ = ["Journal"]

_SAFETY = ("save_interval", "keep_checkpoints", "async_save", "distributed_timeout_minutes", "max_budget_share")

_BEFORE_THE_FIRST_STEP = (".lock", "recipe.yaml", "slurm", "logs")  # `launch` writes them


class Journal:
    """`run.json`: what each step was made from and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.steps = {row["name"]: row for row in json.loads(self.path.read_text(encoding="utf-8"))["steps"]}
            except (ValueError, KeyError, TypeError):
                raise ConfigError("damaged", where=self.path, fix="use another output folder") from None
        elif any(entry.name not in _BEFORE_THE_FIRST_STEP for entry in folder.iterdir()):
            raise ConfigError(
                "output folder is already there and is not a run folder (no run.json)", where=folder, fix="choose another output"
            )

    def stamp(self, step: Step, recipe: Recipe) -> dict[str, Any]:
        """What a step is made from: recipe values by dotted path, and a sha256 per input file."""
        known = {name: row for past in self.steps.values() for name, row in past.get("inputs", {}).get("files", {}).items()}
        return {
            "recipe": _values(step, recipe),
            "files": {str(path): _file_stamp(path, known.get(str(path))) for path in _all_files(step.files)},
        }

    def refuse_changes(self, step: Step, stamp: dict[str, Any], recipe: Recipe) -> None:
        """Raise ConfigError when a finished or interrupted step was made from other inputs."""
        past = self.steps.get(step.name, {}).get("inputs")
        if past is None:
            return
        self._compare_values(step, past["recipe"], stamp["recipe"], recipe)
        old_files = {name: row["sha256"] for name, row in past["files"].items()}
        new_files = {name: row["sha256"] for name, row in stamp["files"].items()}
        for name in sorted(old_files.keys() | new_files.keys()):
            if old_files.get(name) != new_files.get(name):
                verb = "is new" if name not in old_files else "is gone" if name not in new_files else "has changed"
                raise ConfigError(
                    f"{name} {verb} since step {step.name} ran", where=self.path, fix="restore it, or use another output folder"
                )

    def refuse_changed_values(self, step: Step, recipe: Recipe) -> None:
        """The same for the values of the recipe alone: input files are not looked at, they may be elsewhere."""
        past = self.steps.get(step.name, {}).get("inputs")
        if past is not None:
            self._compare_values(step, past["recipe"], _values(step, recipe), recipe)

    def _compare_values(self, step: Step, past: dict[str, Any], now: dict[str, Any], recipe: Recipe) -> None:
        later = {key for key in now.keys() - past.keys() if _is_default_of_known(key, past, recipe)}
        for key in sorted(past.keys() | now.keys() - later):
            if past.get(key) != now.get(key):
                raise ConfigError(
                    f"{key} was {past.get(key)!r} when step {step.name} ran, it is {now.get(key)!r} now",
                    where=self.path,
                    fix="set it back, or use another output folder",
                )

    def is_done(self, step: Step) -> bool:
        """Whether a step ended well and what it left is still there."""
        return self.steps.get(step.name, {}).get("state") == "done" and all(path.exists() for path in step.outputs)

    def begin(self, step: Step, stamp: dict[str, Any]) -> None:
        """Note that a step has started."""
        seconds = self.steps.get(step.name, {}).get("seconds", 0.0)
        self.steps[step.name] = {
            "name": step.name,
            "state": "running",
            "about": list(step.about),
            "inputs": stamp,
            "seconds": seconds,
        }
        self._write()

    def end(self, step: Step, state: str, seconds: float, facts: dict[str, Any]) -> None:
        """Note how a step ended. `seconds` add up over interrupted attempts."""
        outputs = [str(path.relative_to(self.folder)) for path in step.outputs]
        earlier = float(self.steps[step.name].get("seconds", 0.0))
        self.steps[step.name] |= {"state": state, "seconds": round(earlier + seconds, 1), "outputs": outputs, **facts}
        self._write()

    def _write(self) -> None:
        text = {"format": 1, "name": self.folder.name, "versions": versions(), "steps": list(self.steps.values())}
        write_atomic(self.path, json.dumps(text, indent=1) + "\n")


def _values(step: Step, recipe: Recipe) -> dict[str, Any]:
    flat = dict(_flatten(yaml.safe_load(dump_recipe(recipe)), ""))
    return {key: value for key, value in flat.items() if _decides(key, step)}


def _decides(key: str, step: Step) -> bool:
    """Whether a value of the recipe is part of what a step makes.

    What is kept and recomputed is memory and speed; how and how often is saved, and how long a rank waits for another, is safety.
    """
    return (
        ".activations." not in key
        and not (key.startswith(f"stages.{step.stage}.merge.") and step.name == f"train-{step.stage}")  # comes after it
        and key.rsplit(".", maxsplit=1)[-1] not in _SAFETY
        and any(key == k or key.startswith(f"{k}.") for k in step.keys)
    )


def _is_default_of_known(key: str, past: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a step that does not name `key` was made by a version that had no such key, and so did what its default does.

    Its section must have been there, and a key that may be null is none: null is not written down.
    """
    section, _, name = key.rpartition(".")
    if not any(other.startswith(f"{section}.") for other in past):
        return False
    owner: Any = recipe
    for part in section.split(".") if section else ():
        if isinstance(owner, tuple):
            owner = next((item for i, item in enumerate(owner) if getattr(item, "name", str(i)) == part), None)
        elif isinstance(owner, dict):
            owner = owner.get(part)
        else:
            owner = getattr(owner, part, None)
    if not is_dataclass(owner) or isinstance(owner, type):
        return False
    may_be_null = type(None) in get_args(get_type_hints(type(owner))[name])
    return not may_be_null and any(field.name == name and field.default == getattr(owner, name) for field in fields(owner))


def _flatten(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Dotted paths and leaves; a list of named sections is addressed by name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _flatten(item, f"{at}.{item.get('name', i)}")
    else:
        yield at, value


def _all_files(paths: tuple[Path, ...]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            yield path


def _file_stamp(path: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Size, time and sha256; an unchanged size and time spare reading a large file again."""
    stat = path.stat()
    if known is not None and (known["bytes"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        return known
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256_file(path)}
