"""`mcore-longctx plan`: what is printed, and one line for what cannot be planned."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.plan.tables import duration, size

EXTEND = ["plan", "ultralong-8b-4m", "--stage", "extend"]
WITHOUT = ["plan", "--model", "llama-3.1-8b", "--seq-length", "4M", "--gpus", "256"]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def as_json(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    return json.loads(printed([*arguments, "--json"], capsys, code))


def test_a_recipe_is_priced_stage_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["plan", "ultralong-8b-4m"], capsys)
    assert text.count("as written: ") == 2
    assert "stage extend: 8M tokens a step (2 x 4M), 150 steps, 1.26B tokens" in text
    assert "stage instruct: 1M tokens a step (128 x 8K)" in text
    assert text.count("evaluation, each model:") == 1
    assert text.count("accuracy: ") == 1


def test_a_page_has_everything_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(EXTEND, capsys)
    for words in (
        "tokens/s/GPU",
        "MFU",
        "(causal)",
        " h for 150 steps",
        "weights",
        "attention backward",
        "host memory of a node: ",
    ):
        assert words in text
    assert re.search(r"key/value exchange: .* its ring hides behind", text)
    assert re.search(r"best: TP 8 x CP 16 p2p x DP 2, attention_kept, \d+ s a step, because", text)
    assert "does not work beside it:" in text
    assert re.search(r"a job of 04:00:00 holds \d+ steps, the stage takes \d such jobs", text)
    assert re.search(r"signalled \d+ s\s+before the limit", text)
    assert re.search(r"save every \d+ steps \(the recipe: 5\)", text)
    assert re.search(r"process groups wait\s+\d+ min", text)


def test_lines_fit_in_100_columns_but_for_what_is_copied(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        ["plan", "ultralong-8b-4m", "--gpus", "512"],
        [*EXTEND, "--gpus", "64", "stages.extend.activations.recompute=none"],
        [*WITHOUT, "--gpu", "b200", "--top", "30"],
        ["plan", "--model", "llama-3.1-70b", "--seq-length", "1M", "--gpus", "256"],
    ]
    for command in arguments:
        main(command)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 20
        assert not [line for line in lines if len(line) > 100 and "stages." not in line]


def test_the_overrides_that_are_proposed_are_the_layout_that_was_priced(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    text = printed([*EXTEND, "--gpus", "64"], capsys)
    overrides = [shlex.split(line.strip())[0] for line in text.splitlines() if line.strip().startswith(("'stages.", "stages."))]
    assert len(overrides) == 4
    best = as_json([*EXTEND, "--gpus", "64"], capsys)["stages"][0]["best"]
    again = as_json([*EXTEND, *overrides], capsys)["stages"][0]
    assert again["gpus"] == 64
    assert again["written"] == best


def test_terms_add_up_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    stage = as_json(EXTEND, capsys)["stages"][0]
    written = stage["written"]
    assert sum(term["value"] for term in written["time_terms"]) == pytest.approx(written["step_seconds"])
    at_peak = [term["value"] for term in written["memory_terms"] if "not at the peak" not in term["note"]]
    assert sum(at_peak) == pytest.approx(written["memory_bytes"])
    assert written["tokens_per_second_per_gpu"] == pytest.approx(stage["tokens_per_step"] / written["step_seconds"] / 256)
    assert written["hours"] == pytest.approx(150 * written["step_seconds"] / 3600)
    assert {"layouts", "impossible", "refused_sizes", "why_best", "breaks_nearby"} <= set(stage)
    assert all("problem" in entry for entry in stage["impossible"])


def test_explain_has_every_term_with_its_formula_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([*EXTEND, "--explain"], capsys)
    written = as_json(EXTEND, capsys)["stages"][0]["written"]
    in_bytes = [*written["memory_terms"], *written["host_terms"]]
    terms = [(size(term["value"]), term) for term in in_bytes] + [
        (duration(term["value"]), term) for term in written["time_terms"]
    ]
    assert len(terms) > 20
    for value, term in terms:
        assert re.search(
            rf"^  {re.escape(term['name'])} +{re.escape(value)} += {re.escape(term['formula'])}$", text, re.MULTILINE
        ), term
        assert term["numbers"] in text
    for term in written["interval_terms"]:
        assert f"= {term['formula']}\n" in text


def test_what_does_not_fit_ends_with_1_and_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([*EXTEND, "stages.extend.activations.recompute=none", "stages.extend.activations.mlp_tile=null"], capsys, 1)
    assert re.search(r"DOES NOT FIT: \d+ GB a GPU, \d+ GB over 73.6 \(92% of 80 GB\); largest: kept\s+activations \d+ GB", text)
    assert re.search(r"change:\s+activations.offload_fraction,\s+or\s+a\s+larger\s+CP\s+or\s+TP", text)
    assert "nearest to the recipe that fits: TP 8 x CP 16 p2p x DP 2" in text


def test_too_few_gpus_name_the_smallest_number_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["plan", "--model", "llama-3.1-8b", "--seq-length", "4M", "--gpus", "8"], capsys, 1)
    assert "no layout of 8 GPUs fits" in text
    assert "smallest that fits: 32 GPUs" in text
    stage = as_json(["plan", "--model", "llama-3.1-8b", "--seq-length", "4M", "--gpus", "8"], capsys, 1)["stages"][0]
    assert stage["smallest_gpus_that_fit"] == 32
    assert stage["best"] is None


def test_a_time_limit_that_launch_would_refuse_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed([*EXTEND, "cluster.time_limit=00:10:00"], capsys)
    assert re.search(r"REFUSED by launch: .*00:10:00", text)


def test_a_model_folder_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = as_json(["plan", "--model", str(tmp_path), *WITHOUT[3:]], capsys)["stages"][0]
    known = as_json(WITHOUT, capsys)["stages"][0]
    assert folder["best"] == known["best"]


def test_a_faster_kernel_and_another_gpu_change_the_price(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {
        options: as_json([*WITHOUT, *options], capsys)["stages"][0]["best"]["step_seconds"]
        for options in ((), ("--kernel", "fa3"), ("--gpu", "b200"))
    }
    assert seconds[("--kernel", "fa3")] < 0.9 * seconds[()]
    assert seconds[("--gpu", "b200")] < 0.7 * seconds[()]


def test_a_site_brings_its_own_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = tmp_path / "site.yaml"
    site.write_text("gpus:\n  our-h100:\n    like: h100-80gb\n    memory_bytes: 60e9\n")
    command = [*EXTEND, "--gpu", "our-h100", "--hardware", str(site)]
    assert "of 60 GB a GPU" in printed(command, capsys)
    assert as_json([*EXTEND, f"cluster.hardware={site}", "cluster.gpu=our-h100"], capsys) == as_json(command, capsys)


def test_validation_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["plan", "--validate"], capsys)
    assert "ultra-4m" in text
    assert "mean absolute error" in text


def test_validation_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(["plan", "--validate"], capsys)
    row = next(row for row in report["rows"] if row["id"] == "ultra-4m")
    assert row["time"]["measured"] > 0
    assert report["time"]["held"]["rows"] > report["long_time"]["rows"] > 0


def test_float32_is_not_priced_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed([*EXTEND, "stages.extend.precision=fp32"], capsys).split())
    assert "note: precision fp32: the plan prices products and attention at bf16 speed" in text


def test_one_gpu_is_one_and_no_heading_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["plan", "--model", "llama-3.1-8b", "--seq-length", "1M", "--gpus", "1"], capsys, 1)
    assert "no layout of 1 GPU fits\n" in text
    assert "sizes that do not divide" not in text


def test_a_validation_file_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.yaml").write_text("points: 3\n")
    assert main(["plan", "--validate", str(tmp_path / "rows.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_serving_is_planned_for_the_length_of_the_rope(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(["plan", "ultralong-8b-4m", "--serve"], capsys)
    assert "one request of 4M tokens: keys and values 550 GB in bf16" in text
    assert "vllm serve runs/ultralong-8b-4m/export --max-model-len 4194304 --tensor-parallel-size 16" in text
    plan = json.loads(
        printed(["plan", "--serve", "--model", "llama-3.1-8b", "--seq-length", "1M", "--gpu", "h200", "--json"], capsys)
    )
    assert {row["gpu"] for row in plan["rows"]} == {"h200-141gb"}
    assert [row["gpus"] for row in plan["rows"]] == [2, 1, 1]


def test_a_plot_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed([*EXTEND, "--plot", str(tmp_path / "plan.png")], capsys)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plan"], "plan needs a recipe, or --model with --seq-length and --gpus; see mcore-longctx plan --help"),
        ([*EXTEND[:3], "extnd"], "no stage 'extnd'; did you mean 'extend'? stages: extend, instruct"),
        ([*EXTEND, "--gpu", "h10-80gb"], "no GPU 'h10-80gb' in the hardware table; did you mean 'h100-80gb'? known: "),
        ([*WITHOUT, "--gpu", "h10-80gb"], "no GPU 'h10-80gb' in the hardware table; did you mean 'h100-80gb'? known: "),
        ([*EXTEND, "--kernel", "fa9"], "h100-80gb has no attention kernel 'fa9'; it has "),
        ([*EXTEND, "--gpus", "250"], "stage extend: 250 GPUs do not fill nodes of 8; nearest that work: 128 and 256"),
        ([*EXTEND, "--gpus", "480"], "nearest that work: 256 and 512"),
        ([*EXTEND, "--gpus", "many"], "--gpus many: a whole number above 0 is wanted"),
        ([*EXTEND, "--gpus", "-8"], "--gpus -8: a whole number above 0 is wanted"),
        ([*EXTEND, "--gpus", "99999999999"], "99,999,999,999 GPUs are more than 512 nodes of 8; plan for 4,096 or fewer"),
        (["plan", "--validate", "--gpu", "h200"], "--gpu has no effect with --validate; leave out --gpu"),
        ([*EXTEND, "--validate"], "RECIPE has no effect with --validate"),
        (["plan", "--serve", *WITHOUT[1:]], "--gpus has no effect with --serve"),
        (["plan", "tiny-cpu", "--serve", "--plot", "x.png"], "--plot has no effect with --serve"),
        ([*EXTEND, "--json", "--explain"], "--explain has no effect with --json"),
        ([*EXTEND, "--train-tokens", "2B"], "--train-tokens belongs to --model"),
        (
            [
                *EXTEND,
                "model.backend=te",
                "stages.extend.parallel={tensor_model_parallel_size: 1, context_parallel_size: 32, cp_comm_type: a2a}",
            ],
            "TransformerEngine's a2a over 32 ranks cannot divide 8 key heads",
        ),
        ([*EXTEND, "--top", "0"], "--top 0: a whole number above 0 is wanted"),
        (
            [*EXTEND, "cluster.gpu=none"],
            "cluster.gpu: there is no formula for ranks on CPUs; name a GPU, for example --gpu h100-80gb",
        ),
        (
            [*EXTEND, "stages.extend.seq_length=4000001"],
            "seq_length 4,000,001 is not a multiple of 2 x context_parallel_size (32)",
        ),
        ([*EXTEND, "--seq-length", "1M"], "--seq-length belongs to --model"),
        (["plan", "--model", "lama-3.1-8b", *WITHOUT[3:]], "no model 'lama-3.1-8b' is known; did you mean 'llama-3.1-8b'?"),
        (["plan", "--model", "llama-3.1-8b", "--gpus", "8"], "--model needs --seq-length"),
        (["plan", "--model", "llama-3.1-8b", "--seq-length", "4M"], "--model needs --gpus"),
        (["plan", "tiny-cpu", *WITHOUT[1:]], "--model is for plans without a recipe"),
        ([*WITHOUT[:4], "4.5.6M", *WITHOUT[5:]], "--seq-length: '4.5.6M' is not a token count"),
        ([*WITHOUT, "--tokens-per-step", "6M"], "is no multiple of --seq-length 4,194,304; nearest: 4,194,304 or 8,388,608"),
        ([*WITHOUT, "--train-tokens", "0"], "--train-tokens 0: more than 0 tokens are wanted"),
        ([*WITHOUT[:4], "1000001", *WITHOUT[5:], "--gpus", "512"], "CP 2: seq_length 1,000,001 is not a multiple of"),
        (["plan", "ultralong-8b-4m", "--plot", "x.png"], "--plot draws one stage; add --stage, one of extend, instruct"),
        ([*EXTEND, "--plot", "x.txt"], "--plot x.txt: a picture ends in"),
        ([*EXTEND, "--plot", "no/such/folder/x.png"], "no/such/folder/x.png: cannot be written: No such file or directory"),
        ([*EXTEND, "--hardware", "missing.yaml"], "missing.yaml: cannot be read: No such file or directory"),
        (["plan", "--serve", "--model", "llama-3.1-8b"], "--serve needs --seq-length"),
        (["plan", "--validate", "missing.yaml"], "missing.yaml"),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_512_gpus_take_less_than_a_second_of_cpu_and_no_heavy_library() -> None:
    code = (
        "import sys\nfrom mcore_longctx.cli.main import main\n"
        "assert main(['plan', 'ultralong-8b-4m', '--stage', 'extend', '--gpus', '512']) == 0\n"
        "heavy = {'torch', 'matplotlib', 'transformers', 'jinja2'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    )  # 0.7 s alone on the machine; busy cores get room
