"""What serving needs, against a table worked by hand: 8B and 70B, 1M to 4M tokens."""

from __future__ import annotations

import math
import subprocess

import pytest

from mcore_longctx.convert.checks.commands import GPU_BYTES
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.models import known_models
from mcore_longctx.plan.serving import PRECISIONS, SERVED_GPUS, plan_serving, serving_lines, weight_bytes

M = 1 << 20

# worked by hand: GB of bf16 keys and values; GPUs for bf16 / bf16 weights and fp8 keys / all fp8 on H100, H200, B200; PFLOP of the prefill;
# seconds of the first token on 8 H100 at 400 and 250 TFLOP/s; ms of one more token on 8 H100 with bf16 and with fp8 keys
TABLE = {
    ("llama-3.1-8b", 1 * M): (137, "4/2/2 2/1/1 1/1/1", 303, (95, 151), (8, 4)),
    ("llama-3.1-8b", 2 * M): (275, "8/4/4 4/2/2 2/1/1", 1182, (6 * 60, 10 * 60), (16, 8)),
    ("llama-3.1-8b", 4 * M): (550, "16/8/8 8/4/4 4/2/2", 4670, (24 * 60, 39 * 60), (30, 15)),
    ("llama-3.1-70b", 1 * M): (344, "8/8/4 4/4/2 4/2/2", 1585, (8 * 60, 13 * 60), (26, 13)),
    ("llama-3.1-70b", 2 * M): (687, "16/8/8 8/4/4 8/4/4", 6052, (32 * 60, 50 * 60), (44, 22)),
    ("llama-3.1-70b", 4 * M): (1374, "32/16/16 16/8/8 16/8/8", 23633, (2.1 * 3600, 3.3 * 3600), (81, 41)),
}


@pytest.mark.parametrize(("model", "length"), TABLE)
def test_the_table_of_sizes(model: str, length: int) -> None:
    cache, gpus, petaflop, _, _ = TABLE[model, length]
    shape = known_models()[model]
    plan = plan_serving(shape, length)
    found = {
        gpu: "/".join(
            str(row.layout.tp if row.layout else None)
            for precision in PRECISIONS
            for row in plan.rows
            if (row.gpu.name, row.precision) == (gpu, precision)
        )
        for gpu in SERVED_GPUS
    }
    assert " ".join(found.values()) == gpus
    assert plan.prefill_flops / 1e15 == pytest.approx(petaflop, rel=0.005)
    assert 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * 2 * length / 1e9 == pytest.approx(cache, rel=0.01)
    assert f"keys and values {cache:,} GB in bf16" in serving_lines(plan)[0]


@pytest.mark.parametrize(("model", "length"), TABLE)
def test_times_are_those_of_the_table_scaled_to_as_many_gpus_as_are_planned(model: str, length: int) -> None:
    """The table rounds to whole minutes (10 %), and counts all rows on 8 H100. Its times of a 4M cache of 8B on one more token use 16 GPUs for
    bf16 (15 ms); 0.40 and 0.25 of 989 TFLOP/s are 396 and 247, not 400 and 250 (1 %).
    """
    _, _, _, (fast, careful), (bf16, fp8) = TABLE[model, length]
    plan = plan_serving(known_models()[model], length, gpus=[find_gpu("h100")])
    for row, next_ms in zip(plan.rows[::2], (bf16, fp8), strict=True):  # all bf16, all fp8
        assert row.layout is not None
        assert row.first_token is not None
        assert row.next_token is not None
        share = 8 / row.layout.tp
        assert row.first_token[0].value == pytest.approx(fast * share, rel=0.1)
        assert row.first_token[1].value == pytest.approx(careful * share, rel=0.1)
        assert row.next_token.value * 1e3 == pytest.approx(next_ms * share, rel=0.15)


@pytest.mark.parametrize(("model", "bf16", "fp8"), [("llama-3.1-8b", 16.1, 9.1), ("llama-3.1-70b", 141, 72.7)])
def test_weights_in_fp8_are_the_linear_layers_alone(model: str, bf16: float, fp8: float) -> None:
    shape = known_models()[model]
    assert weight_bytes(shape, "bf16") / 1e9 == pytest.approx(bf16, rel=0.005)
    assert weight_bytes(shape, "fp8") / 1e9 == pytest.approx(fp8, rel=0.005)


def test_the_exporter_s_gpus_have_the_memory_of_the_hardware_table() -> None:
    """`convert` stands below `plan` and keeps three numbers of its own."""
    assert {name: find_gpu(name.lower()).memory_bytes for name in GPU_BYTES} == GPU_BYTES


def test_every_gpu_has_room_for_what_it_is_planned_to_hold() -> None:
    for model, length in TABLE:
        for row in plan_serving(known_models()[model], length).rows:
            assert row.layout is not None
            assert row.gpu_bytes <= 0.92 * row.gpu.memory_bytes


def test_what_fits_nowhere_says_so() -> None:
    plan = plan_serving(known_models()["llama-3.1-405b"], 64 * M)
    assert all(row.layout is None and math.isnan(row.gpu_bytes) for row in plan.rows)
    assert sum("more than 64" in line for line in serving_lines(plan)) >= len(plan.rows)


def test_commands_are_lines_of_a_shell_with_the_length_and_the_folder() -> None:
    plan = plan_serving(known_models()["llama-3.1-8b"], 4 * M, path="a folder; rm -rf x")
    text = "\n".join(plan.commands)
    assert subprocess.run(["bash", "-n", "-c", text], check=False, capture_output=True).returncode == 0
    assert text.count("--max-model-len 4194304") == 2
    assert "'a folder; rm -rf x'" in text
    assert all(line in serving_lines(plan) for line in plan.commands)
