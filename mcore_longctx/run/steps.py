"""The steps of a recipe, in order: what each is made from, what it leaves, how it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.launch.local import launch_ranks
from mcore_longctx.launch.progress import read_slices
from mcore_longctx.plan.evaluation import check_evaluation
from mcore_longctx.recipe.load import RecipeFile
from mcore_longctx.recipe.resolve import Resolved
from mcore_longctx.recipe.schema import MergeSection, Recipe, Stage
from mcore_longctx.run.checkpoints import final_checkpoint, merged_checkpoint, newest_checkpoint
from mcore_longctx.run.measuring import cost_line, describe_evaluation
from mcore_longctx.run.training import finished_checkpoint, train_job

__all__ = ["Step", "plan_steps"]


@dataclass(frozen=True)
class Step:
    """One step of a run.

    `keys` are the dotted recipe paths (prefixes) whose values decide the result, `files` the inputs from outside the run folder,
    `needs` the steps whose results it takes.
    """

    name: str
    stage: str | None
    about: tuple[str, ...]
    keys: tuple[str, ...]
    files: tuple[Path, ...]
    outputs: tuple[Path, ...]
    needs: tuple[str, ...]
    action: Callable[[], dict[str, Any] | None]


def plan_steps(file: RecipeFile, resolved: Resolved) -> list[Step]:
    """All steps of a recipe, in order."""
    recipe = file.recipe
    folder = recipe.run_folder
    steps = [_import_step(recipe, resolved, folder)]
    has_tasks, measured = recipe.evaluate.measures, (*describe_evaluation(recipe.evaluate), cost_line(recipe, resolved.shape))
    if has_tasks:
        check_evaluation(file, resolved.shape)
        about = f"the model as it is: {_own_rope(resolved)}"
        steps.append(_evaluate_step(recipe, folder, "before", "base", "own", (about, *measured)))
        about = f"the model with the recipe's rope, not yet trained: {resolved.rope.describe()}"
        steps.append(_evaluate_step(recipe, folder, "scaled", "base", "recipe", (about, *measured)))
    for before, stage in zip((None, *recipe.stages), recipe.stages, strict=False):
        steps.append(_data_step(recipe, resolved, folder, stage))
        steps.append(_train_step(file, resolved, folder, stage, before))
        if stage.merge is not None:
            steps.append(_merge_step(recipe, stage, stage.merge))
        if has_tasks:
            about = f"after stage {stage.name}"
            steps.append(_evaluate_step(recipe, folder, stage.name, stage.name, "recipe", (about, *measured), stage=stage.name))
    last = recipe.stages[-1]
    steps.append(_export_step(recipe, folder, last))
    steps.append(_verify_step(recipe, folder, last))
    steps.append(_report_step(folder))
    return steps


def _rope_keys(stage: Stage) -> tuple[str, ...]:
    """The recipe values that make the rope which a stage trains with."""
    return ("rope",) if stage.rope is None else (f"stages.{stage.name}.rope",)


def _merge_keys(stage: Stage | None) -> tuple[str, ...]:
    """The recipe values by which the final checkpoint of a stage is merged."""
    return () if stage is None else (f"stages.{stage.name}.merge",)


def _done(recipe: Recipe, name: str | None) -> str:
    """The step that leaves the final checkpoint of a stage; None: of the model that is extended."""
    if name in (None, "base"):
        return "import"
    stage = next(stage for stage in recipe.stages if stage.name == name)
    return f"train-{name}" if stage.merge is None else f"merge-{name}"


def _own_rope(resolved: Resolved) -> str:
    return resolved.own_rope.describe() if resolved.model_found else "read from its config.json when it is there"


def _import_step(recipe: Recipe, resolved: Resolved, folder: Path) -> Step:
    base = folder / "checkpoints" / "base"

    def action() -> None:
        from mcore_longctx.convert import Execution, import_hf
        from mcore_longctx.run.finished import is_imported

        if is_imported(recipe.model.path, base):
            _take(base)
        else:
            import_hf(recipe.model.path, base, how=Execution(checksum=True))

    return Step(
        "import",
        None,
        (f"{recipe.model.path} -> {base} (torch_dist)", f"carries the model's own rope: {_own_rope(resolved)}"),
        ("model",),
        (recipe.model.path,),
        (base,),
        (),
        action,
    )


def _take(out: Path) -> None:
    """What an earlier start has finished, and was killed before the journal said so."""
    from mcore_longctx.convert.copying.partial import remove_ended_journal

    remove_ended_journal(out)
    print(f"    {out}: whole, and made from these inputs by a start that was killed before it could note it")


def _evaluate_step(
    recipe: Recipe, folder: Path, column: str, checkpoint: str, rope: str, about: tuple[str, ...], stage: str | None = None
) -> Step:
    parallel = recipe.evaluate.parallel
    files = tuple(dict.fromkeys(recipe.evaluate.at_level().texts.values()))
    out = folder / "evaluate" / column

    def action() -> None:
        arguments = ["evaluate", str(folder / "recipe.yaml"), "--checkpoint", checkpoint, "--rope", rope, "--column", column]
        launch_ranks(
            arguments,
            parallel.world_size,
            log=folder / "logs" / f"evaluate-{column}",
            nproc_per_node=recipe.cluster.nproc_per_node,
        )

    measured = next(one for one in reversed(recipe.stages) if stage in (None, one.name))
    keys = ("model", "tokenizer", "evaluate", "seed") + (_rope_keys(measured) if rope == "recipe" else ())
    keys += () if stage is None else _merge_keys(measured)
    needs = (_done(recipe, stage),)
    return Step(f"evaluate-{column}", stage, about, keys, files, (out,), needs, action)


def _data_step(recipe: Recipe, resolved: Resolved, folder: Path, stage: Stage) -> Step:
    section, out = recipe.data[stage.data], folder / "data" / stage.name
    samples = stage.iterations * stage.global_batch_size
    names = ", ".join(f"{s.name} ({s.path}{'' if s.share is None else f', share {s.share:g}'})" for s in section.sources)
    if stage.kind == "pretrain":
        sampling = section.length_sampling
        lines = [
            f"{stage.data}: {samples:,} samples of {stage.seq_length:,} tokens = {samples * stage.seq_length:,} tokens",
            f"documents: {names}",
            f"below {sampling.short_below:,} tokens kept with probability {sampling.keep_probability:g}, above {sampling.long_above:,} "
            f"taken {sampling.repetition:g} times; between documents {section.separator_text}; packing: {section.packing}",
        ]
    else:
        lines = [f"{stage.data}: chats -> samples of {stage.seq_length:,} tokens, loss on answers only", f"chats: {names}"]

    def action() -> dict[str, Any]:
        from mcore_longctx.data.build import build
        from mcore_longctx.data.workspace import usable_cores

        report = build(
            section,
            stage.data,
            chats=stage.kind == "sft",
            tokenizer=recipe.tokenizer_folder,
            model_vocab_size=resolved.shape.vocab_size,
            seq_length=stage.seq_length,
            num_samples=samples if stage.kind == "pretrain" else None,
            seed=recipe.seed,
            out=out,
            workers=usable_cores(),
        )
        print(report)
        return {"samples": report.pack.samples}

    keys = (
        f"data.{stage.data}",
        f"stages.{stage.name}.seq_length",
        f"stages.{stage.name}.train_iters",
        f"stages.{stage.name}.train_tokens",
        f"stages.{stage.name}.global_batch_size",
        "tokenizer",
        "seed",
    )
    chosen_by = section.sentences.offsets if section.sentences is not None else None
    files = (*(source.path for source in section.sources), *((chosen_by,) if chosen_by is not None else ()))
    return Step(f"data-{stage.name}", stage.name, tuple(lines), keys, files, (out / "manifest.json",), (), action)


def _train_step(file: RecipeFile, resolved: Resolved, folder: Path, stage: Stage, before: Stage | None) -> Step:
    o, tokens = stage.optimizer, stage.iterations * stage.global_batch_size * stage.seq_length
    decay = f", cosine to {o.min_lr:g}" if o.lr_decay_style == "cosine" else ", constant"
    lines: tuple[str, ...] = (
        f"{stage.kind}: {stage.iterations:,} iterations x {stage.global_batch_size:,} sequences x {stage.seq_length:,} tokens = {tokens:,} tokens",
        f"{stage.parallel.describe()}; micro-batch {stage.micro_batch_size}, {stage.num_microbatches} micro-batches a step; {stage.precision}",
        stage.activations.describe() + (", documents of a sample do not see each other" if stage.cross_document_mask else ""),
        f"AdamW lr {o.lr:g}{decay}, warm-up {o.lr_warmup_iters} iterations, betas {o.adam_beta1:g} {o.adam_beta2:g}, "
        f"weight decay {o.weight_decay:g}, clip {o.clip_grad:g}",
        f"a checkpoint every {stage.save_interval} iterations, the newest {stage.keep_checkpoints} are kept",
    )
    if stage.rope is not None:
        lines += (f"rope of this stage: {resolved.rope_of(stage.name).describe()}",)
    lines += tuple(stage.methods())
    out = folder / "checkpoints" / stage.name

    def action() -> dict[str, Any]:
        finished = finished_checkpoint(train_job(file, resolved, stage.name))
        if finished is not None:  # trained by a job of its own (`launch`)
            print(f"    {finished}: trained to its end with these settings")
            seconds = sum(one.seconds for one in read_slices(folder / "logs" / stage.name))
            return {"checkpoint": finished.name, **({"seconds": round(seconds, 1)} if seconds else {})}
        launch_ranks(
            ["train", str(folder / "recipe.yaml"), "--stage", stage.name],
            stage.parallel.world_size,
            log=folder / "logs" / f"train-{stage.name}",
            status=folder / "logs" / stage.name / "STATUS",
            nproc_per_node=file.recipe.cluster.nproc_per_node,
        )
        return {}

    needs = (f"data-{stage.name}", _done(file.recipe, None if before is None else before.name))
    keys = (f"stages.{stage.name}", "seed", *_rope_keys(stage), *_merge_keys(before))
    return Step(f"train-{stage.name}", stage.name, lines, keys, (), (out,), needs, action)


def _merge_step(recipe: Recipe, stage: Stage, how: MergeSection) -> Step:
    out = merged_checkpoint(recipe, stage.name)

    def action() -> None:
        from mcore_longctx.convert import Execution, merge
        from mcore_longctx.run.finished import is_merged

        trained = newest_checkpoint(recipe.run_folder / "checkpoints" / stage.name)
        other, weights = final_checkpoint(recipe, how.other), (1.0 - how.other_weight, how.other_weight)
        if is_merged(trained, other, out, weights=weights):
            _take(out)
        else:
            merge(trained, other, out, weights=weights, any_rope=True, how=Execution(checksum=True))

    return Step(
        f"merge-{stage.name}",
        stage.name,
        (
            f"{1 - how.other_weight:g} x {stage.name} + {how.other_weight:g} x {how.other} -> {out}, under the rope of {stage.name}",
        ),
        (*_merge_keys(stage), *_rope_keys(stage)),
        (),
        (out,),
        tuple(dict.fromkeys((f"train-{stage.name}", _done(recipe, how.other)))),
        action,
    )


def _export_step(recipe: Recipe, folder: Path, stage: Stage) -> Step:
    out = folder / "export"

    def action() -> None:
        from mcore_longctx.convert import Execution, export_hf
        from mcore_longctx.run.finished import is_exported

        checkpoint = final_checkpoint(recipe, stage.name)
        if is_exported(checkpoint, out):
            _take(out)
        else:
            export_hf(checkpoint, out, how=Execution(checksum=True))

    return Step(
        "export",
        None,
        (
            f"checkpoints/{stage.name}{'' if stage.merge is None else '-merged'} -> {out} (Hugging Face safetensors, both rope spellings)",
        ),
        (*_rope_keys(stage), *_merge_keys(stage)),
        (),
        (out,),
        (_done(recipe, stage.name),),
        action,
    )


def _verify_step(recipe: Recipe, folder: Path, stage: Stage) -> Step:
    result = folder / "verify.json"

    def action() -> None:
        checkpoint = final_checkpoint(recipe, stage.name)
        launch_ranks(
            ["convert", "verify", str(checkpoint), str(folder / "export"), "--logits", "--json-file", str(result)],
            1,
            log=folder / "logs" / "verify",
        )

    about = (
        "the export against the checkpoint: every tensor bit for bit, inverse frequencies, logits up to the end of the new context",
    )
    return Step("verify", None, about, (), (), (result,), ("export",), action)


def _report_step(folder: Path) -> Step:
    def action() -> None:
        from mcore_longctx.report import summary_table, write_report

        path = write_report(folder)
        print(summary_table(folder))
        print(f"report: {path}")

    return Step(
        "report", None, (f"{folder / 'report.html'}: one page, no network needed",), (), (), (folder / "report.html",), (), action
    )
