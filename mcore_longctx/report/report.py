"""`report.html`: one page of what a run did and what came of it. It needs no network: styles and pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import FunctionLoader
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from mcore_longctx.convert.checks.commands import serve_commands
from mcore_longctx.families import ModelShape
from mcore_longctx.manifest import versions, write_atomic
from mcore_longctx.recipe.schema import Recipe
from mcore_longctx.report import plots
from mcore_longctx.report.results import (
    Count,
    Verdict,
    by_cell,
    by_length,
    compare_needles,
    judge,
    loss_bins,
    needle_counts,
    paired,
    percent_change,
    percent_interval,
    relative_change,
    short_loss,
    summary_rows,
)
from mcore_longctx.report.run_folder import Column, RunFolder, read_run_folder
from mcore_longctx.rope import RopeScaling
from mcore_longctx.tasks.statistics import mean_interval

__all__ = ["NEEDLE_PICTURE", "REPORT", "write_report"]

REPORT = "report.html"
_DATA_FACTS = ("samples", "seq_length", "tokens", "tokens_with_loss", "tokens_of_separators", "tokens_of_padding")
_SOURCE_FACTS = ("documents_before", "documents_after", "tokens_before", "tokens_after", "median_length", "max_length")
NEEDLE_PICTURE = "needle_before_after.png"


def write_report(run_folder: Path) -> Path:
    """Write `report.html` and, where needles were measured, `needle_before_after.png` into a run folder.

    Missing parts are named in the report. Nothing else in the folder is touched; the page replaces an older one whole.

    Returns:
        the path of the page.

    Raises:
        ConfigError: not a run folder, or a damaged file.
    """
    folder = read_run_folder(run_folder)
    page = _environment().get_template("report.html.j2").render(_content(folder))
    plots.needle_png(folder, run_folder / NEEDLE_PICTURE)
    path = run_folder / REPORT
    write_atomic(path, page)
    return path


def _environment() -> SandboxedEnvironment:
    templates = resources.files("mcore_longctx.report") / "templates"
    environment = SandboxedEnvironment(
        loader=FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((templates / "report.css").read_text(encoding="utf-8"))
    return environment


def _content(folder: RunFolder) -> dict[str, Any]:
    verdict = judge(folder)
    return {
        "name": folder.name,
        "subtitle": _subtitle(folder),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": verdict,
        "verdict_class": {True: "good", False: "bad", None: "open"}[verdict.extended],
        "tiles": _tiles(folder, verdict),
        "missing": folder.missing,
        "columns": folder.columns,
        "summary": summary_rows(folder),
        "needle": _needle(folder),
        "positions": _positions(folder),
        "short": _short(folder),
        "training": _training(folder),
        "data": _data(folder),
        "recipe": _recipe(folder),
        "verify": _verify(folder.verify) if folder.verify is not None else None,
        "serving": _serving(folder),
        "steps": _steps(folder),
        "versions": folder.run.get("versions") or versions(),
    }


def _subtitle(folder: RunFolder) -> str:
    lengths = [f"{length:,}" for length in (folder.original_length, folder.trained_length) if length is not None]
    model = str(folder.recipe.model.path) if folder.recipe is not None else "an unknown model"
    return f"{model}, {' → '.join(lengths)} tokens of context" if len(lengths) == 2 else model


def _tiles(folder: RunFolder, verdict: Verdict) -> list[tuple[str, str, str]]:
    """(what, number, note) of the figures at the top: base against the final model."""
    base = next((column for column in folder.columns if column.name == "before"), None)
    final = folder.columns[-1] if folder.columns and folder.columns[-1].name not in ("before", "scaled") else None
    tiles = []
    if base is not None and final is not None:
        before, after = needle_counts(base, by_length), needle_counts(final, by_length)
        for length in sorted(before.keys() & after.keys())[-1:]:
            note = f"base {percent_interval(before[length])}, {final.label} {percent_interval(after[length])}"
            tiles.append((f"pass keys at {length:,}", f"{before[length]} → {after[length]}", note))
        bins_before, bins_after = loss_bins(base), loss_bins(final)
        for one in sorted(bins_before.keys() & bins_after.keys())[-1:]:
            levels = [mean_interval(list(bins[one].values())).mean for bins in (bins_before, bins_after)]
            change = paired(bins_before[one], bins_after[one])
            note = f"paired {change.mean:+.3f} ± {change.half_width:.3f} nats" if change else "nats per token"
            tiles.append((f"loss at {one[0]:,}–{one[1]:,}", f"{levels[0]:.2f} → {levels[1]:.2f}", note))
        change = relative_change(short_loss(base), short_loss(final))
        if change is not None:
            tiles.append(("short-context loss", percent_change(change), f"paired, {change.count} windows"))
    seconds = sum(float(step.get("seconds", 0)) for step in folder.run.get("steps", ()))
    if seconds:
        tiles.append(("wall time", _duration(seconds), f"{len(_steps(folder))} steps"))
    return tiles


def _needle(folder: RunFolder) -> dict[str, Any] | None:
    columns = [column for column in folder.columns if column.needle]
    if not columns:
        return None
    cells = {column.name: needle_counts(column, by_cell) for column in columns}
    totals = {column.name: needle_counts(column, by_length) for column in columns}
    lengths = sorted({length for counts in totals.values() for length in counts})
    depths = sorted({depth for counts in cells.values() for _, depth in counts})
    base = columns[0]
    rows = []
    for length in lengths:
        row = []
        for column in columns:
            count = totals[column.name].get(length)
            changed = compare_needles(base, column, length) if column is not base else None
            row.append({"count": count, "interval": percent_interval(count) if count else "", "changed": changed})
        rows.append((length, row))
    grids = [
        {
            "label": column.label,
            "rows": [(depth, [_cell(cells[column.name].get((length, depth))) for length in lengths]) for depth in depths],
        }
        for column in columns
    ]
    every = [row for column in columns for row in column.needle.values()]
    return {
        "grids": grids,
        "lengths": [(length, plots.short_count(length)) for length in lengths],
        "original": folder.original_length,
        "trained": folder.trained_length,
        "rows": rows,
        "labels": [column.label for column in columns],
        "base": base.label,
        "unique_share": min((float(row["unique_share"]) for row in every if "unique_share" in row), default=None),
        "misses": _misses(columns[-1]),
        "final": columns[-1].label,
        "legend": [
            (f"{100 * rate:.0f} %", plots.cell_colour(Count(round(rate * 1000), 1000))[0]) for rate in (0, 0.25, 0.5, 0.75, 1)
        ],
        "certainty": [(str(count), plots.cell_colour(count)) for count in (Count(1, 1), Count(5, 5), Count(20, 20))],
    }


def _cell(count: Count | None) -> dict[str, str]:
    if count is None:
        return {"text": "–", "title": "not measured", "style": ""}
    background, ink = plots.cell_colour(count)
    return {"text": str(count), "title": percent_interval(count), "style": f"background:{background};color:{ink}"}


def _misses(column: Column) -> list[Mapping[str, Any]]:
    """The first few wrong answers: what was expected, what came."""
    return [row for _, row in sorted(column.needle.items()) if not row["correct"] and "got" in row][:8]


def _positions(folder: RunFolder) -> dict[str, Any] | None:
    picture = plots.loss_by_position(folder)
    if picture is None:
        return None
    columns = [column for column in folder.columns if column.loss_by_position]
    bins = {column.name: loss_bins(column) for column in columns}
    rows = []
    for one in sorted({one for found in bins.values() for one in found}):
        cells = []
        for column in columns:
            windows = bins[column.name].get(one)
            level = mean_interval(list(windows.values())) if windows else None
            base = bins.get("before", {}).get(one)
            change = paired(base, windows) if base and windows and column.name != "before" else None
            cells.append((level, change))
        rows.append((one, cells))
    return {
        "picture": picture,
        "change": plots.change_by_position(folder),
        "labels": [column.label for column in columns],
        "rows": rows,
        "windows": max(len(column.loss_by_position) for column in columns),
        "has_base": "before" in bins,
    }


def _short(folder: RunFolder) -> dict[str, Any] | None:
    columns = [column for column in folder.columns if column.short_context]
    if not columns:
        return None
    base = next((short_loss(column) for column in columns if column.name == "before"), {})
    rows = []
    for column in columns:
        losses = short_loss(column)
        own = column.name == "before"
        rows.append(
            (
                column.label,
                mean_interval(list(losses.values())),
                None if own else paired(base, losses),
                None if own else relative_change(base, losses),
            )
        )
    return {"rows": rows, "length": max(int(row["length"]) for column in columns for row in column.short_context.values())}


def _training(folder: RunFolder) -> list[dict[str, Any]]:
    stages = []
    for name, rows in folder.metrics.items():
        speeds = sorted(float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second"))
        memory = [int(row["memory_bytes"]) for row in rows if row.get("memory_bytes")]
        facts = [
            ("steps", f"{len(rows):,}"),
            ("loss, first and last step", f"{float(rows[0]['loss']):.3f} → {float(rows[-1]['loss']):.3f}"),
            ("largest gradient norm", f"{max(float(row['grad_norm']) for row in rows):.3g}"),
        ]
        if speeds:
            facts.append(("tokens per second, median", f"{speeds[len(speeds) // 2]:,.0f}"))
        if memory:
            facts.append(("peak memory", f"{max(memory) / 2**30:.2f} GiB"))
        facts.append(("time in steps", _duration(sum(float(row.get("seconds", 0)) for row in rows))))
        stages.append({"name": name, "picture": plots.training_curves(name, rows), "facts": facts})
    return stages


def _data(folder: RunFolder) -> list[dict[str, Any]]:
    stages = []
    for name, manifest in folder.data.items():
        picture = folder.path / "data" / name / "lengths.png"
        image = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None
        facts = [(key.replace("_", " "), f"{manifest[key]:,}") for key in _DATA_FACTS if isinstance(manifest.get(key), int)]
        sources = manifest.get("sources")
        rows = [
            (source, [f"{int(counts[key]):,}" if key in counts else "–" for key in _SOURCE_FACTS])
            for source, counts in (sources.items() if isinstance(sources, Mapping) else ())
            if isinstance(counts, Mapping)
        ]
        stages.append({"name": name, "picture": image, "facts": facts, "sources": rows})
    return stages


def _recipe(folder: RunFolder) -> dict[str, Any]:
    recipe = folder.recipe
    ropes = [
        (
            "base" if name == "base" else f"stage {name}",
            str(card.get("rope_in_words", "not stated")),
            str(card.get("rope_fingerprint", ""))[:12],
        )
        for name, card in folder.cards.items()
    ]
    shape = next((card.get("shape") for card in folder.cards.values() if isinstance(card.get("shape"), dict)), None)
    return {
        "ropes": ropes,
        "model": _model_in_words(shape) if shape else None,
        "stages": [_stage_in_words(recipe, i) for i in range(len(recipe.stages))] if recipe is not None else [],
        "facts": _recipe_facts(recipe) if recipe is not None else [],
    }


def _serving(folder: RunFolder) -> list[str]:
    """The commands that serve the export at its length; none where there is no export."""
    weight_bytes = sum(path.stat().st_size for path in (folder.path / "export").glob("*.safetensors"))
    card = folder.cards.get(folder.recipe.stages[-1].name) if folder.recipe is not None and folder.recipe.stages else None
    if not weight_bytes or card is None:
        return []
    try:
        shape, rope = ModelShape.from_dict(card["shape"]), RopeScaling.from_dict(card["rope"])
    except (KeyError, TypeError, ValueError):
        return []
    length = rope.resolved_max_position_embeddings
    return serve_commands(shape, length, weight_bytes=weight_bytes, path="export") if length is not None else []


def _model_in_words(shape: Mapping[str, Any]) -> str:
    return (
        f"{shape['num_layers']} layers, hidden {shape['hidden_size']:,}, FFN {shape['ffn_hidden_size']:,}, {shape['num_attention_heads']} heads "
        f"over {shape['num_query_groups']} key/value heads of {shape['kv_channels']}, vocabulary {shape['vocab_size']:,}, "
        f"{'tied' if shape.get('tie_word_embeddings') else 'untied'} embeddings"
    )


def _stage_in_words(recipe: Recipe, i: int) -> list[str]:
    stage = recipe.stages[i]
    tokens = stage.iterations * stage.global_batch_size * stage.seq_length
    decay = f"cosine to {plots.scientific(stage.optimizer.min_lr)}" if stage.optimizer.lr_decay_style == "cosine" else "constant"
    kind = {"pretrain": "continued pretraining", "sft": "instruction tuning"}[stage.kind]
    return [
        stage.name,
        kind,
        f"{stage.seq_length:,}",
        f"{stage.iterations:,} × {stage.global_batch_size:,}",
        f"{tokens:,}",
        stage.parallel.describe(),
        f"{plots.scientific(stage.optimizer.lr)}, {decay}",
        stage.precision,
    ]


def _recipe_facts(recipe: Recipe) -> list[tuple[str, str]]:
    facts = [("model", str(recipe.model.path)), ("tokenizer", str(recipe.tokenizer_folder)), ("seed", str(recipe.seed))]
    for name, section in recipe.data.items():
        sources = ", ".join(f"{source.name} ({source.path})" for source in section.sources)
        is_long = any(stage.data == name and stage.kind == "pretrain" for stage in recipe.stages)
        how = f"; between documents {section.separator_text}; packing: {section.packing}" if is_long else ""
        facts.append((f"data “{name}”", sources + how))
    facts.append(("phase of the rope", recipe.rope.phase_dtype))
    facts.append(("evaluation", f"{recipe.evaluate.parallel.describe()}, {recipe.evaluate.precision}"))
    return facts


def _steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Steps of run.json but the report itself, which is being written."""
    steps = [step for step in folder.run.get("steps", ()) if step.get("name") != "report"]
    longest = max((float(step.get("seconds", 0)) for step in steps), default=0) or 1.0
    return [
        {
            "name": step.get("name", "?"),
            "state": step.get("state", "?"),
            "about": (step.get("about") or [""])[0],
            "seconds": _duration(float(step.get("seconds", 0))),
            "share": round(100 * float(step.get("seconds", 0)) / longest, 1),
        }
        for step in steps
    ]


def _duration(seconds: float) -> str:
    """6 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _verify(verify: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`convert verify` of the export against the checkpoint, in words."""
    words = {True: "equal", False: "DIFFERENT", None: "not compared"}
    problems = [
        *verify.get("other", ()),
        *(f"only on one side: {name}" for name in [*verify.get("only_a", ()), *verify.get("only_b", ())]),
        *(f"{row.get('name')}: {row.get('elements', 0):,} elements" for row in verify.get("differences", ())),
    ]
    same = not problems if "differences" in verify else None  # its own `equal` also counts the logits
    rows = [("tensors", f"{words[same]}, {verify.get('tensors', 0):,} compared, {verify.get('bytes', 0):,} bytes")]
    rows += [("differs", problem) for problem in problems[:20]]
    if "rope_equal" in verify:
        rows.append(("rope fingerprint", words[verify["rope_equal"]]))
    logits = verify.get("logits")
    if not isinstance(logits, Mapping):
        return [*rows, ("logits", "not compared")]
    rows.append(
        (
            "logits",
            f"{words[logits.get('equal')]} within {logits.get('tolerance', 0):g}, {' against '.join(logits.get('readers', ()))}",
        )
    )
    rows.append(("inverse frequencies", words[logits.get("inverse_frequencies_equal")]))
    for row in logits.get("differences", ()):
        relative = row.get("relative")
        difference = "not a number" if relative is None else f"{relative:.1e} of the largest logit"
        rows.append(
            (
                f"at positions {row.get('positions')}",
                f"largest difference {difference}, same most probable token in {100 * row.get('argmax_equal', 0):.1f} %",
            )
        )
    return rows
