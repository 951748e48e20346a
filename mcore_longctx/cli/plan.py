"""`mcore-longctx plan`: what a run will cost before it is booked."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_longctx.families import ModelShape
    from mcore_longctx.plan.evaluation import EvaluationPrice
    from mcore_longctx.plan.hardware import Gpu
    from mcore_longctx.plan.page import StagePage
    from mcore_longctx.recipe import Stage
    from mcore_longctx.recipe.load import RecipeFile

_DESCRIPTION = """\
What a training run costs before it is booked: which layouts divide and fit, memory of a GPU term by term, time of a step, tokens per
second, causal MFU, hours, host memory; which layout is best and why, what breaks beside it; timeouts, signal lead, save interval and
evaluation that follow. Needs no GPU and no torch.

  mcore-longctx plan ultralong-8b-4m                              the recipe's stages as written, and what else its GPUs could do
  mcore-longctx plan ultralong-8b-4m --stage extend --gpus 64     the same stage on 64 GPUs
  mcore-longctx plan --model llama-3.1-70b --seq-length 1M --gpus 256 --gpu h200
  mcore-longctx plan ultralong-8b-4m --stage extend --explain     every formula with its numbers
  mcore-longctx plan --validate                                   the formulas against published measurements
  mcore-longctx plan ultralong-8b-4m --serve                      what serving the extended model needs

Exit code 1: the recipe's layout does not fit, or nothing does on these GPUs. docs/plan.md explains formulas and files.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, step time, hours and the best layout of a run, before it is booked",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file or preset; left out with --model")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value", help="change single values of the recipe")
    parser.add_argument("--stage", metavar="NAME", help="one stage of the recipe; default: all")
    parser.add_argument("--gpus", metavar="N", help="look for layouts of N GPUs; default: as many as the stage's layout has")
    parser.add_argument(
        "--gpu", metavar="NAME", help="GPU of the hardware table, for example h100-80gb or h200; default: the recipe's"
    )
    parser.add_argument("--hardware", type=Path, metavar="FILE", help="a hardware table of your own, YAML, beside ours")
    parser.add_argument("--kernel", default="", metavar="NAME", help="attention kernel of that GPU, for example fa3")
    parser.add_argument("--top", metavar="N", help="layouts in the table, default 8")
    parser.add_argument("--json", action="store_true", help="everything for programs: bytes, seconds, every layout")
    parser.add_argument("--explain", action="store_true", help="every formula with its numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and time against the sequence length (.png, .svg)")
    without = parser.add_argument_group("without a recipe")
    without.add_argument("--model", metavar="NAME", help="a known model (llama-3.1-8b), or a folder with config.json")
    without.add_argument("--seq-length", metavar="TOKENS", help="for example 4M")
    without.add_argument("--tokens-per-step", metavar="TOKENS", help="default: 8M, or one sequence")
    without.add_argument("--train-tokens", metavar="TOKENS", help="budget that the hours are for, default 1B")
    other = parser.add_argument_group("other plans")
    other.add_argument(
        "--validate",
        nargs="?",
        const="",
        metavar="FILE",
        help="hold the formulas against published measurements: ours, or a file of the same form",
    )
    other.add_argument("--serve", action="store_true", help="what serving the model at its new length needs, with the commands")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    _refuse_without_effect(args)
    if args.validate is not None:
        return _validate(args)
    if args.serve:
        return _serve(args)
    return _plan(args)


_OPTIONS = (
    "recipe",
    "stage",
    "gpus",
    "gpu",
    "hardware",
    "kernel",
    "top",
    "json",
    "explain",
    "plot",
    "model",
    "seq_length",
    "tokens_per_step",
    "train_tokens",
    "serve",
)


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """An option that would change nothing is a misunderstanding."""
    from mcore_longctx.errors import ConfigError

    if args.validate is not None:
        kind, useless = "--validate", set(_OPTIONS) - {"json"}
    elif args.serve:
        kind = "--serve"
        useless = {"stage", "gpus", "kernel", "top", "explain", "plot", "tokens_per_step", "train_tokens"}
        useless |= {"recipe"} if args.model is not None else set()
        useless |= {"hardware"} if args.gpu is None else set()
    elif args.json:
        kind, useless = "--json, which has everything", {"top", "explain"}
    else:
        return
    for name in _OPTIONS:
        if name in useless and getattr(args, name):
            shown = "RECIPE" if name == "recipe" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{shown} has no effect with {kind}", fix=f"leave out {shown}")


def _plan(args: argparse.Namespace) -> int:
    from mcore_longctx.plan.as_json import evaluation_json, page_json
    from mcore_longctx.plan.page import explain, page, wrapped

    top = _number("--top", args.top or "8")
    pages, evaluation = _pages(args)
    if args.plot is not None:
        _plot(args, pages)
    if args.json:
        print(json.dumps({"stages": [page_json(it) for it in pages], "evaluation": evaluation_json(evaluation)}, indent=1))
    else:
        for number, it in enumerate(pages):
            print("\n" * min(number, 1) + "\n".join(page(it, top=top)))
            plan = it.written or it.best
            if args.explain and plan is not None:
                print("\n" + "\n".join(explain(plan)))
        print("\n".join(wrapped([*_evaluation(evaluation), "", _accuracy()])))
    return 0 if all(it.search.fitting and (it.written is None or it.written.fits) for it in pages) else 1


def _evaluation(price: EvaluationPrice | None) -> list[str]:
    if price is None:
        return []
    from mcore_longctx.plan.evaluation import evaluation_lines

    return ["", "evaluation, each model:", *(f"  {line}" for line in evaluation_lines(price))]


def _accuracy() -> str:
    from mcore_longctx.plan.validate import validate

    report = validate()
    time, memory, long_ = report.time["held"], report.memory["held"], report.long_time
    assert long_ is not None
    return (
        f"accuracy: on published runs that no constant was fitted to, planned times are {time.mean:.1%} off on average ({time.rows} runs,"
        f" mean {time.bias:+.1%}, worst {time.worst:.0%}; the {long_.rows} of 512K tokens and more: mean {long_.bias:+.1%}), memory {memory.mean:.1%} ({memory.rows} runs, mean {memory.bias:+.1%}, worst"
        f" {memory.worst:.0%}). Quote a plan with that; details: plan --validate"
    )


def _plot(args: argparse.Namespace, pages: list[StagePage]) -> None:
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.plan.plots import plot_lengths

    if len(pages) > 1:
        raise ConfigError("--plot draws one stage", fix=f"add --stage, one of {', '.join(it.stage.name for it in pages)}")
    plan = pages[0].written or pages[0].best
    if plan is None:
        raise ConfigError(f"--plot has nothing to draw: no layout of {pages[0].gpus:,} GPUs fits")
    try:
        plot_lengths(plan.setup, args.plot)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=args.plot) from None


def _pages(args: argparse.Namespace) -> tuple[list[StagePage], EvaluationPrice | None]:
    from mcore_longctx.plan.page import make_page

    if args.model is not None:
        name, shape, stage, gpu, gpus = _without_recipe(args)
        return [make_page(name, stage, shape, gpu, gpus, kernel=args.kernel)], None
    from mcore_longctx.errors import LayoutError
    from mcore_longctx.plan.evaluation import evaluation_price
    from mcore_longctx.recipe.resolve import resolve

    file = _recipe(args)
    shape = resolve(file, need_model=False).shape
    gpu = _gpu(args, file)
    recipe, pages = file.recipe, []
    for stage in _stages(args, file):
        gpus = _number("--gpus", args.gpus) if args.gpus is not None else stage.parallel.world_size
        try:
            it = make_page(
                recipe.name,
                stage,
                shape,
                gpu,
                gpus,
                kernel=args.kernel,
                backend=recipe.model.backend,
                written=True,
                time_limit=recipe.cluster.time_limit,
            )
        except LayoutError as error:
            raise LayoutError(error.what, where=f"stage {stage.name}", fix=error.fix) from None
        pages.append(it)
    models = len(recipe.stages) + 2  # as it is, with the new rope, after each stage
    return pages, evaluation_price(recipe.evaluate, shape, gpu, columns=models, kernel=args.kernel)


def _recipe(args: argparse.Namespace) -> RecipeFile:
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.recipe.load import open_recipe

    if args.recipe is None or "=" in args.recipe:
        raise ConfigError("plan needs a recipe, or --model with --seq-length and --gpus", fix="see mcore-longctx plan --help")
    for name in ("seq_length", "tokens_per_step", "train_tokens"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} belongs to --model; a recipe gives its own", fix="override the recipe's value"
            )
    return open_recipe(args.recipe, args.overrides)


def _stages(args: argparse.Namespace, file: RecipeFile) -> list[Stage]:
    from mcore_longctx.errors import ConfigError

    stages = {stage.name: stage for stage in file.recipe.stages}
    if args.stage is None:
        return list(stages.values())
    if args.stage not in stages:
        raise ConfigError(f"no stage {args.stage!r}", where=file.file, fix=_nearest(args.stage, list(stages)))
    return [stages[args.stage]]


def _gpu(args: argparse.Namespace, file: RecipeFile) -> Gpu:
    from dataclasses import replace

    from mcore_longctx.errors import ConfigError
    from mcore_longctx.plan.stages import cluster_gpu

    cluster = file.recipe.cluster
    if args.gpu is not None:
        cluster = replace(cluster, gpu=args.gpu)
    if args.hardware is not None:
        cluster = replace(cluster, hardware=args.hardware)
    gpu = cluster_gpu(cluster)
    if gpu is None:
        raise ConfigError(
            "there is no formula for ranks on CPUs",
            where=file.where("cluster.gpu"),
            fix="name a GPU, for example --gpu h100-80gb",
        )
    gpu.kernel(args.kernel)  # an unknown kernel is refused before anything is printed
    return gpu


def _without_recipe(args: argparse.Namespace) -> tuple[str, ModelShape, Stage, Gpu, int]:
    from mcore_longctx.errors import ConfigError, LongctxError
    from mcore_longctx.plan.hardware import find_gpu
    from mcore_longctx.recipe import OptimizerSection, Stage, TokenCount

    if args.recipe is not None or args.stage is not None:
        raise ConfigError("--model is for plans without a recipe", fix="leave out --model, or the recipe and --stage")
    for name in ("seq_length", "gpus"):
        if getattr(args, name) is None:
            raise ConfigError(f"--model needs --{name.replace('_', '-')}")
    gpu = find_gpu(args.gpu or "h100-80gb", args.hardware)
    gpu.kernel(args.kernel)
    name, shape = _model(args.model)
    length = _tokens("--seq-length", args.seq_length)
    batch = (
        _tokens("--tokens-per-step", args.tokens_per_step) if args.tokens_per_step else max(length, (8 << 20) // length * length)
    )
    if batch % length or not batch:
        nearest = " or ".join(f"{n * length:,}" for n in (batch // length, batch // length + 1) if n)
        raise ConfigError(f"--tokens-per-step {batch:,} is no multiple of --seq-length {length:,}", fix=f"nearest: {nearest}")
    try:
        stage = Stage(
            name="train",
            kind="pretrain",
            data="-",
            seq_length=TokenCount(length),
            global_batch_size=batch // length,
            optimizer=OptimizerSection(lr=1e-5),
            train_tokens=TokenCount(_tokens("--train-tokens", args.train_tokens or "1B")),
        )
    except (ValueError, LongctxError) as error:
        raise ConfigError(str(error)) from None
    return name, shape, stage, gpu, _number("--gpus", args.gpus)


def _model(name: str) -> tuple[str, ModelShape]:
    """A known model, or the sizes in a folder's config.json."""
    from mcore_longctx.plan.models import find_model

    config = Path(name) / "config.json"
    if not config.is_file():
        return name, find_model(name)
    from mcore_longctx.families import read_shape
    from mcore_longctx.reading import read_json_object

    return Path(name).resolve().name, read_shape(read_json_object(config, 1 << 20, "config.json"), where=config)


def _validate(args: argparse.Namespace) -> int:
    from mcore_longctx.plan.validate import render, validate

    report = validate(Path(args.validate) if args.validate else None)
    if args.json:
        from mcore_longctx.plan.as_json import validation_json

        print(json.dumps(validation_json(report), indent=1))
    else:
        print(render(report))
    return 0


def _serve(args: argparse.Namespace) -> int:
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.plan.as_json import serving_json
    from mcore_longctx.plan.hardware import find_gpu
    from mcore_longctx.plan.serving import plan_serving, serving_lines
    from mcore_longctx.recipe.resolve import resolve

    gpus = [find_gpu(args.gpu, args.hardware)] if args.gpu is not None else []
    if args.model is not None:
        if args.seq_length is None:
            raise ConfigError("--serve needs --seq-length, the longest request", fix="for example --seq-length 1M")
        name, shape = _model(args.model)
        length, path = _tokens("--seq-length", args.seq_length), name
    else:
        file = _recipe(args)
        resolved = resolve(file, need_model=False)
        shape, path = resolved.shape, str(file.recipe.run_folder / "export")
        length = resolved.rope.resolved_max_position_embeddings or max(stage.seq_length for stage in file.recipe.stages)
    plan = plan_serving(shape, length, gpus=gpus, path=path)
    print(json.dumps(serving_json(plan), indent=1) if args.json else "\n".join(serving_lines(plan)))
    return 0


def _number(option: str, text: str) -> int:
    from mcore_longctx.errors import ConfigError

    try:
        value = int(text.replace("_", "").replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise ConfigError(f"{option} {text}: a whole number above 0 is wanted")
    return value


def _tokens(option: str, text: str) -> int:
    from mcore_longctx.errors import ConfigError
    from mcore_longctx.units import parse_count

    try:
        value = parse_count(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from None
    if value < 1:
        raise ConfigError(f"{option} {text}: more than 0 tokens are wanted")
    return value


def _nearest(name: str, valid: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? stages: {', '.join(valid)}" if near else f"stages: {', '.join(valid)}"
