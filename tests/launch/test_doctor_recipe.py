"""`doctor RECIPE`: what would fail is found before anything starts, each with a fault planted."""

import math
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_longctx.launch import doctor
from mcore_longctx.launch.doctor import Finding, stages, storage
from mcore_longctx.launch.doctor import rope as rope_checks
from mcore_longctx.launch.doctor.probes import Probe
from mcore_longctx.recipe.card import CheckpointCard, write_card
from mcore_longctx.recipe.load import RecipeFile, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.rope import RopeScaling, write_hf_rope

ROOT = Path(__file__).parents[2]
MODEL = f"model.path={ROOT / 'examples/tiny-llama'}"


def texts(findings: Iterable[Finding], level: str) -> dict[str, str]:
    return {finding.subject: f"{finding.text}; {finding.fix}" for finding in findings if finding.level == level}


def wrong(findings: Iterable[Finding]) -> list[str]:
    return [f"{finding.subject}: {finding.text}; {finding.fix}" for finding in findings if finding.level == "wrong"]


# ---------------------------------------------------------------------------------------------------------------------- the whole


def test_the_tiny_recipe_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    findings, resolved = doctor.examine_recipe(open_recipe("tiny-cpu", [f"output={tmp_path / 'run'}", "cluster.gpu=none"]))
    assert not wrong(findings)
    assert resolved is not None
    assert resolved.model_found
    fine = texts(findings, "ok")
    assert {"layout", "model", "disk", "run folder", "clock", "rope as built", "attention mask", "host memory"} <= fine.keys()
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------------ rope as built


def build(recipe: str, *overrides: str) -> tuple[RecipeFile, dict[str, Any], RopeScaling]:
    """What a model of the recipe has, built in a process of its own."""
    file = open_recipe(recipe, overrides)
    resolved = resolve(file, need_model=False)
    with Probe("-m", "mcore_longctx.model.as_built", question=rope_checks.question(file.recipe, resolved)) as probe:
        return file, probe.answer(), resolved.rope


def transformers_rope(rope: RopeScaling) -> Any:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(LlamaConfig(head_dim=128, hidden_size=256, num_attention_heads=2, **write_hf_rope(rope)))


YARN = ("rope.type=yarn", "rope.beta_fast=4", "rope.beta_slow=1")


@pytest.mark.parametrize(
    ("overrides", "temperature"), [((), 1.0), (("rope.phase_dtype=float64",), 1.0), (YARN, 0.1 * math.log(512) + 1)]
)
def test_the_rope_that_is_built_is_the_recipes_and_that_of_transformers(overrides: tuple[str, ...], temperature: float) -> None:
    file, found, rope = build("ultralong-8b-4m", *overrides)
    findings = list(rope_checks.as_built(found, file.recipe, rope))
    assert not wrong(findings)
    oracle = transformers_rope(rope)
    np.testing.assert_allclose(found["inv_freq"], oracle.inv_freq.double().numpy(), rtol=6e-7)
    assert oracle.attention_scaling == pytest.approx(temperature)
    assert found["softmax_scale"] == pytest.approx(temperature**2 / math.sqrt(128))
    said = " ".join(finding.text for finding in findings)
    assert f"temperature {temperature:.6g}" in said
    assert "effective context 4,194,304 tokens" in said
    if rope.type == "llama3":  # what stock flags would build is the rope that Llama 3.1 comes with
        llama_31 = RopeScaling(type="llama3", head_dim=128, rope_theta=5e5, factor=8.0, original_max_position_embeddings=8192)
        np.testing.assert_allclose(found["stock"], transformers_rope(llama_31).inv_freq.double().numpy(), rtol=6e-7)
        assert "64 times apart" in texts(findings, "note")["stock Megatron-LM"]


PLANTED = """
import mcore_longctx.model.rotary as r, mcore_longctx.model.builder as b
r.hf_inverse_frequencies = lambda s, real=r.hf_inverse_frequencies: real(s).bfloat16().float()
r.LongContextRotary.angles = lambda self, p, real=r.LongContextRotary.angles: real(self, p - 1)
b.transformer_config = lambda *a, real=b.transformer_config, **k: real(*a, **(k | {"softmax_scale": 128 ** -0.5}))
"""


def test_a_model_that_is_built_with_another_rope_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)  # frequencies in bf16, positions off by one, YaRN's temperature lost
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    file, found, rope = build("ultralong-8b-4m", *YARN)
    said = wrong(rope_checks.as_built(found, file.recipe, rope))
    assert len(said) == 3, said
    assert "times as fast" in said[0]
    assert "the recipe's scale is 0.233" in said[1]
    assert "angles at the end" in said[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda w: [*w[:40], w[40] * (1 + 1e-5), *w[41:]], "pair 40 turns 1.00001"), (lambda w: w[1:], "the recipe has 64")],
)
def test_one_frequency_that_is_off_by_more_than_rounding_is_seen(change: Callable[[list[float]], list[float]], said: str) -> None:
    file = open_recipe("ultralong-8b-4m")
    rope = resolve(file, need_model=False).rope
    exact = rope.frequencies()[0].tolist()
    found = {"module": "M", "device": "cpu", "transformers": None, "stock": None, "softmax_scale": 128**-0.5, "angle_error": 0.0}
    assert not wrong(rope_checks.as_built(found | {"inv_freq": exact}, file.recipe, rope))
    assert said in wrong(rope_checks.as_built(found | {"inv_freq": change(exact)}, file.recipe, rope))[0]


def test_a_model_that_cannot_be_built_is_a_fault() -> None:
    file = open_recipe("ultralong-8b-4m")
    findings = rope_checks.as_built({"error": "ImportError: no"}, file.recipe, resolve(file, need_model=False).rope)
    assert "cannot be built: ImportError: no" in wrong(findings)[0]


def test_a_checkpoint_of_another_rope_in_the_run_folder_is_seen(tmp_path: Path) -> None:
    file = open_recipe(str(ROOT / "mcore_longctx/recipe/presets/tiny-cpu.yaml"), [MODEL, f"output={tmp_path}"])
    resolved = resolve(file)
    folder = tmp_path / "checkpoints/extend/iter_0000016"
    folder.mkdir(parents=True)
    card = CheckpointCard(shape=resolved.shape, rope=resolved.rope, stage="extend", iteration=16)
    write_card(folder, card)
    assert [f.level for f in rope_checks.of_checkpoints(file.recipe, resolved)] == ["ok"]
    write_card(folder, replace(card, rope=replace(resolved.rope, factor=4.0)))
    assert "rope differs" in wrong(rope_checks.of_checkpoints(file.recipe, resolved))[0]


# ------------------------------------------------------------------------------------------------------------------------ layouts


def test_every_layout_that_does_not_divide_is_named_not_only_the_first() -> None:
    file = open_recipe(
        "ultralong-8b-4m",
        [
            "stages.extend.parallel={tensor_model_parallel_size: 16, context_parallel_size: 8, data_parallel_size: 2}",
            "stages.instruct.parallel={pipeline_model_parallel_size: 5}",
            "evaluate.parallel={tensor_model_parallel_size: 3}",
        ],
    )
    resolved, findings = stages.resolved_part_by_part(file)
    assert resolved is None
    said = wrong(findings)
    assert len(said) == 3
    assert "num_query_groups 8 is not divisible by tensor_model_parallel_size 16" in said[0]
    assert "num_layers 32 is not divisible by pipeline_model_parallel_size 5" in said[1]
    assert "tensor_model_parallel_size 3" in said[2]
    _, one = stages.resolved_part_by_part(open_recipe("ultralong-8b-4m", ["evaluate.parallel={tensor_model_parallel_size: 3}"]))
    assert [finding.level for finding in one] == ["ok", "ok", "wrong"]


def test_ranks_that_do_not_fill_nodes_are_named() -> None:
    _, findings = stages.resolved_part_by_part(open_recipe("ultralong-8b-4m", ["cluster.nproc_per_node=6"]))
    assert all("not whole nodes of 6" in text for text in wrong(findings))
    assert len(wrong(findings)) == 3


def test_an_a2a_that_transformer_engine_refuses_is_named() -> None:
    a2a = "{tensor_model_parallel_size: 1, context_parallel_size: 32, cp_comm_type: a2a, data_parallel_size: 8}"
    overrides = [f"stages.extend.parallel={a2a}", "stages.extend.activations={recompute: full}"]
    _, findings = stages.resolved_part_by_part(open_recipe("ultralong-8b-1m", [*overrides, "model.backend=te"]))
    (said,) = wrong(findings)
    assert "stages.extend.parallel: TransformerEngine's a2a over 32 ranks cannot divide 8 key heads" in said
    _, findings = stages.resolved_part_by_part(open_recipe("ultralong-8b-1m", overrides))  # ours repeats them
    assert not wrong(findings)


def test_a_rope_that_the_sequence_outgrows_is_named() -> None:
    resolved, findings = stages.resolved_part_by_part(open_recipe("ultralong-8b-4m", ["rope.factor=256"]))
    assert any("4,194,304 tokens, but the rope reaches 2,097,152" in text for text in wrong(findings))
    assert resolved is not None  # of the stage that fits


# ------------------------------------------------------------------------------------------------------------------ plan, timeouts


def test_a_stage_that_does_not_fit_is_named_with_its_largest_term() -> None:
    file = open_recipe("ultralong-8b-4m", ["stages.extend.parallel={tensor_model_parallel_size: 8, sequence_parallel: true}"])
    _, findings = stages.plans(file.recipe, resolve(file, need_model=False))
    fault = wrong(findings)
    assert len(fault) == 1
    assert "extend" in fault[0]


def test_an_unknown_gpu_is_named() -> None:
    file = open_recipe("ultralong-8b-4m", ["cluster.gpu=h1000-80gb"])
    planned, findings = stages.plans(file.recipe, resolve(file, need_model=False))
    assert not planned
    assert "h100-80gb" in wrong(findings)[0]


@pytest.mark.parametrize(("minutes", "level"), [(1.0, "wrong"), (25.0, "note"), (10_000.0, "ok"), (None, "ok")])
def test_a_timeout_is_held_against_the_planned_step(minutes: float | None, level: str) -> None:
    overrides = [] if minutes is None else [f"stages.extend.distributed_timeout_minutes={minutes}"]
    file = open_recipe("ultralong-8b-4m", overrides)
    planned, _ = stages.plans(file.recipe, resolve(file, need_model=False))
    findings = list(stages.timeouts(file.recipe.stages[:1], planned))
    assert [finding.level for finding in findings] == [level], findings


@pytest.mark.parametrize(
    ("limit", "levels"),
    [("00:05:00", ["wrong", "wrong"]), ("1-00:00:00", ["ok", "ok"]), ("4h", ["wrong"])],
)
def test_a_time_limit_is_held_against_the_planned_step_of_every_stage(limit: str, levels: list[str]) -> None:
    file = open_recipe("ultralong-8b-4m", [f"cluster.time_limit={limit}"])
    planned, _ = stages.plans(file.recipe, resolve(file, need_model=False))
    findings = list(stages.time_limit(file.recipe, planned))
    assert [finding.level for finding in findings] == levels, findings
    assert ["launch"] * ("wrong" in levels) == [
        finding.subject for finding in stages.launch(file, []) if finding.level == "wrong"
    ]
    assert not [finding for finding in stages.launch(file, findings) if finding.level == "wrong"]  # said once
    if levels == ["wrong", "wrong"]:
        step, lead = planned["extend"].time.total, planned["extend"].intervals.signal_lead.value
        assert f"two steps of {step:,.0f} s + signal lead {lead:,.0f} s" in findings[0].text


@pytest.mark.parametrize(("limit", "level"), [("00:02:00", "wrong"), ("00:02:01", "ok")])
def test_a_time_limit_of_cpus_leaves_time_before_the_signal(limit: str, level: str) -> None:
    file = open_recipe("tiny-cpu", [f"cluster.time_limit={limit}", MODEL])
    assert {finding.level for finding in stages.time_limit(file.recipe, {})} == {level}


def test_what_launch_refuses_beside_that_is_named_with_its_fix() -> None:
    file = open_recipe("ultralong-8b-4m", ["evaluate.needle.samples=5000"])
    (finding,) = stages.launch(file, [])
    assert "10-evaluate-before measures" in finding.text
    assert "evaluate:" in finding.text
    assert "fewer samples" in finding.fix
    assert finding.fix not in finding.text


def test_gpus_that_are_not_those_of_the_recipe_are_named() -> None:
    file = open_recipe("ultralong-8b-4m")
    planned, _ = stages.plans(file.recipe, resolve(file, need_model=False))
    small = {"name": "A10", "bytes": 24 * 10**9}
    said = wrong(stages.gpus_here([small] * 4, file.recipe, planned))
    assert any("4 here, cluster.nproc_per_node is 8" in text for text in said)
    assert any("A10 has 24.0 GB" in text for text in said)
    assert not list(stages.gpus_here([], file.recipe, planned))


def test_the_dense_mask_is_as_large_as_megatrons_own_function_makes_it() -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    mask = _get_ltor_masks_and_position_ids(torch.zeros(64, dtype=torch.int64), 0, False, False, False, True)[0]
    assert mask.numel() * mask.element_size() == 64 * 64
    assert "17,592.2 GB" in stages.dense_mask(open_recipe("ultralong-8b-4m").recipe).text  # 4,194,304 squared


# --------------------------------------------------------------------------------------------------------------- inputs, disk, files


def test_inputs_that_are_missing_would_stop_the_run(tmp_path: Path) -> None:
    recipe = open_recipe("tiny-cpu", ["data.chats.sources.chats.path=nowhere.jsonl"]).recipe
    said = wrong(stages.inputs(replace(recipe, tokenizer=tmp_path), model_found=True))
    assert any("data.chats.sources.chats: no such file or folder: nowhere.jsonl" in text for text in said)
    assert any("tokenizer" in text for text in said)


def test_a_model_data_and_held_out_text_that_are_not_there_yet_are_each_a_fault_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = open_recipe("ultralong-8b-4m", ["tokenizer=elsewhere"]).recipe
    said = wrong(stages.inputs(recipe, model_found=False))
    assert f"no such folder: {recipe.model.path}" in said[0]
    assert f"hf download NAME --local-dir {recipe.model.path}" in said[0]
    (tmp_path / "elsewhere").mkdir()
    wanted = [source.path for stage in recipe.stages for source in recipe.data[stage.data].sources]
    assert recipe.evaluate.needle is not None
    wanted += [Path("elsewhere/tokenizer.json"), recipe.evaluate.needle.haystack]
    for path in dict.fromkeys(wanted):
        (line,) = [text for text in said if text.split(";")[0].endswith(f": {path}")]
        assert "put it there" in line
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [text.split(":")[0] for text in wrong(stages.inputs(recipe, model_found=False))] == ["model"]


def test_a_model_folder_without_its_config_is_a_download_that_ended_early(tmp_path: Path) -> None:
    recipe = open_recipe("ultralong-8b-4m", [f"model.path={tmp_path}"]).recipe
    assert "no config.json" in wrong(stages.inputs(recipe, model_found=False))[0]


PARAMETERS_8B = 8_030_261_248  # Llama-3.1-8B as published


def test_the_disk_must_hold_what_the_keep_rule_keeps(tmp_path: Path) -> None:
    file = open_recipe("ultralong-8b-4m", [f"output={tmp_path / 'run'}", "stages.extend.keep_checkpoints=400"])
    shape = resolve(file, need_model=False).shape
    (extend,) = (stage for stage in file.recipe.stages if stage.name == "extend")
    assert storage.checkpoint_bytes(extend, shape) == PARAMETERS_8B * 14
    said = wrong(storage.disk(file.recipe, shape, {}, is_here=True))
    checkpoints, tokens = (401 + 3) * PARAMETERS_8B * 14, 150 * 2 * 2**22 + 150 * 128 * 8192
    total = checkpoints + tokens * 4 + 2 * PARAMETERS_8B * 2
    assert f"about {total / 1e9:,.1f} GB" in said[0]
    assert not wrong(storage.disk(file.recipe, shape, {}, is_here=False))


def test_what_is_in_the_run_folder_already_is_not_asked_for_again(tmp_path: Path) -> None:
    file = open_recipe("tiny-cpu", [f"output={tmp_path}"])
    shape = resolve(open_recipe("tiny-cpu", [MODEL])).shape
    before = next(iter(storage.disk(file.recipe, shape, {}, is_here=True))).text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/data").write_bytes(bytes(200_000_000))
    after = next(iter(storage.disk(file.recipe, shape, {}, is_here=True))).text
    assert "takes about 8" in before
    assert "takes about 0 bytes" in after


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB with 200 inodes."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount needs root: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_small_disk_is_named_with_bytes_and_inodes(small_disk: Path) -> None:
    file = open_recipe("tiny-cpu", [f"output={small_disk / 'run'}"])
    said = wrong(storage.disk(file.recipe, resolve(open_recipe("tiny-cpu", [MODEL])).shape, {}, is_here=True))
    assert "1.0 MB free" in said[0]
    assert "inodes free" in said[1]
    assert "tmpfs" in storage.file_system(small_disk / "run", 1).text
    assert storage.file_system(small_disk / "run", 1).level == "note"
    assert "7 nodes do not see it" in wrong([storage.file_system(small_disk / "run", 8)])[0]


def test_the_file_system_is_that_of_the_longest_mount_point(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    folder = tmp_path / "my runs"
    folder.mkdir()
    escaped = str(folder).replace(" ", "\\040")
    (tmp_path / "proc/mounts").write_text(
        f"none / overlay rw 0 0\nserver:/x {escaped} nfs4 rw 0 0\n/dev/sda1 {escaped}2 ext4 rw 0 0\n"
    )
    found = storage.file_system(folder / "later", 4, root=tmp_path)
    assert found.level == "note"
    assert f"nfs4 mounted at {folder}" in found.text
    assert storage.file_system(Path("/elsewhere"), 4, root=tmp_path).level == "wrong"
