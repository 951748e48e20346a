"""Stages of a recipe, priced as they stand."""

from dataclasses import replace

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.candidates import USABLE
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.stages import StagePlan, cluster_gpu, one_line, plan_stage
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.recipe import ClusterSection, Stage
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve

FILE = open_recipe("ultralong-8b-4m")
SHAPE = resolve(FILE, need_model=False).shape
EXTEND, INSTRUCT = FILE.recipe.stages


def planned(stage: Stage, cluster: ClusterSection | None = None, **options: str) -> StagePlan:
    plan = plan_stage(stage, SHAPE, cluster or ClusterSection(), **options)
    assert plan is not None
    return plan


def test_a_stage_is_priced_with_its_own_layout_and_activations() -> None:
    plan = planned(EXTEND)
    setup = Setup(
        shape=SHAPE,
        gpu=replace(find_gpu("h100-80gb"), gpus_per_node=8),
        seq_length=1 << 22,
        global_batch_size=2,
        parallel=EXTEND.parallel,
        recompute="attention_kept",
        mlp_tile=8192,
    )
    assert plan.setup == setup
    assert (plan.memory, plan.time) == (memory(setup), step_time(setup))
    assert plan.hours == pytest.approx(150 * plan.time.total / 3600)
    assert plan.fits
    assert not plan.problem


def test_an_sft_stage_is_priced_as_well() -> None:
    plan = planned(INSTRUCT)
    assert plan.setup.num_microbatches == 4
    assert plan.setup.seq_length == 8192
    assert plan.fits
    assert plan.time.total < 30


def test_what_does_not_fit_names_the_largest_term_and_the_board() -> None:
    stage = replace(EXTEND, activations=replace(EXTEND.activations, recompute="none"))
    plan = planned(stage)
    assert not plan.fits
    over = plan.memory.total - USABLE * 80e9
    assert f"{over / 1e9:,.1f}" in plan.problem
    assert "largest: kept activations" in plan.problem
    assert "of 80 GB" in plan.problem
    assert plan.problem in one_line(plan)
    assert "DOES NOT FIT" in one_line(plan)


def test_the_line_for_a_dry_run_has_hours_memory_and_the_verdict() -> None:
    plan = planned(EXTEND)
    text = one_line(plan)
    assert f"{plan.time.total:,.0f} s a step" in text
    assert f"{plan.hours:.1f} h for 150 steps" in text
    assert f"{plan.memory.total / 1e9:.1f} of 80 GB a GPU" in text
    assert text.endswith(", fits")
    assert "\n" not in text


def test_a_cluster_without_gpus_has_no_plan() -> None:
    assert plan_stage(EXTEND, SHAPE, ClusterSection(gpu="none")) is None


def test_an_unknown_gpu_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h200"):
        plan_stage(EXTEND, SHAPE, ClusterSection(gpu="h201-141gb"))


def test_nodes_are_as_large_as_the_recipe_says() -> None:
    """TP 8 x CP 1 crosses a node of 4 GPUs: SFT gets slower, and the plan says that its NVLink price is a wish."""
    gpu = cluster_gpu(ClusterSection(nproc_per_node=4))
    assert gpu is not None
    assert gpu.gpus_per_node == 4
    notes = planned(EXTEND, ClusterSection(nproc_per_node=4)).notes
    assert any(note.startswith("TP 8 leaves the node of 4 GPUs") for note in notes)
    assert not planned(EXTEND).notes


def test_what_the_formulas_do_not_know_is_noted() -> None:
    parallel = replace(EXTEND.parallel, sequence_parallel=False)
    notes = planned(replace(EXTEND, parallel=parallel, cross_document_mask=True)).notes
    assert [note.split(":")[0] for note in notes] == ["sequence_parallel is off", "cross_document_mask"]


def test_float32_doubles_what_is_kept() -> None:
    kept = {
        precision: next(
            t.value for t in planned(replace(EXTEND, precision=precision)).memory.terms if t.name == "kept activations"
        )
        for precision in ("bf16", "fp32")
    }
    lse = 4 * 32 * (1 << 22) / 16 / 8 * 32  # float32 under both
    assert kept["fp32"] - lse == pytest.approx(2 * (kept["bf16"] - lse))


def test_transformer_engine_keeps_what_megatron_keeps() -> None:
    own, stock = planned(EXTEND), planned(EXTEND, backend="te")
    assert stock.setup.recompute == "selective"
    assert stock.setup.mlp_tile is None
    assert stock.memory.total > own.memory.total
    assert stock.time.total == pytest.approx(own.time.total, rel=0.02)


def test_a_kernel_of_the_gpu_is_priced() -> None:
    assert planned(EXTEND, kernel="fa3").time.total < 0.9 * planned(EXTEND).time.total
    with pytest.raises(ConfigError, match="fa9"):
        planned(EXTEND, kernel="fa9")
