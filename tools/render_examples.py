"""Write what is derived in examples/ultralong_8b_*: the job scripts of each recipe, and the README with the planned numbers.

    python tools/render_examples.py                     the examples of this clone
    python tools/render_examples.py examples OUT        into another folder, for the test that compares them

The recipes themselves are written by hand. Run this again when a recipe, the plan or a job script changes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2

from mcore_longctx.cli.main import main as mcore_longctx
from mcore_longctx.convert.checks.commands import serve_commands
from mcore_longctx.plan.models import parameters
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve

VARIANTS = {256: "recipe.yaml", 64: "recipe_64gpu.yaml", 32: "recipe_32gpu.yaml"}
LENGTHS = {"1m": ("1M", 2**20), "2m": ("2M", 2**21), "4m": ("4M", 2**22)}


def render(example: Path, out: Path) -> None:
    """Write `out/README.md` and `out/slurm/` for the recipes in `example`."""
    tag = example.name.removeprefix("ultralong_8b_")
    length, tokens = LENGTHS[tag]
    plans = {gpus: planned(example / name) for gpus, name in VARIANTS.items()}
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    ).get_template("example_readme.md.j2")
    text = template.render(
        folder=example.name,
        preset=f"ultralong-8b-{tag}",
        length=length,
        variants=[{"gpus": gpus} for gpus in VARIANTS],
        rows=[{"name": name, "values": values} for name, values in table(list(plans.values()))],
        serve=serving(example / VARIANTS[256], tokens, f"runs/ultralong-8b-{tag}/export"),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text, encoding="utf-8")
    for gpus, name in VARIANTS.items():
        write_scripts(example / name, out / "slurm" / f"{gpus}gpu", all_jobs=gpus == max(VARIANTS))


def planned(recipe: Path) -> dict[str, Any]:
    """`plan RECIPE --json`, the stages by name."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = mcore_longctx(["plan", str(recipe), "--json"])
    if code:
        raise SystemExit(f"{recipe}: plan ends with {code}")
    return {stage["stage"]: stage for stage in json.loads(said.getvalue())["stages"]}


def table(plans: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the README: one value a recipe."""
    extend, instruct = ([plan[name]["written"] for plan in plans] for name in ("extend", "instruct"))
    rows = {
        "layout of `extend`": [layout(it) for it in extend],
        "kept activations on the host": [f"{it['offload_fraction']:.0%}" for it in extend],
        "step of `extend`": [f"{it['step_seconds']:,.0f} s" for it in extend],
        "tokens/s/GPU": [f"{it['tokens_per_second_per_gpu']:,.0f}" for it in extend],
        "MFU, causal": [f"{it['mfu']:.0%}" for it in extend],
        "hours of `extend`": [f"{it['hours']:,.1f}" for it in extend],
        "minutes of `instruct`": [f"{60 * it['hours']:,.0f}" for it in instruct],
        "memory of a GPU": [f"{it['memory_bytes'] / 1e9:,.1f} GB" for it in extend],
        "host memory of a node": [f"{it['host_bytes_per_node'] / 1e9:,.0f} GB" for it in extend],
        "one checkpoint": [f"{it['intervals']['checkpoint_bytes'] / 1e9:,.0f} GB" for it in extend],
        "ranks wait for each other": [f"{it['intervals']['distributed_timeout_seconds'] / 60:,.0f} min" for it in extend],
        "signal before the time limit": [f"{it['intervals']['signal_lead_seconds']:,.0f} s" for it in extend],
    }
    return list(rows.items())


def layout(it: dict[str, Any]) -> str:
    """`TP 8 x CP 16 x DP 2`."""
    sizes = {"TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size"}
    sizes |= {"CP": "context_parallel_size", "DP": "data_parallel_size"}
    return " x ".join(f"{name} {it[key]}" for name, key in sizes.items() if name != "PP" or it[key] > 1)


def serving(recipe: Path, tokens: int, folder: str) -> list[str]:
    """What `convert check` prints of the export: sizes as comments, and a command for vLLM a type of key/value cache."""
    shape = resolve(open_recipe(recipe), need_model=False).shape
    lines = serve_commands(shape, tokens, weight_bytes=2 * parameters(shape), path=folder)
    return [line for line in lines if line.startswith(("#", "vllm"))]


def write_scripts(recipe: Path, out: Path, *, all_jobs: bool) -> None:
    """The scripts of `launch`, as they are written into a run folder: all of them, or those of the training jobs."""
    text = recipe.read_bytes()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(scratch):
        # by its bare name: nothing that is written may depend on where this clone lies
        Path("recipe.yaml").write_bytes(text)
        if code := mcore_longctx(["launch", "recipe.yaml"]):
            raise SystemExit(f"{recipe}: launch ends with {code}")
        (slurm,) = Path("runs").glob("*/slurm")
        scripts = {path.name: path.read_bytes() for path in slurm.iterdir() if path.suffix in (".sbatch", ".sh")}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, script in sorted(scripts.items()):
        if all_jobs or b"torchrun --node_rank" in script:
            (out / name).write_bytes(script)


def main(arguments: list[str]) -> None:
    """See the module."""
    examples = Path(arguments[0] if arguments else Path(__file__).parents[1] / "examples").absolute()
    out = Path(arguments[1]).absolute() if len(arguments) > 1 else examples
    os.environ.pop("SLURM_JOB_ID", None)
    for example in sorted(examples.glob("ultralong_8b_*")):
        render(example, out / example.name)


if __name__ == "__main__":
    main(sys.argv[1:])
