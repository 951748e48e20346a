"""What `args` prints: every key of a recipe is said, named or refused; what Megatron would lose is never printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.cli.main import main
from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.launch.args import as_arrays, as_line, our_command, stage_run
from mcore_longctx.launch.args.flags import Command
from mcore_longctx.launch.args.rope import rope_as_json, rope_flags, why_no_rope_flags
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.recipe.schema import Activations, OptimizerSection, Parallel, RopeSection, Stage
from mcore_longctx.rope import RopeScaling, read_hf_rope
from tests.launch.args_recipes import BANDS, CHANGES, LONGROPE, MAKERS, TIMEOUT, YARN, command, line, run_of

SECTIONS = {
    "stage.": (Stage, {"optimizer", "parallel", "activations"}),
    "stage.parallel.": (Parallel, set()),
    "stage.activations.": (Activations, set()),
    "stage.optimizer.": (OptimizerSection, set()),
    "rope.": (RopeSection, set()),
}


# keys that say nothing to the program themselves: what they decide is in the packed data that it reads
IN_THE_DATA = {("ours", "stage.kind")}


def outcome(maker: str, *overrides: str) -> tuple[str, frozenset[str], set[str]]:
    """The printed arrays or the refusal; the keys that are said or named; those that a difference names."""
    try:
        made = command(maker, *overrides)
    except LongctxError as error:
        return f"refused: {error.what}", frozenset(), set()
    return as_arrays(made), made.keys, {key for one in made.differences for key in one.keys}


def test_every_key_of_a_stage_has_a_change_here() -> None:
    """A new key of the recipe fails here until somebody has thought of how other programs are told."""
    keys = {
        prefix + one.name for prefix, (section, deeper) in SECTIONS.items() for one in fields(section) if one.name not in deeper
    }
    assert keys == {key for key in CHANGES if "." in key and not key.startswith("model.")}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_changes_what_is_printed_or_is_refused(maker: str, key: str) -> None:
    change = CHANGES[key]
    before, keys, _ = outcome(maker, *change.given)
    after, more, differences = outcome(maker, *change.given, change.override)
    if before.startswith("refused"):
        assert change.given, "the recipe that all others are compared with is refused"
        assert (
            "YaRN" in before or "no flag for rope type" in before
        )  # a rope that the program cannot be told, whatever its settings
    elif not after.startswith("refused"):
        assert key in keys | more, f"{key} is neither said nor named"
        assert before != after or key in differences or (maker, key) in IN_THE_DATA


# ------------------------------------------------------------------------------------------------------------ what is never printed

WITHOUT_EFFECT = {  # mcore_cpu: accepted by Megatron-LM and then ignored, or deprecated
    *("--use-dist-ckpt", "--dist-ckpt-format", "--use-mcore-models", "--use-flash-attn", "--use-rotary-position-embeddings"),
    *(
        "--reset-position-ids",
        "--reset-attention-mask",
        "--hybrid-context-parallel",
        "--dataloader-inter-document-masking",
        "--spec",
    ),
    *(
        "--cross-entropy-fusion-impl=te",
        "--yaml-cfg",
        "--no-check-for-nan-in-loss-and-grad",
        "--finetune",
        "--use-checkpoint-args",
    ),
}

values = st.fixed_dictionaries(
    {
        "stages.extend.parallel": st.sampled_from(
            [
                "{tensor_model_parallel_size: 8, sequence_parallel: true, context_parallel_size: 16, data_parallel_size: 2}",
                "{tensor_model_parallel_size: 2, context_parallel_size: 8, cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 4]}",
                "{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2, context_parallel_size: 2, cp_comm_type: a2a}",
                "{data_parallel_size: 2}",
            ]
        ),
        "stages.extend.activations": st.sampled_from(
            ["{recompute: none}", "{recompute: full, mlp_tile: null}", "{recompute: attention_kept, offload_fraction: 0.5}", "{}"]
        ),
        "rope": st.sampled_from(
            [
                "{type: llama3, factor: 512, original_max_position_embeddings: 8192, rope_theta: 500000}",
                "{type: llama3, factor: 8, original_max_position_embeddings: 8192, rope_theta: 500000, max_position_embeddings: 4M}",
                "{type: llama3, factor: 8, original_max_position_embeddings: 1M, rope_theta: 500000}",
                "{type: yarn, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000}",
                "{type: yarn, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000, attention_factor: 1.0}",
                "{type: yarn, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000, ramp: rotations, attention_factor: 1.0}",
                "{type: linear, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000}",
                "{type: linear, factor: 4.5, original_max_position_embeddings: 2M, rope_theta: 500000}",
                "{type: abf, rope_theta: 500000000, max_position_embeddings: 4M}",
                "{type: abf, rope_theta: 500000000.5, max_position_embeddings: 4M}",
                "{type: ntk, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000}",
                BANDS.removeprefix("rope="),
                LONGROPE.removeprefix("rope="),
            ]
        ),
        "stages.extend.async_save": st.sampled_from(["true", "false"]),
        "cluster.gpu": st.sampled_from(["h100-80gb", "none"]),
    }
)


@given(values, st.sampled_from(["ours", "stock"]))
def test_nothing_that_megatron_ignores_or_computes_wrongly_is_printed(chosen: dict[str, str], maker: str) -> None:
    try:
        run = run_of("ultralong-8b-4m", "extend", *(f"{key}={value}" for key, value in chosen.items()))
        made = MAKERS[maker](run)
    except LongctxError:
        return
    given = {one.name: one.values for one in made.flags}
    assert len(given) == len(list(made.flags)), "a flag stands twice"
    assert not given.keys() & WITHOUT_EFFECT
    assert set(given.get("--cp-comm-type", ())) <= {"p2p", "all_gather", "a2a", "a2a+p2p"}
    assert ("--hierarchical-context-parallel-sizes" in given) == ("a2a+p2p" in given.get("--cp-comm-type", ()))
    if given.get("--recompute-granularity") == ("full",):
        assert "--recompute-modules" not in given
        assert "--fine-grained-activation-offloading" not in given
    yarn = {name for name in given if "yarn" in name} | given.keys() & {"--rotary-scaling-factor", "--mscale", "--mscale-all-dim"}
    assert bool(yarn) == (given.get("--position-embedding-type") == ("yarn",))
    assert not ("--use-rope-scaling" in given and yarn)
    if maker == "stock":  # the flag that pretrain_gpt.py drops
        assert "--rope-scaling-factor" not in given
        assert not [name for name in given if name.startswith("--longctx")]
    assert ("--rope-scaling-factor" in given) <= ("--use-rope-scaling" in given)
    assert len({"--rotary-base", "--longctx-rope"} & given.keys()) == 1
    assert given.get("--rotary-base", ("1",))[0].isdecimal()
    assert given["--exit-signal"] == ("SIGUSR1",)
    assert given["--pretrained-checkpoint"] != given["--load"]


def test_the_factor_that_the_stock_program_drops_is_not_printed() -> None:
    names = {one.name for one in command("stock").flags}
    assert "--use-rope-scaling" in names
    assert "--rope-scaling-factor" not in names


# ---------------------------------------------------------------------------------------------------------------------------- ropes

ropes = st.one_of(
    st.builds(
        RopeScaling,
        type=st.just("llama3"),
        head_dim=st.just(64),
        rope_theta=st.sampled_from([10000.0, 500000.0, 5e5 + 0.25]),
        factor=st.floats(1.0, 1e4),
        original_max_position_embeddings=st.sampled_from([8192, 4096]),
        low_freq_factor=st.sampled_from([1.0, 2.0]),
    ),
    st.builds(
        RopeScaling,
        type=st.just("yarn"),
        head_dim=st.just(64),
        rope_theta=st.sampled_from([10000.0, 500000.0]),
        factor=st.floats(1.0, 1e4),
        original_max_position_embeddings=st.sampled_from([8192, 4096]),
        beta_fast=st.floats(8.0, 64.0),
        truncate=st.booleans(),
        attention_factor=st.one_of(st.none(), st.floats(0.5, 4.0)),
    ),
)


@given(ropes)
def test_rope_flags_say_the_rope_by_the_formulas_of_megatron(rope: RopeScaling) -> None:
    """Recomputed as megatron/core's yarn_rotary_pos_embedding.py and argument_utils.py do."""
    import math

    import numpy as np

    if why_no_rope_flags(rope):
        return
    given = {one.name: one.values for one in rope_flags(rope)}
    base = int(given["--rotary-base"][0])
    inv_freq = base ** (-np.arange(0, 64, 2) / 64.0)
    factor = 1.0
    if rope.type == "llama3":
        scale = float(given["--rope-scaling-factor"][0])
        wavelength = 2 * math.pi / inv_freq
        smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
        wanted = (1 - smooth) * inv_freq / scale + smooth * inv_freq
    else:
        scale, length = float(given["--rotary-scaling-factor"][0]), int(given["--yarn-original-max-position-embeddings"][0])

        def pair(turns: float) -> float:
            return 64 * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(float(given["--yarn-beta-fast"][0])), pair(float(given["--yarn-beta-slow"][0]))
        if "--yarn-correction-range-round-to-int" in given:
            low, high = math.floor(low), math.ceil(high)
        else:
            assert "--no-yarn-correction-range-round-to-int" in given
        low, high = max(low, 0), min(high, 63)
        mask = 1 - np.clip((np.arange(32) - low) / max(high - low, 0.001), 0, 1)
        wanted = inv_freq / scale * (1 - mask) + inv_freq * mask
        t = [0.1 * float(given[name][0]) * math.log(scale) + 1 for name in ("--mscale", "--mscale-all-dim")]
        factor = t[0] / t[1]
    found, attention_factor = rope.frequencies()
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert attention_factor == pytest.approx(factor, rel=1e-12)


@given(ropes)
def test_a_rope_as_json_is_read_as_the_same_rope(rope: RopeScaling) -> None:
    text = rope_as_json(rope, where="here")
    assert "\n" not in text
    assert read_hf_rope(json.loads(text)).fingerprint() == rope.fingerprint()


# ------------------------------------------------------------------------------------------------------------------------- refusals

WAY = "use --program ours"
A2A = "stages.extend.parallel={context_parallel_size: 32, cp_comm_type: a2a, data_parallel_size: 2}"


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["rope.factor=512"], r"rope: --rope-scaling-factor 512 is accepted and dropped: .* with factor 8, in all versions"),
        (
            ["rope.low_freq_factor=2"],
            r"rope: Llama 3's scaling is written into Megatron with other values than low_freq_factor 2",
        ),
        (["rope.rope_theta=500000.5"], r"rope: --rotary-base takes whole numbers, the base is 500000\.5"),
        (
            [YARN % ", ramp: rotations, attention_factor: 1.0"],
            r"rope: Megatron's YaRN has its ramp over the pair index, this one over rotations",
        ),
        (["rope={type: ntk, factor: 4, original_max_position_embeddings: 2M, rope_theta: 500000}"], r"no flag for rope type ntk"),
        ([BANDS], r"rope: Megatron has no flag for rope type bands"),
        ([LONGROPE], r"rope: Megatron has no flag for rope type longrope"),
        (["rope.phase_dtype=float64"], r"rope\.phase_dtype: pretrain_gpt\.py computes angles in float32"),
        (["stages.extend.kind=sft"], r"stages\.extend\.kind: pretrain_gpt\.py would learn questions as well as answers"),
        (["data.long-documents.separator_loss=false"], r"separator_loss: pretrain_gpt\.py would learn the separators too"),
        (["cluster.gpu=none"], r"cluster\.gpu: pretrain_gpt\.py needs CUDA"),
        (["stages.extend.precision=fp32"], r"stages\.extend\.precision: .* fused attention computes no fp32"),
        (
            ["stages.extend.activations={recompute: full, offload_fraction: 0.5}"],
            r"offload_fraction: pretrain_gpt\.py has nothing to offload when everything is recomputed",
        ),
        (
            [A2A],
            r"cp_comm_type: pretrain_gpt\.py would stop at its first step: TransformerEngine's a2a over 32 ranks cannot divide 8 key heads",
        ),
        (
            [A2A.replace("32, ", "64, ").replace("a2a,", "a2a+p2p, hierarchical_context_parallel_sizes: [16, 4],")],
            r"cp_comm_type: pretrain_gpt\.py would stop at its first step: TransformerEngine's a2a over 16 ranks cannot",
        ),
    ],
)
def test_what_the_stock_program_would_lose_is_refused_with_the_way_round(overrides: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        command("stock", *overrides)
    assert "\n" not in str(caught.value)
    assert WAY in str(caught.value)
    assert caught.value.exit_code == 2
    if "cluster.gpu=none" not in overrides:
        our_command(run_of("ultralong-8b-4m", "extend", *overrides))  # the way round is one


@pytest.mark.parametrize("maker", MAKERS)
def test_documents_that_must_not_see_each_other_are_refused(maker: str) -> None:
    with pytest.raises(
        ConfigError, match=r"cross_document_mask: documents of a sample would see each other.*use mcore-longctx train"
    ):
        command(maker, "stages.extend.cross_document_mask=true")


def test_saves_beside_the_training_on_cpus_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"stages\.extend\.async_save: megatron-core 0\.19 writes in a process of its own that needs CUDA"
    ):
        command("ours", "cluster.gpu=none", "stages.extend.async_save=true")


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ([YARN % ""], r"rope: the settings of YaRN are no fields of its configuration"),
        (
            ["rope.high_freq_factor=8"],
            r"rope: Llama 3's scaling is written into Megatron with other values than high_freq_factor 8",
        ),
        (
            ["stages.extend.parallel={context_parallel_size: 1, data_parallel_size: 2}", "stages.extend.precision=fp32"],
            r"trains in bf16",
        ),
        (["stages.extend.kind=sft"], r"Megatron-Bridge would learn questions as well as answers"),
        ([A2A], r"Megatron-Bridge would stop at its first step: TransformerEngine's a2a over 32 ranks"),
    ],
)
def test_what_bridge_cannot_be_told_is_refused(overrides: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        command("bridge", *overrides)


def test_an_a2a_that_divides_the_key_heads_is_printed() -> None:
    assert "--cp-comm-type a2a" in line("stock", A2A.replace("32", "8"))


def test_the_weight_decay_of_the_recipe_is_what_bridges_scheduler_sets_at_every_step() -> None:
    """Its optimizer's own is overwritten by the scheduler's, 0.033 in the recipe that the overrides are laid over."""
    made = command("bridge", "stages.extend.optimizer.weight_decay=0.25")
    given = {one.name: one.values for one in made.flags}
    for name in ("optimizer.weight_decay=", "scheduler.start_weight_decay=", "scheduler.end_weight_decay="):
        assert given[name] == ("0.25",)


def test_ranks_that_do_not_fill_nodes_and_stages_that_are_not_there() -> None:
    with pytest.raises(LongctxError, match=r"256 ranks do not fill nodes of 7; change the layout, or cluster\.nproc_per_node"):
        command("ours", "cluster.nproc_per_node=7")
    file = open_recipe("ultralong-8b-4m")
    resolved = resolve(file, need_model=False)
    with pytest.raises(ConfigError, match=r"no stage 'nothing'; stages: extend, instruct"):
        stage_run(file, resolved, "nothing")


# ---------------------------------------------------------------------------------------------------------------------- differences


def named(made: Command) -> str:
    return " ".join(one.what for one in made.differences)


def test_what_cannot_be_said_is_named() -> None:
    text = named(command("ours", "stages.extend.activations.offload_fraction=0.25", "model.backend=te"))
    for what in ("offload_fraction 0.25 has no flag", "backend te has no flag", "keep_checkpoints 2 has no flag"):
        assert what in text
    text = named(command("stock"))
    for what in ("order of its own", "last label", "does not read the sidecar", "no tiles", "logits of all tokens", "rounding"):
        assert what in text
    odd = named(command("ours", "model.vocab_size=128257", "stages.extend.distributed_timeout_minutes=12.5"))
    assert "7 rows of zeros fill the vocabulary" in odd
    assert "takes whole minutes: 13 for 12.5" in odd


def test_the_plan_decides_between_selective_and_full_recompute() -> None:
    far = command("stock")
    assert {one.name: one.values for one in far.flags}["--recompute-granularity"] == ("full",)
    assert "attention is computed twice: selective would take" in named(far)
    near = command("stock", "stages.extend.seq_length=128k")
    assert {one.name: one.values for one in near.flags}["--recompute-modules"] == ("layernorm", "mlp")
    assert "becomes selective recompute" in named(near)


def test_a_timeout_that_the_recipe_leaves_out_is_the_planned_one() -> None:
    from mcore_longctx.plan.stages import plan_stage

    run = run_of("ultralong-8b-4m", "extend", "stages.extend.distributed_timeout_minutes=null")
    plan = plan_stage(run.stage, run.shape, run.cluster)
    assert plan is not None
    assert run.timeout_minutes * 60 >= plan.intervals.distributed_timeout.value > (run.timeout_minutes - 1) * 60
    assert run.timeout_minutes > 10  # a step of this size takes longer than Megatron's default
    assert (
        run_of("tiny-cpu", "extend", "cluster.gpu=none", "stages.extend.distributed_timeout_minutes=null").timeout_minutes == 30
    )


# ------------------------------------------------------------------------------------------------------------------------- printing


def sourced(text: str) -> dict[str, list[str]]:
    """The arrays as bash has them after sourcing the text."""
    names = re.findall(r"^([A-Z_]+)=\($", text, re.MULTILINE)
    script = text + "".join(f'\nprintf "%s\\0" "@{name}" "${{{name}[@]}}"' for name in names)
    result = subprocess.run(
        ["bash", "-euc", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env=os.environ | {"MASTER_ADDR": "node1"},
    )
    arrays: dict[str, list[str]] = {}
    for word in result.stdout.split("\0")[:-1]:
        if word.startswith("@"):
            arrays[word[1:]] = []
        else:
            arrays[list(arrays)[-1]].append(word)
    return arrays


@pytest.mark.parametrize("maker", MAKERS)
def test_arrays_and_line_hold_the_same_words(maker: str) -> None:
    made = command(maker, "output=a folder/with 'quotes' and $HOME", "cluster.nproc_per_node=4")
    arrays = sourced(as_arrays(made))
    expanded = as_line(made).replace("${MASTER_ADDR:?}:${MASTER_PORT:-29500}", "node1:29500")
    words = shlex.split(expanded.replace("${SLURM_JOB_ID:-mcore-longctx}", "mcore-longctx"))
    wanted = [f"{name}={value}" for name, value, _ in made.environment] + list(made.launcher)
    wanted += arrays["DISTRIBUTED_ARGS"] + list(made.program)
    wanted += [word for name, _ in made.arrays if name != "DISTRIBUTED_ARGS" for word in arrays[name]]
    assert words == wanted
    assert "a folder/with 'quotes' and $HOME" in " ".join(words)
    if maker != "bridge":
        order = ["DISTRIBUTED_ARGS", "MODEL_ARGS", "TRAINING_ARGS", "MODEL_PARALLEL_ARGS", "DATA_ARGS", "EVAL_AND_LOGGING_ARGS"]
        assert list(dict(made.arrays)) == order


def test_sourcing_the_arrays_starts_nothing(tmp_path: Path) -> None:
    fake = tmp_path / "torchrun"
    fake.write_text("#!/bin/sh\ntouch started\n")
    fake.chmod(0o755)
    script = tmp_path / "args.sh"
    script.write_text(as_arrays(command("ours")))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_ADDR": "node1"}
    subprocess.run(["bash", "-eu", str(script)], check=True, timeout=30, cwd=tmp_path, env=environment)
    assert not (tmp_path / "started").exists()
    # what stands there as a comment does
    lines = script.read_text().splitlines()
    at = next(number for number, text in enumerate(lines) if text.startswith("# torchrun"))
    script.write_text("\n".join([*lines[:at], *(text.removeprefix("#").lstrip() for text in lines[at:])]))
    subprocess.run(["bash", "-eu", str(script)], check=True, timeout=30, cwd=tmp_path, env=environment)
    assert (tmp_path / "started").exists()


def test_ranks_of_one_node_meet_by_themselves() -> None:
    words = line("ours", "stages.extend.parallel={tensor_model_parallel_size: 2, context_parallel_size: 2}").split()
    assert words[words.index("torchrun") + 1 :][:5] == ["--nnodes", "1", "--nproc-per-node", "4", "--standalone"]


def test_a_later_stage_goes_on_from_megatrons_own_checkpoints() -> None:
    given = {one.name: one.values for one in command("ours", stage="instruct").flags}
    assert given["--pretrained-checkpoint"] == ("runs/ultralong-8b-4m/megatron-lm/extend/checkpoints",)
    assert given["--longctx-data"] == ("runs/ultralong-8b-4m/data/instruct/instructions",)


def test_no_secret_and_no_value_of_the_environment_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    for maker in MAKERS:
        assert "planted" not in as_arrays(command(maker, "cluster.secrets=[HF_TOKEN]"))


# ------------------------------------------------------------------------------------------------------------------------- the verb

ARGS = ["args", "ultralong-8b-4m", TIMEOUT.format(stage="extend")]


def test_the_verb_prints_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, "--stage", "extend", "--for", "megatron-lm"]) == 0
    assert capsys.readouterr().out == as_arrays(command("ours"))
    assert main([*ARGS, "--stage", "extend", "--for", "megatron-lm", "--program", "ours", "--format", "line"]) == 0
    assert capsys.readouterr().out == line("ours")
    assert main([*ARGS, "--stage", "extend", "--for", "megatron-bridge"]) == 0
    assert capsys.readouterr().out == as_arrays(command("bridge"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "megatron-lm"], r"ultralong-8b-4m\.yaml: --stage is missing; stages: extend, instruct"),
        (
            ["--stage", "extend", "--for", "megatron-lm", "--program", "stock"],
            r"ultralong-8b-4m\.yaml:\d+: rope: --rope-scaling-factor 512",
        ),
        (["--stage", "extend", "--for", "megatron-bridge", "--program", "ours"], r"--program belongs to --for megatron-lm"),
        (["--stage", "extend", "--for", "megatron-lm", "cluster.gpu=h900"], r"h900"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word for word in ARGS if "timeout" not in word or "h900" not in " ".join(words)]
    assert main([*given, *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err)


@pytest.mark.parametrize("preset", ["tiny-cpu", "ultralong-8b-1m", "ultralong-8b-2m", "ultralong-8b-4m"])
@pytest.mark.parametrize("stage", ["extend", "instruct"])
def test_every_preset_and_stage_is_printed_for_our_program(preset: str, stage: str) -> None:
    assert sourced(as_arrays(command("ours", preset=preset, stage=stage)))["TRAINING_ARGS"]
