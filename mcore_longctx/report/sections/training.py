"""What was run: training curves, data, recipe, time of the steps."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from mcore_longctx.recipe.schema import Recipe
from mcore_longctx.report import plots
from mcore_longctx.report.run_folder import RunFolder
from mcore_longctx.report.style import scientific

__all__ = ["data_section", "duration", "recipe_section", "steps_section", "training_section"]

_DATA_FACTS = ("samples", "seq_length", "tokens", "tokens_with_loss", "tokens_of_separators", "tokens_of_padding")
_SOURCE_FACTS = ("documents_before", "documents_after", "tokens_before", "tokens_after", "median_length", "max_length")


def training_section(folder: RunFolder) -> list[dict[str, Any]]:
    """Curves and facts of each stage that was trained."""
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
        facts.append(("time in steps", duration(sum(float(row.get("seconds") or 0) for row in rows))))
        stages.append({"name": name, "picture": plots.training_curves(name, rows), "facts": facts})
    return stages


def data_section(folder: RunFolder) -> list[dict[str, Any]]:
    """The packed data of each stage."""
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


def recipe_section(folder: RunFolder) -> dict[str, Any]:
    """Model, stages, ropes and the recipe's other settings in words."""
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


def _model_in_words(shape: Mapping[str, Any]) -> str:
    return (
        f"{shape['num_layers']} layers, hidden {shape['hidden_size']:,}, FFN {shape['ffn_hidden_size']:,}, {shape['num_attention_heads']} heads "
        f"over {shape['num_query_groups']} key/value heads of {shape['kv_channels']}, vocabulary {shape['vocab_size']:,}, "
        f"{'tied' if shape.get('tie_word_embeddings') else 'untied'} embeddings"
    )


def _stage_in_words(recipe: Recipe, i: int) -> list[str]:
    stage = recipe.stages[i]
    tokens = stage.iterations * stage.global_batch_size * stage.seq_length
    decay = f"cosine to {scientific(stage.optimizer.min_lr)}" if stage.optimizer.lr_decay_style == "cosine" else "constant"
    kind = {"pretrain": "continued pretraining", "sft": "instruction tuning"}[stage.kind]
    return [
        stage.name,
        kind,
        f"{stage.seq_length:,}",
        f"{stage.iterations:,} × {stage.global_batch_size:,}",
        f"{tokens:,}",
        stage.parallel.describe(),
        f"{scientific(stage.optimizer.lr)}, {decay}",
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


def steps_section(folder: RunFolder) -> list[dict[str, Any]]:
    """Steps of run.json but the report itself, which is being written."""
    steps = [step for step in folder.run.get("steps", ()) if step.get("name") != "report"]
    longest = max((float(step.get("seconds", 0)) for step in steps), default=0) or 1.0
    return [
        {
            "name": step.get("name", "?"),
            "state": step.get("state", "?"),
            "about": (step.get("about") or [""])[0],
            "seconds": duration(float(step.get("seconds", 0))),
            "share": round(100 * float(step.get("seconds", 0)) / longest, 1),
        }
        for step in steps
    ]


def duration(seconds: float) -> str:
    """6 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
