"""What a run folder holds, read for the report. A missing part is named, never an error; a damaged one is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import load_recipe
from mcore_longctx.recipe.schema import Recipe
from mcore_longctx.report.rows import (
    LOSS,
    METRICS,
    NEEDLE,
    RULER,
    SHORT_CONTEXT,
    SHORT_SUITE,
    Row,
    check_identity,
    read_rows,
)

__all__ = ["Column", "NeedleKind", "RunFolder", "SampleKey", "Window", "read_run_folder"]

SampleKey = tuple[int, float, int]
_PARTS = ("needle", "ruler", "loss_by_position", "short_context", "short_suite")  # files of a column; other folders hold caches


class NeedleKind(NamedTuple):
    """What is hidden (`passkey` or `sentence`), and whether one haystack holds the needles of all depths."""

    kind: str
    shared: bool

    @property
    def plural(self) -> str:
        """For example `pass keys`."""
        return "pass keys" if self.kind == "passkey" else "facts"


class Window(NamedTuple):
    """A stretch of held-out text. What is the same window in two columns has the same text, whatever its number in its file."""

    length: int
    start: int  # token of the held-out text
    text: str | None  # hash of the text; None in rows that do not say


@dataclass(frozen=True)
class Column:
    """One evaluated state of the model: a folder below `evaluate/`.

    Attributes:
        name: `before`, `scaled` or the name of a stage.
        label: what a reader calls it.
        needles: kind -> (length, depth, index) -> row.
        ruler: (task, length, index) -> row.
        loss_by_position: window -> row; the windows of all columns are of one length.
        short_context: the same at the base's own length.
        short_suite: (task, index) -> row.
    """

    name: str
    label: str
    needles: dict[NeedleKind, dict[SampleKey, Row]] = field(default_factory=dict)
    ruler: dict[tuple[str, int, int], Row] = field(default_factory=dict)
    loss_by_position: dict[Window, Row] = field(default_factory=dict)
    short_context: dict[Window, Row] = field(default_factory=dict)
    short_suite: dict[tuple[str, int], Row] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Not the base."""
        return self.name not in ("before", "scaled")


@dataclass(frozen=True)
class RunFolder:
    """Everything that the report shows. `missing` names what is not there, in words."""

    path: Path
    recipe: Recipe | None
    run: Mapping[str, Any]
    columns: list[Column]
    metrics: dict[str, list[Row]]
    cards: dict[str, Mapping[str, Any]]
    data: dict[str, Mapping[str, Any]]
    verify: Mapping[str, Any] | None
    missing: list[str]

    @property
    def name(self) -> str:
        """The recipe's name, or the folder's."""
        return self.recipe.name if self.recipe is not None else self.path.resolve().name

    @property
    def base(self) -> Column | None:
        """The base model as it is."""
        return next((column for column in self.columns if column.name == "before"), None)

    @property
    def final(self) -> Column | None:
        """The model after its last measured stage."""
        return next((column for column in reversed(self.columns) if column.is_trained), None)

    @property
    def needle_kinds(self) -> list[NeedleKind]:
        """Kinds of needles of any column, the one that most columns measured first: that one decides the verdict."""
        kinds = sorted({kind for column in self.columns for kind in column.needles})
        return sorted(kinds, key=lambda kind: -sum(kind in column.needles for column in self.columns))

    def needles(self, column: Column) -> dict[SampleKey, Row]:
        """A column's rows of the first kind of needles."""
        kinds = self.needle_kinds
        return column.needles.get(kinds[0], {}) if kinds else {}

    @property
    def original_length(self) -> int | None:
        """Tokens that the base model was made for."""
        rope = self.cards.get("base", {}).get("rope", {})
        length = rope.get("max_position_embeddings") or rope.get("original_max_position_embeddings")
        if length is None and self.recipe is not None:
            length = self.recipe.rope.original_max_position_embeddings
        return int(length) if length is not None else None

    @property
    def trained_length(self) -> int | None:
        """Tokens of the longest sequence that was trained on."""
        return max((int(stage.seq_length) for stage in self.recipe.stages), default=None) if self.recipe is not None else None


def read_run_folder(path: Path) -> RunFolder:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: no such folder, nothing of a run in it, or a damaged file (with its line).
    """
    if not path.is_dir():
        raise ConfigError("no such run folder", where=path)
    if not any((path / part).exists() for part in ("recipe.yaml", "run.json", "evaluate", "metrics")):
        raise ConfigError("not a run folder: no recipe.yaml, run.json, evaluate or metrics", where=path)
    missing: list[str] = []
    recipe = load_recipe(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else None
    if recipe is None:
        missing.append("recipe.yaml: what was asked for is not known")
    run = _read_json(path / "run.json")
    if run is None:
        missing.append("run.json: states, times and versions of the steps are not known")
    stages = [stage.name for stage in recipe.stages] if recipe is not None else _folders(path / "metrics", ".jsonl")
    return RunFolder(
        path=path,
        recipe=recipe,
        run=run or {},
        columns=_read_columns(path, recipe, missing),
        metrics=_read_metrics(path, stages, missing),
        cards=_read_cards(path, stages, missing),
        data=_read_data(path, stages, missing),
        verify=_read_verify(path, missing),
        missing=missing,
    )


def _read_columns(path: Path, recipe: Recipe | None, missing: list[str]) -> list[Column]:
    there = [
        name
        for name in _folders(path / "evaluate")
        if any((path / "evaluate" / name / f"{part}.jsonl").exists() for part in _PARTS)
    ]
    stages = [stage.name for stage in recipe.stages] if recipe is not None else []
    wanted = ["before", "scaled", *stages]
    measured = [name for name in [*wanted, *there] if name in there]
    names = list(dict.fromkeys([*(wanted if recipe is not None else []), *measured]))
    columns = []
    every = [_read_column(path / "evaluate" / name, name, _label(name, recipe)) for name in names]
    for name, column in zip(names, _of_one_length(every, missing), strict=True):
        absent, wanted_parts = _absent(column, recipe)
        if not (column.needles or column.ruler or column.loss_by_position or column.short_context or column.short_suite):
            if wanted_parts:
                missing.append(f"evaluate/{name}: {column.label} was not measured")
            continue
        missing.extend(f"evaluate/{name}: no {part}" for part in absent)
        columns.append(column)
    return columns


def _read_column(folder: Path, name: str, label: str) -> Column:
    paths = {part: folder / f"{part}.jsonl" for part in _PARTS}
    every = read_rows(
        paths["needle"], NEEDLE, lambda row: (_needle_kind(row), int(row["length"]), float(row["depth"]), int(row["index"]))
    )
    needles: dict[NeedleKind, dict[SampleKey, Row]] = {}
    for (kind, length, depth, index), row in every.items():
        needles.setdefault(kind, {})[length, depth, index] = row
    ruler = read_rows(paths["ruler"], RULER, lambda row: (str(row["task"]), int(row["length"]), int(row["index"])))
    loss = read_rows(paths["loss_by_position"], LOSS, _window)
    short = read_rows(paths["short_context"], SHORT_CONTEXT, _window)
    suite = read_rows(paths["short_suite"], SHORT_SUITE, lambda row: (str(row["task"]), int(row["index"])))
    check_identity(dict(zip(paths.values(), (every, ruler, loss, short, suite), strict=True)))
    return Column(name, label, needles, ruler, loss, short, suite)


def _window(row: Row) -> Window:
    return Window(int(row["length"]), int(row["start"]), row.get("text"))


def _of_one_length(columns: list[Column], missing: list[str]) -> list[Column]:
    """The columns with windows of one length alone, for each part the one that most columns measured, then the longest.

    Means over windows of different lengths mean nothing, and no two of them can be compared. What is left out is named.
    """
    for part in ("loss_by_position", "short_context"):
        lengths = [{window.length for window in getattr(column, part)} for column in columns]
        chosen = max(set().union(*lengths), key=lambda one: (sum(one in found for found in lengths), one), default=None)
        for i, (column, found) in enumerate(zip(columns, lengths, strict=True)):
            if found - {chosen}:
                others = ", ".join(f"{length:,}" for length in sorted(found - {chosen}))
                missing.append(
                    f"evaluate/{column.name}: {part} also has windows of {others} tokens, left out beside those of {chosen:,}"
                    if chosen in found
                    else f"evaluate/{column.name}: {part} has windows of {others} tokens, left out: other columns have {chosen:,}"
                )
                columns[i] = _without(column, {window for window in getattr(column, part) if window.length != chosen}, part)
    return columns


def _without(column: Column, windows: set[Window], part: str) -> Column:
    rows = {window: row for window, row in getattr(column, part).items() if window not in windows}
    return replace(column, loss_by_position=rows) if part == "loss_by_position" else replace(column, short_context=rows)


def _needle_kind(row: Row) -> NeedleKind:
    return NeedleKind(str(row.get("kind", "passkey")), bool(row.get("shared", row.get("task") == "needles_shared")))


def _absent(column: Column, recipe: Recipe | None) -> tuple[list[str], int]:
    """Parts that the recipe (or, without one, every run up to now) measures and the column lacks; how many it wants."""
    evaluate = recipe.evaluate if recipe is not None else None
    parts = {
        "needle": (evaluate is None or evaluate.needle is not None, column.needles),
        "ruler-like tasks": (evaluate is not None and evaluate.ruler is not None, column.ruler),
        "loss by position": (evaluate is None or evaluate.loss_by_position is not None, column.loss_by_position),
        "short context": (evaluate is None or evaluate.loss_by_position is not None, column.short_context),
        "short suite": (evaluate is not None and evaluate.short_suite is not None, column.short_suite),
    }
    absent = [part for part, (is_wanted, rows) in parts.items() if is_wanted and not rows]
    return absent, sum(is_wanted for is_wanted, _ in parts.values())


def _label(name: str, recipe: Recipe | None) -> str:
    if name in ("before", "scaled"):
        return {"before": "base", "scaled": "base + scaled rope"}[name]
    kinds = {stage.name: stage.kind for stage in recipe.stages} if recipe is not None else {}
    if name not in kinds:
        return f"after {name}"
    label = {"pretrain": "after pretraining", "sft": "after SFT"}[kinds[name]]
    return label if list(kinds.values()).count(kinds[name]) == 1 else f"{label} ({name})"


def _read_metrics(path: Path, stages: list[str], missing: list[str]) -> dict[str, list[Row]]:
    found = {}
    for stage in stages:
        rows = read_rows(path / "metrics" / f"{stage}.jsonl", METRICS, lambda row: int(row["step"]))
        if rows:
            found[stage] = [rows[step] for step in sorted(rows)]
        else:
            missing.append(f"metrics/{stage}.jsonl: no loss curve of stage {stage}")
    return found


def _read_cards(path: Path, stages: list[str], missing: list[str]) -> dict[str, Mapping[str, Any]]:
    """The facts that travel with the weights: of the base and of the newest checkpoint of each stage."""
    found = {}
    for name in ("base", *stages):
        folder = path / "checkpoints" / name
        newest = sorted(folder.glob("iter_*/mcore_longctx.json"))
        card = _read_json(newest[-1] if newest else folder / "mcore_longctx.json")
        if card is None:
            missing.append(f"checkpoints/{name}: no checkpoint, so its rope is not known")
        else:
            found[name] = card
    return found


def _read_data(path: Path, stages: list[str], missing: list[str]) -> dict[str, Mapping[str, Any]]:
    found = {}
    for stage in stages:
        manifest = _read_json(path / "data" / stage / "manifest.json")
        if manifest is None:
            missing.append(f"data/{stage}: no packed data of stage {stage}")
        else:
            found[stage] = manifest
    return found


def _read_verify(path: Path, missing: list[str]) -> Mapping[str, Any] | None:
    verify = _read_json(path / "verify.json")
    if verify is None:
        missing.append("verify.json: the export was not compared with the checkpoint")
    return verify


def _folders(path: Path, suffix: str = "") -> list[str]:
    """Names below `path`: of folders, or of files with a suffix."""
    if not path.is_dir():
        return []
    if suffix:
        return sorted(entry.name.removesuffix(suffix) for entry in path.iterdir() if entry.name.endswith(suffix))
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def _read_json(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"damaged: {error}", where=path) from None
    if not isinstance(value, dict):
        raise ConfigError("damaged: not a JSON object", where=path)
    return value
