"""examples/ultralong_8b_*: recipes that are the presets, scripts and numbers that are what the commands say today."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcore_longctx.cli.main import parse
from mcore_longctx.recipe.load import dump_recipe, load_recipe
from tests.scripts import check_scripts

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("ultralong_8b_*"))
RECIPES = {"256 GPUs": "recipe.yaml", "64 GPUs": "recipe_64gpu.yaml", "32 GPUs": "recipe_32gpu.yaml"}
SCRIPTS = sorted(path for example in EXAMPLES for path in example.glob("slurm/*/*"))
# what a cluster decides; all else decides the losses and is the preset's
OF_THE_CLUSTER = re.compile(
    r"name|cluster\..*|evaluate\.parallel\..*|stages\.\d\.(parallel\..*|activations\.offload_fraction|save_interval|async_save)"
)


def names(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{at}.{i}")
    else:
        yield at, value


def plain(recipe: str) -> dict[str, Any]:
    return dict(flat(yaml.safe_load(dump_recipe(load_recipe(recipe)))))


@cache
def planned(recipe: Path) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "mcore_longctx", "plan", str(recipe), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return {stage["stage"]: stage for stage in json.loads(result.stdout)["stages"]}


def test_there_are_three_lengths_of_three_sizes() -> None:
    assert [example.name for example in EXAMPLES] == ["ultralong_8b_1m", "ultralong_8b_2m", "ultralong_8b_4m"]
    assert all((example / name).is_file() for example in EXAMPLES for name in RECIPES.values())
    assert len(SCRIPTS) == 3 * (8 + 2 + 2)  # the chain and submit.sh; both training jobs


def test_rendered_again_nothing_differs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/render_examples.py"), str(ROOT / "examples"), str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(ROOT / "examples"): path.read_text() for path in [*SCRIPTS, *(e / "README.md" for e in EXAMPLES)]}
    assert fresh.keys() == kept.keys()
    different = [str(path) for path in fresh if fresh[path] != kept[path]]
    assert not different, f"python tools/render_examples.py writes these anew: {different}"


@pytest.mark.parametrize("recipe", [example / name for example in EXAMPLES for name in RECIPES.values()], ids=names)
def test_a_recipe_differs_from_its_preset_in_what_a_cluster_decides(recipe: Path) -> None:
    ours, preset = plain(str(recipe)), plain(recipe.parent.name.replace("_", "-"))
    different = {key for key in ours.keys() | preset.keys() if ours.get(key) != preset.get(key)}
    assert not {key for key in different if not OF_THE_CLUSTER.fullmatch(key)}
    gpus = 256 if recipe.name == "recipe.yaml" else int(re.findall(r"\d+", recipe.name)[0])
    assert {stage.parallel.world_size for stage in load_recipe(recipe).stages} == {gpus}


@pytest.mark.parametrize("recipe", [example / name for example in EXAMPLES for name in RECIPES.values()], ids=names)
def test_the_planner_says_that_it_fits(recipe: Path) -> None:
    for stage in planned(recipe).values():
        assert stage["written"]["fits"]
        assert stage["written"]["memory_bytes"] < 0.92 * 80e9


def readme_table(example: Path) -> dict[str, dict[str, str]]:
    """Column -> row -> text."""
    lines = [line for line in (example / "README.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {column: {row[0]: row[i] for row in rows} for i, column in enumerate(head) if i}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_number_of_the_readme_is_the_plans(example: Path) -> None:
    columns = readme_table(example)
    assert list(columns) == list(RECIPES)
    for column, name in RECIPES.items():
        stages = planned(example / name)
        extend, instruct = stages["extend"]["written"], stages["instruct"]["written"]
        memory, host, checkpoint = extend["memory_bytes"], extend["host_bytes_per_node"], extend["intervals"]["checkpoint_bytes"]
        expected = {
            "step of `extend`": (extend["step_seconds"], 0.5),
            "tokens/s/GPU": (extend["tokens_per_second_per_gpu"], 0.5),
            "hours of `extend`": (150 * extend["step_seconds"] / 3600, 0.05),
            "minutes of `instruct`": (stages["instruct"]["iterations"] * instruct["step_seconds"] / 60, 0.5),
            "MFU, causal": (100 * extend["mfu"], 0.5),
            "memory of a GPU": (memory / 1e9, 0.05),
            "host memory of a node": (host / 1e9, 0.5),
            "one checkpoint": (checkpoint / 1e9, 0.5),
            "ranks wait for each other": (extend["intervals"]["distributed_timeout_seconds"] / 60, 0.5),
            "signal before the time limit": (extend["intervals"]["signal_lead_seconds"], 0.5),
            "kept activations on the host": (100 * load_recipe(example / name).stages[0].activations.offload_fraction, 0.5),
        }
        parallel = load_recipe(example / name).stages[0].parallel
        layout = f"TP 8 x CP {parallel.context_parallel_size} x DP {parallel.data_parallel_size}"
        assert columns[column]["layout of `extend`"] == layout
        assert columns[column].keys() == expected.keys() | {"layout of `extend`"}
        for row, (value, rounding) in expected.items():
            (number,) = re.findall(r"[\d,.]+", columns[column][row])
            assert float(number.replace(",", "")) == pytest.approx(value, abs=rounding * 1.001), (column, row)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parts[-4]}-{path.parts[-2]}-{path.name}")
def test_a_script_knows_no_machine(script: Path) -> None:
    assert not re.search(r"/(?:root|home|work|Users)/|/tmp/(?!triton)", script.read_text())


def test_bash_and_shellcheck_take_every_script() -> None:
    check_scripts(*SCRIPTS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_commands_of_the_readme_are_commands(example: Path) -> None:
    text = (example / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ours = [shlex.split(line) for line in lines if line.startswith("mcore-longctx")]
    assert {words[1] for words in ours} == {"convert", "doctor", "plan", "launch", "report"}
    for words in ours:
        parse(words[1:])
    assert {line.split()[0] for line in lines} - {"#", "mcore-longctx"} == {"hf", "squeue", "tail", "vllm"}
    assert f"--max-model-len {load_recipe(example / 'recipe.yaml').stages[0].seq_length}" in text
    assert "planned, not measured" in text.lower()
