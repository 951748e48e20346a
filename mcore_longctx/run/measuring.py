"""What a recipe measures of each model, in words and in hours."""

from __future__ import annotations

from mcore_longctx.families import ModelShape
from mcore_longctx.plan.evaluation import evaluation_price, work_line
from mcore_longctx.plan.stages import cluster_gpu
from mcore_longctx.plan.tables import duration
from mcore_longctx.recipe.schema import EvaluateSection, Recipe

__all__ = ["cost_line", "describe_evaluation"]


def describe_evaluation(section: EvaluateSection) -> list[str]:
    """A line for each task, at the section's level."""
    asked, section = section, section.at_level()
    lines = [] if section.level == "standard" else [f"level {section.level}"]
    if (needle := section.needle) is not None:
        lengths = f"{len(needle.lengths)} lengths ({', '.join(f'{n:,}' for n in needle.lengths)})"
        what = f"{needle.key_digits}-digit keys" if needle.kind == "passkey" else "sentences"
        shared = ", all depths in one text" if needle.shared else ""
        lines.append(
            f"needle: {lengths} x {needle.depths} depths x {needle.samples} samples, {what}{shared}, text from {needle.haystack}"
        )
    if (ruler := section.ruler) is not None:
        tasks = ", ".join(ruler.tasks) or "all tasks"
        lengths = ", ".join(f"{n:,}" for n in ruler.lengths)
        code = f" and {ruler.code}" if ruler.code is not None else ""
        scoring = ruler.scoring.replace("_", " ")
        lines.append(f"ruler-like: {tasks} at {lengths} x {ruler.samples} samples, {scoring}, text from {ruler.haystack}{code}")
    elif asked.ruler is not None:
        lines.append("ruler-like: not at level quick")
    if (loss := section.loss_by_position) is not None:
        lines.append(
            f"loss by position: {loss.windows} windows of {loss.seq_length:,} tokens; short context: {loss.short_windows} windows of "
            f"{loss.short_length:,}; text from {loss.path}"
        )
    if (suite := section.short_suite) is not None:
        source = "made from the seed" if suite.choices is None else f"of {suite.choices}"
        lines.append(f"short suite: {suite.questions} questions {source}")
    return [*lines, f"{section.parallel.describe()}, {section.precision}"]


def cost_line(recipe: Recipe, shape: ModelShape) -> str:
    """What one model costs to measure: `plan: 12 min on 128 GPUs, 25.6 GPU-hours; 4 models: 102.4 GPU-hours`."""
    gpu, models = cluster_gpu(recipe.cluster), len(recipe.stages) + 2
    if gpu is None:
        return f"plan: {work_line(recipe.evaluate, shape, columns=models)}"
    price = evaluation_price(recipe.evaluate, shape, gpu, columns=models)
    if price is None:
        return "plan: nothing is measured"
    return (
        f"plan: {duration(price.seconds)} on {price.gpus:,} GPUs, {price.gpu_hours / models:,.1f} GPU-hours; {models} models:"
        f" {price.gpu_hours:,.1f} GPU-hours"
    )
