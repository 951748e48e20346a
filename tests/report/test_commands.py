"""The commands for an exported folder: those that this machine can run are run, the others held against what they are made from."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mcore_longctx.convert.checks.commands import GPU_BYTES, serve_commands, smallest_layout
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.report import write_report
from mcore_longctx.report.commands import LM_EVAL_FOLDER, LM_EVAL_TASKS, export_commands
from mcore_longctx.report.run_folder import RunFolder
from mcore_longctx.report.sections.export import _settings

from . import made_up_run as made_up
from .test_report import Words

ROOT = Path(__file__).parents[2]
WEIGHTS = 16_060_000_000
LENGTH = 4_194_304


def commands(path="runs/a run/export", shape=made_up.LONG_SHAPE, length=LENGTH, weight_bytes=WEIGHTS, **more):
    return dict(export_commands(shape, length, weight_bytes=weight_bytes, path=path, **more))


def test_a_run_without_an_export_has_no_commands_and_one_with_it_names_its_path(tmp_path):
    run = made_up.make_run(tmp_path / "tiny")
    assert 'id="serving"' not in write_report(run).read_text(encoding="utf-8")
    export = run / "export"
    export.mkdir()
    with (export / "model.safetensors").open("wb") as file:
        file.truncate(3_000_000)
    words = Words(write_report(run).read_text(encoding="utf-8")).words
    assert "# flags read in source (vLLM 0.33.0, SGLang 0.5.23), none run; sizes derived" in words
    assert f"vllm serve {export} --max-model-len 4096 --tensor-parallel-size 1 --max-num-seqs 2" in words
    assert f"--model-path {export} --context-length 4096" in words
    assert f"--model_args pretrained={export},dtype=bfloat16,max_length=4096 --include_path examples/lm_eval_tasks" in words
    assert f"AutoTokenizer.from_pretrained('{export}')" in words
    assert '"max_seq_lengths": [1024, 2048, 4096], "haystack": "examples/documents/heldout", "samples": 3' in words


def test_vllm_is_served_as_convert_check_says():
    assert commands()["vLLM and SGLang"] == serve_commands(
        made_up.LONG_SHAPE, LENGTH, weight_bytes=WEIGHTS, path="runs/a run/export"
    )


def test_lm_eval_gets_the_lengths_the_folder_and_vllms_layout():
    asked = {"max_seq_lengths": [131_072, LENGTH, 2 * LENGTH], "haystack": "a file's name", "samples": 25, "seed": 7}
    lines = [shlex.split(line) for line in commands(settings=asked)["lm-evaluation-harness"] if not line.startswith("#")]
    assert [line[:3] for line in lines] == [["lm_eval", "--model", "hf"], ["lm_eval", "--model", "vllm"]]
    layout = smallest_layout(made_up.LONG_SHAPE, LENGTH, weight_bytes=WEIGHTS, kv="bf16", gpu_bytes=GPU_BYTES["H100"])
    for line in lines:
        options = dict(zip(line[1::2], line[2::2], strict=False))
        arguments = dict(pair.split("=") for pair in options["--model_args"].split(","))
        assert arguments["pretrained"] == "runs/a run/export"
        assert json.loads(options["--metadata"]) == asked | {"max_seq_lengths": [131_072, LENGTH]}
        if options["--model"] == "vllm":
            assert arguments["max_model_len"] == str(LENGTH)
            assert int(arguments["tensor_parallel_size"]) == layout.tp > 1
            assert int(arguments.get("decode_context_parallel_size", 1)) == layout.dcp
        else:
            assert arguments["max_length"] == str(LENGTH)
    assert "[1048576, 4194304]" in commands()["lm-evaluation-harness"][1]  # nothing measured: the model's length and a quarter


def test_the_tasks_that_lm_eval_is_told_of_are_there():
    names = set()
    for file in (ROOT / LM_EVAL_FOLDER).glob("*.yaml"):
        found = yaml.load(re.sub(r"!function ", "", file.read_text(encoding="utf-8")), yaml.SafeLoader)
        names |= {name for name in (found.get("task"), found.get("group")) if isinstance(name, str)}
    assert set(LM_EVAL_TASKS) <= names


def test_a_path_that_model_args_would_divide_is_said_aloud():
    assert any("divided at" in line for line in commands("runs/a,b/export")["lm-evaluation-harness"])
    assert not any("divided at" in line for line in commands()["lm-evaluation-harness"])


def test_the_transformers_lines_run_as_they_are(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder = tmp_path / "a 'quoted' run" / "export"
    shutil.copytree(ROOT / "examples" / "tiny-llama", folder)
    shape = made_up.SHAPE
    lines = commands(str(folder), shape, 512, 3_000_000)["transformers"]
    (tmp_path / "prompt.txt").write_text("The pass key for dolu is 482.\nThe pass key for dolu is", encoding="utf-8")
    script = "\n".join(lines).replace("python -", f"{shlex.quote(sys.executable)} -", 1)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (["evaluate.seed=7"], {"seed": 7}),
        (["evaluate.level=publish"], {"samples": 100}),
        (["evaluate.ruler=null"], {"max_seq_lengths": None, "samples": None}),
        (["evaluate.ruler=null", "evaluate.needle=null"], {"haystack": None, "max_seq_lengths": None, "samples": None}),
    ],
)
def test_lm_eval_is_given_the_settings_that_the_run_measured_with(tmp_path, settings, wanted):
    recipe = open_recipe("tiny-cpu", settings).recipe
    plain = open_recipe("tiny-cpu", []).recipe
    found = _settings(RunFolder(tmp_path, recipe, {}, [], {}, {}, {}, None, []))
    expected = {"seed": plain.seed, "haystack": str(plain.evaluate.needle.haystack)}
    expected |= {"max_seq_lengths": [int(one) for one in plain.evaluate.ruler.lengths], "samples": plain.evaluate.ruler.samples}
    assert str(plain.evaluate.ruler.haystack) == expected["haystack"]
    assert found == {key: value for key, value in (expected | wanted).items() if value is not None}
