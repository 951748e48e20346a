"""The stage runner: the steps of a recipe in order, what is finished is skipped, what was made from other inputs is refused.

`RUN_FOLDER/run.json` records each step: its state, the recipe values and files that it was made from, its outputs and its time.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mcore_longctx.errors import ConfigError, InUseError, LongctxError
from mcore_longctx.launch.local import launch_ranks
from mcore_longctx.manifest import sha256_file, versions, write_atomic
from mcore_longctx.recipe.load import RecipeFile, dump_recipe
from mcore_longctx.recipe.resolve import Resolved, resolve
from mcore_longctx.recipe.schema import Recipe, Stage
from mcore_longctx.rope import explain

__all__ = ["Step", "plan_steps", "print_plan", "run_recipe"]


@dataclass(frozen=True)
class Step:
    """One step of a run.

    `keys` are the dotted recipe paths (prefixes) whose values decide the result, `files` the inputs from outside the run folder.
    """

    name: str
    stage: str | None
    about: tuple[str, ...]
    keys: tuple[str, ...]
    files: tuple[Path, ...]
    outputs: tuple[Path, ...]
    action: Callable[[], dict[str, Any] | None]


def print_plan(file: RecipeFile, *, until: str | None = None) -> None:
    """Print every step with its resolved settings. Needs neither torch nor the model's weights."""
    resolved = resolve(file, need_model=False)
    recipe = file.recipe
    print(f"{recipe.name}: {file.file}")
    print(f"run folder   {recipe.run_folder}")
    for label, text in _describe_model(recipe, resolved):
        print(f"{label:<12} {text}")
    steps = _until(plan_steps(file, resolved), until)
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.name}")
        for line in step.about:
            print(f"    {line}")


def run_recipe(file: RecipeFile, *, until: str | None = None) -> int:
    """Run the steps of a recipe, skipping what is finished.

    Returns:
        0 when every step is done, else the exit code of the step that stopped (75: stopped on a signal, start again to go on).

    Raises:
        ConfigError: bad recipe, or a finished step whose inputs have changed since.
        InUseError: another process works on the run folder.
    """
    resolved = resolve(file)
    recipe = replace(file.recipe, output=file.recipe.run_folder)
    folder = recipe.run_folder
    steps = _until(plan_steps(file, resolved), until)
    for step in steps:
        _check_inputs_exist(step)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        journal = _Journal(folder)
        stamps = {step.name: journal.stamp(step, recipe) for step in steps}
        for step in steps:
            journal.refuse_changes(step, stamps[step.name])
        write_atomic(folder / "recipe.yaml", dump_recipe(recipe))
        print(f"{recipe.name}: {len(steps)} steps into {folder}")
        for number, step in enumerate(steps, 1):
            head = f"[{number}/{len(steps)}] {step.name}"
            if journal.is_done(step):
                print(f"{head}: done before, skipped", flush=True)
                continue
            print(f"{head}: {step.about[0]}", flush=True)
            started = time.monotonic()
            journal.begin(step, stamps[step.name])
            try:
                facts = step.action()
            except LongctxError as error:
                journal.end(step, "stopped" if error.exit_code == 75 else "failed", time.monotonic() - started, {"error": str(error)})
                raise
            except BaseException as error:
                journal.end(step, "failed", time.monotonic() - started, {"error": repr(error)})
                raise
            journal.end(step, "done", time.monotonic() - started, facts or {})
            print(f"{head}: done in {time.monotonic() - started:.0f} s", flush=True)
    return 0


def plan_steps(file: RecipeFile, resolved: Resolved) -> list[Step]:
    """All steps of a recipe, in order."""
    recipe = file.recipe
    folder = recipe.run_folder
    steps = [_import_step(recipe, resolved, folder)]
    has_tasks = recipe.evaluate.needle is not None or recipe.evaluate.loss_by_position is not None
    if has_tasks:
        steps.append(_evaluate_step(recipe, folder, "before", "base", "own", f"the model as it is: {resolved.own_rope.describe()}"))
        steps.append(_evaluate_step(recipe, folder, "scaled", "base", "recipe", f"the model with the recipe's rope, not yet trained: {resolved.rope.describe()}"))
    for stage in recipe.stages:
        steps.append(_data_step(recipe, resolved, folder, stage))
        steps.append(_train_step(recipe, folder, stage))
        if has_tasks:
            steps.append(_evaluate_step(recipe, folder, stage.name, stage.name, "recipe", f"after stage {stage.name}", stage=stage.name))
    last = recipe.stages[-1]
    steps.append(_export_step(recipe, folder, last))
    steps.append(_verify_step(recipe, folder, last))
    steps.append(_report_step(folder))
    return steps


def _import_step(recipe: Recipe, resolved: Resolved, folder: Path) -> Step:
    base = folder / "checkpoints" / "base"

    def action() -> None:
        from mcore_longctx.convert import import_hf

        import_hf(recipe.model.path, base)

    return Step(
        "import",
        None,
        (f"{recipe.model.path} -> {base} (torch_dist)", f"carries the model's own rope: {resolved.own_rope.describe()}"),
        ("model",),
        (recipe.model.path,),
        (base,),
        action,
    )


def _evaluate_step(recipe: Recipe, folder: Path, column: str, checkpoint: str, rope: str, about: str, stage: str | None = None) -> Step:
    evaluate, parallel = recipe.evaluate, recipe.evaluate.parallel
    lines, files = [about], []
    if evaluate.needle is not None:
        needle = evaluate.needle
        cells = f"{len(needle.lengths)} lengths ({', '.join(f'{n:,}' for n in needle.lengths)}) x {needle.depths} depths x {needle.samples}"
        lines.append(f"needle: {cells} samples, {needle.digits}-digit keys, text from {needle.haystack}")
        files.append(needle.haystack)
    if evaluate.loss_by_position is not None:
        loss = evaluate.loss_by_position
        lines.append(
            f"loss by position: {loss.windows} windows of {loss.seq_length:,} tokens; short context: {loss.short_windows} windows of "
            f"{loss.short_length:,}; text from {loss.path}"
        )
        files.append(loss.path)
    lines.append(f"{parallel.describe()}, {evaluate.precision}")
    out = folder / "evaluate" / column

    def action() -> None:
        arguments = ["evaluate", str(folder / "recipe.yaml"), "--checkpoint", checkpoint, "--rope", rope, "--column", column]
        launch_ranks(arguments, parallel.world_size, log=folder / "logs" / f"evaluate-{column}")

    keys = ("model", "tokenizer", "evaluate", "seed") + (("rope",) if rope == "recipe" else ())
    return Step(f"evaluate-{column}", stage, tuple(lines), keys, tuple(dict.fromkeys(files)), (out,), action)


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
            f"taken {sampling.repetition:g} times; separator {section.separator!r}, no mask between documents; packing: {section.packing}",
        ]
    else:
        lines = [f"{stage.data}: chats -> samples of {stage.seq_length:,} tokens, loss on answers only", f"chats: {names}"]

    def action() -> dict[str, Any]:
        from mcore_longctx.data.build import build_pretrain, build_sft

        common: dict[str, Any] = {
            "tokenizer": recipe.tokenizer_folder,
            "model_vocab_size": resolved.shape.vocab_size,
            "seq_length": stage.seq_length,
            "seed": recipe.seed,
            "out": out,
        }
        if stage.kind == "pretrain":
            report = build_pretrain(section, stage.data, num_samples=samples, **common)
        else:
            report = build_sft(section, stage.data, **common)
        print(report)
        return {"samples": report.samples}

    keys = (f"data.{stage.data}", f"stages.{stage.name}.seq_length", f"stages.{stage.name}.train", f"stages.{stage.name}.global_batch_size", "tokenizer", "seed")
    files = tuple(source.path for source in section.sources)
    return Step(f"data-{stage.name}", stage.name, tuple(lines), keys, files, (out,), action)


def _train_step(recipe: Recipe, folder: Path, stage: Stage) -> Step:
    o, tokens = stage.optimizer, stage.iterations * stage.global_batch_size * stage.seq_length
    decay = f", cosine to {o.min_lr:g}" if o.lr_decay_style == "cosine" else ", constant"
    lines = (
        f"{stage.kind}: {stage.iterations:,} iterations x {stage.global_batch_size:,} sequences x {stage.seq_length:,} tokens = {tokens:,} tokens",
        f"{stage.parallel.describe()}; micro-batch {stage.micro_batch_size}, {stage.num_microbatches} micro-batches a step; {stage.precision}",
        f"AdamW lr {o.lr:g}{decay}, warm-up {o.lr_warmup_iters} iterations, betas {o.adam_beta1:g} {o.adam_beta2:g}, "
        f"weight decay {o.weight_decay:g}, clip {o.clip_grad:g}",
        f"a checkpoint every {stage.save_interval} iterations, the newest {stage.keep_checkpoints} are kept",
    )
    out = folder / "checkpoints" / stage.name

    def action() -> None:
        launch_ranks(
            ["train", str(folder / "recipe.yaml"), "--stage", stage.name],
            stage.parallel.world_size,
            log=folder / "logs" / f"train-{stage.name}",
            status=folder / "logs" / stage.name / "STATUS",
        )

    return Step(f"train-{stage.name}", stage.name, lines, (f"stages.{stage.name}", "rope", "seed"), (), (out,), action)


def _export_step(recipe: Recipe, folder: Path, stage: Stage) -> Step:
    out = folder / "export"

    def action() -> None:
        from mcore_longctx.convert import export_hf

        export_hf(newest_checkpoint(folder / "checkpoints" / stage.name), out)

    return Step("export", None, (f"checkpoints/{stage.name} -> {out} (Hugging Face safetensors, both rope spellings)",), ("rope",), (), (out,), action)


def _verify_step(recipe: Recipe, folder: Path, stage: Stage) -> Step:
    result = folder / "verify.json"

    def action() -> None:
        checkpoint = newest_checkpoint(folder / "checkpoints" / stage.name)
        launch_ranks(
            ["convert", "verify", str(checkpoint), str(folder / "export"), "--logits", "--json-file", str(result)],
            1,
            log=folder / "logs" / "verify",
        )

    about = ("the export against the checkpoint: every tensor bit for bit, inverse frequencies, logits up to the end of the new context",)
    return Step("verify", None, about, (), (), (result,), action)


def _report_step(folder: Path) -> Step:
    def action() -> None:
        from mcore_longctx.report import summary_table, write_report

        path = write_report(folder)
        print(summary_table(folder))
        print(f"report: {path}")

    return Step("report", None, (f"{folder / 'report.html'}: one page, no network needed",), (), (), (folder / "report.html",), action)


def newest_checkpoint(folder: Path) -> Path:
    """The newest finished checkpoint of a stage.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(path for path in folder.glob("iter_*") if (path / "manifest.json").is_file())
    if not found:
        raise ConfigError("no finished checkpoint here", where=folder, fix="run the training stage first")
    return found[-1]


def _describe_model(recipe: Recipe, resolved: Resolved) -> Iterator[tuple[str, str]]:
    shape = resolved.shape
    note = "" if resolved.model_found else " (not found here: sizes from the recipe)"
    yield "model", f"{recipe.model.path}{note}"
    yield (
        "",
        f"{shape.num_layers} layers, hidden {shape.hidden_size:,}, FFN {shape.ffn_hidden_size:,}, {shape.num_attention_heads} heads / "
        f"{shape.num_query_groups} KV x {shape.kv_channels}, vocabulary {shape.vocab_size:,}",
    )
    yield "tokenizer", str(recipe.tokenizer_folder)
    for i, line in enumerate(explain(resolved.rope).splitlines()):
        yield "rope" if i == 0 else "", line
    yield "phases", f"{recipe.rope.phase_dtype}"
    yield "seed", str(recipe.seed)


def _until(steps: list[Step], until: str | None) -> list[Step]:
    if until is None:
        return steps
    last = [i for i, step in enumerate(steps) if until in (step.name, step.stage)]
    if not last:
        stages = dict.fromkeys(step.stage for step in steps if step.stage)
        raise ConfigError(f"--until {until}: no such step or stage", fix=f"stages: {', '.join(stages)}; steps: {', '.join(s.name for s in steps)}")
    return steps[: last[-1] + 1]


def _check_inputs_exist(step: Step) -> None:
    for path in step.files:
        if not path.exists():
            raise ConfigError(f"step {step.name} needs it, but there is no such file or folder", where=path, fix="correct the path in the recipe")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the run folder; the kernel gives the lock back when the process ends, however it ends."""
    path = folder / ".lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InUseError(f"another run works on this folder ({file.read().strip()})", where=folder, fix="wait for it or use another output") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


class _Journal:
    """`run.json`: what each step was made from and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self.steps = {row["name"]: row for row in json.loads(self.path.read_text(encoding="utf-8"))["steps"]}
            except (ValueError, KeyError, TypeError):
                raise ConfigError("damaged", where=self.path, fix="use another output folder") from None
        elif any(entry.name not in (".lock", "recipe.yaml") for entry in folder.iterdir()):
            raise ConfigError("output folder is already there and is not a run folder (no run.json)", where=folder, fix="choose another output")

    def stamp(self, step: Step, recipe: Recipe) -> dict[str, Any]:
        """What a step is made from: recipe values by dotted path, and a sha256 per input file."""
        flat = dict(_flatten(yaml.safe_load(dump_recipe(recipe)), ""))
        values = {key: value for key, value in flat.items() if any(key == k or key.startswith(k) for k in step.keys)}
        known = {name: row for past in self.steps.values() for name, row in past.get("inputs", {}).get("files", {}).items()}
        return {"recipe": values, "files": {str(path): _file_stamp(path, known.get(str(path))) for path in _all_files(step.files)}}

    def refuse_changes(self, step: Step, stamp: dict[str, Any]) -> None:
        """Raise ConfigError when a finished or interrupted step was made from other inputs."""
        past = self.steps.get(step.name, {}).get("inputs")
        if past is None:
            return
        for key in sorted(past["recipe"].keys() | stamp["recipe"].keys()):
            old, new = past["recipe"].get(key), stamp["recipe"].get(key)
            if old != new:
                raise ConfigError(
                    f"{key} was {old!r} when step {step.name} ran, it is {new!r} now", where=self.path, fix="set it back, or use another output folder"
                )
        old_files = {name: row["sha256"] for name, row in past["files"].items()}
        new_files = {name: row["sha256"] for name, row in stamp["files"].items()}
        for name in sorted(old_files.keys() | new_files.keys()):
            if old_files.get(name) != new_files.get(name):
                verb = "is new" if name not in old_files else "is gone" if name not in new_files else "has changed"
                raise ConfigError(f"{name} {verb} since step {step.name} ran", where=self.path, fix="restore it, or use another output folder")

    def is_done(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("state") == "done" and all(path.exists() for path in step.outputs)

    def begin(self, step: Step, stamp: dict[str, Any]) -> None:
        self.steps[step.name] = {"name": step.name, "state": "running", "about": list(step.about), "inputs": stamp}
        self._write()

    def end(self, step: Step, state: str, seconds: float, facts: dict[str, Any]) -> None:
        outputs = [str(path.relative_to(self.folder)) for path in step.outputs]
        earlier = float(self.steps[step.name].get("seconds", 0.0))
        self.steps[step.name] |= {"state": state, "seconds": round(earlier + seconds, 1), "outputs": outputs, **facts}
        self._write()

    def _write(self) -> None:
        text = {"format": 1, "name": self.folder.name, "versions": versions(), "steps": list(self.steps.values())}
        write_atomic(self.path, json.dumps(text, indent=1) + "\n")


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
