"""Pictures of a plan: what they show is computed, they are drawn, and the same plan gives the same bytes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.models import known_models
from mcore_longctx.plan.plots import longest_that_fits, plot_lengths
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.recipe.schema import Parallel

SETUP = Setup(
    shape=known_models()["llama-3.1-8b"],
    gpu=find_gpu("h100"),
    seq_length=1 << 22,
    global_batch_size=2,
    parallel=Parallel(tensor_model_parallel_size=8, sequence_parallel=True, context_parallel_size=16, data_parallel_size=2),
)


@given(st.sampled_from([1, 2, 8]), st.sampled_from([1, 4, 16]), st.sampled_from(["full", "attention_kept"]))
@settings(deadline=None, max_examples=20)
def test_the_longest_length_fits_and_the_next_does_not(tp: int, cp: int, policy: str) -> None:
    parallel = Parallel(tensor_model_parallel_size=tp, sequence_parallel=tp > 1, context_parallel_size=cp)
    setup = replace(SETUP, parallel=parallel, recompute=policy)
    longest, step = longest_that_fits(setup), 2 * tp * cp
    room = 0.92 * setup.gpu.memory_bytes
    assert longest % step == 0
    assert longest == 0 or memory(replace(setup, seq_length=longest)).total <= room
    assert memory(replace(setup, seq_length=longest + step)).total > room


def test_a_picture_shows_the_planned_numbers_the_board_and_the_longest_length(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    lengths = [1 << 20, 1 << 21, 1 << 22, 1 << 24]
    plot_lengths(SETUP, path, lengths)
    # text is drawn as shapes; matplotlib leaves each text beside them as a comment
    text = path.read_text()
    for length in lengths:
        at = replace(SETUP, seq_length=length)
        assert f"<!-- {memory(at).total / 1e9:,.0f} -->" in text
        assert f"{step_time(at).mfu:.0%}" in text
    for wanted in ("h100-80gb: 80 GB", "92%: fits", "kept activations", "attention", "TP 8 (SP)", "recompute attention_kept"):
        assert wanted in text
    assert f"fits up to {longest_that_fits(SETUP) / (1 << 20):.3g}M" in text


def test_the_same_plan_gives_the_same_bytes_and_other_files_are_png(tmp_path: Path) -> None:
    first, second, png = tmp_path / "a.svg", tmp_path / "b.svg", tmp_path / "c.png"
    for path in (first, second, png):
        plot_lengths(SETUP, path)
    assert first.read_bytes() == second.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_what_fits_nowhere_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    plot_lengths(replace(SETUP, shape=known_models()["llama-3.1-405b"]), path)
    assert "nothing fits" in path.read_text()


def test_any_other_suffix_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        plot_lengths(SETUP, tmp_path / "plan.txt")
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_by_a_picture_alone() -> None:
    code = "import sys, mcore_longctx.plan.plots; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
