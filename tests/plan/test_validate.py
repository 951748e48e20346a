import math
import runpy
from pathlib import Path

import pytest
import yaml

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan import validate as validate_module
from mcore_longctx.plan.measurements import read_measurements
from mcore_longctx.plan.models import step_flops
from mcore_longctx.plan.validate import render, validate

OWN = Path(validate_module.__file__).with_name("validation.yaml")
FIT_TOOL = Path(__file__).parents[2] / "tools" / "fit_plan.py"
ROW = "{id: a, model: llama8b, gpu: h100, n: 8, seq: 1100000, gbs: 1, cp: 8, cp_type: a2a, kernel: fa2, time_s: 564, use: held"


def _write(tmp_path, rows, head=""):
    path = tmp_path / "points.yaml"
    path.write_text(head + "points:\n" + "".join(f"- {row}\n" for row in rows))
    return path


def test_held_out_rows_are_within_the_targets():
    report = validate()
    assert report.time["held"].rows >= 28
    assert report.memory["held"].rows >= 16
    assert report.time["held"].mean <= 0.08
    assert report.memory["held"].mean <= 0.15
    assert abs(report.time["held"].bias) <= 0.05


def test_errors_are_means_over_all_rows_of_a_use():
    """Summed up again from the rows, without the module's own arithmetic; no row is left out."""
    report = validate()
    raw = yaml.safe_load(OWN.read_text())["points"]
    assert [row.id for row in report.rows] == [row["id"] for row in raw]
    for use in ("fit", "held", "show"):
        for quantity, keys in (("time", {"time_s", "tps_gpu", "tflops"}), ("memory", {"mem_gb"})):
            rows = [row for row, point in zip(report.rows, raw, strict=True) if point["use"] == use and keys & set(point)]
            errors = [abs(getattr(row, quantity).predicted / getattr(row, quantity).measured - 1) for row in rows]
            found = getattr(report, quantity)[use]
            assert (found.rows, found.mean, found.worst) == (
                len(errors),
                pytest.approx(math.fsum(errors) / len(errors)),
                max(errors),
            )


def test_every_row_has_a_source_and_a_use():
    raw = yaml.safe_load(OWN.read_text())
    for point in raw["points"]:
        assert point["src"] in raw["source_keys"], point["id"]
        assert point["use"] in ("fit", "held", "show")
        assert point["conf"] in ("given", "inferred")


def test_measured_figures_become_seconds_and_bytes():
    measurements = {m.point.id: m for m in read_measurements()[0]}
    assert measurements["alst-8g-1.1m"].seconds == 564
    titan = measurements["titan-8b-32k"]  # 8 sequences of 32,768 at 3,890 tokens/s on each of 8 GPUs; 83.9 GiB
    assert titan.seconds == pytest.approx(8 * 32768 / 3890 / 8)
    assert titan.bytes == pytest.approx(83.9 * 2**30)
    nemo = measurements["nemo-h100-1m"]  # FLOPs of the whole square
    linear, head, attention = step_flops(nemo.setup.shape, 2**20)
    assert nemo.seconds == pytest.approx(4 * (linear + head + 2 * attention) / 1024 / 536e12)


def test_no_measurement_and_no_prediction_is_above_the_kernel():
    """A throughput above the kernel's ceiling is an exchange that did not happen, or another way to count."""
    for measurement, row in zip(read_measurements()[0], validate().rows, strict=True):
        if row.time is None or measurement.setup.gemm == "fp8":
            continue
        rate = measurement.setup.gpu.kernel(measurement.setup.kernel)
        forwards = 2 if measurement.setup.recompute == "full" else 1
        attention = step_flops(measurement.setup.shape, measurement.setup.seq_length)[2] / 3
        floor = measurement.point.gbs * attention * (forwards / rate.forward + 2.5 / rate.backward) / measurement.point.gpus
        assert row.time.predicted > floor, row.id
        if measurement.setup.seq_length >= 2**20 and row.use == "held":
            assert row.time.measured > 0.97 * floor, row.id  # rates were read off bars: +- 2 %


def test_the_fitted_constants_come_out_of_the_fit_rows_again(monkeypatch):
    tool = runpy.run_path(str(FIT_TOOL))
    rows = [m for m in read_measurements()[0] if m.point.use == "fit" and m.seconds is not None]
    now = tool["fitted_now"]()

    def loss(constants: dict[str, float]) -> float:
        return sum(tool["log_ratio"](row, constants) ** 2 for row in rows)

    best = loss(now)
    for name in now:  # a minimum: 3 % either way is worse
        for factor in (0.97, 1.03):
            assert loss({**now, name: now[name] * factor}) > best, name
    start = {**now, "gemm_bf16": 0.5}
    monkeypatch.setitem(tool["fit"].__globals__, "BOUNDS", {"gemm_bf16": (0.3, 0.9)})
    assert tool["fit"](rows, start)["gemm_bf16"] == pytest.approx(now["gemm_bf16"], rel=0.01)


def test_a_file_of_the_same_form_with_other_names_and_few_keys(tmp_path):
    head = "source_keys: {X: somewhere}\nmodels:\n  mine: {L: 24, h: 2048, q: 16, kv: 4, d: 128, f: 8192, V: 50000, mats: 2}\n"
    rows = [
        ROW + "}",
        "{id: b, src: X, model: Llama-3.1-8B, gpu: h100-80gb, seq: 128k, gbs: 3, tp: 2, dp: 2, tps_gpu: 900}",
        "{id: c, model: mine, gpu: b200, n: 7, seq: 65536, gbs: 5, dp: 8, tflops: 300, convention: causal, mem_gb: 50, mem_unit: GiB}",
        "{id: d, model: qwen3_32b, gpu: h200, seq: 1000000, gbs: 1, cp: 12, cp_type: a2a+p2p, a2a: 4, mem_gb: 99, "
        "extras: [native_ce, ckpt_offload, zero3, tiled_mlp]}",
        "{id: e, model: llama405b, gpu: a100, seq: 8192, gbs: 64, tp: 8, pp: 16, vpp: 8, recompute: sel, time_s: 60, use: fit}",
    ]
    report = validate(_write(tmp_path, rows, head))
    assert [row.use for row in report.rows] == ["held", "show", "show", "show", "fit"]
    assert set(report.time) == {"fit", "held", "show"}
    assert report.rows[1].source == "somewhere"
    text = render(report)
    assert all(f"\n{row.id}" in text for row in report.rows)


@pytest.mark.parametrize(
    ("row", "doubt"),
    [
        ("n: 16, tp: 8, dp: 7, time_s: 900", ""),  # dp is 2: n is the truth
        ("n: 12, tp: 8, dp: 2, time_s: 900", "n 12 is not divisible by tp x cp x pp = 8"),
        ("n: 12, tp: 12, time_s: 900", "32 query heads are not divisible by tp 12"),
        ("n: 8, tp: 8, tflops: 1200, convention: causal", "above the peak of these GPUs: check n and convention"),
        ("n: 8, tp: 8, gemm: fp8, tflops: 1200, convention: causal", ""),  # twice the peak of bf16
        ("n: 8, gpu: a100, gemm: fp8, time_s: 9000", "gemm fp8: a100-80gb has no FP8"),
        ("n: 3, cp: 3, cp_type: a2a, extras: [chunked_loss], time_s: 9000", "a2a over 3 ranks cannot divide 32 query heads"),
    ],
)
def test_a_row_that_cannot_be_is_shown_and_in_no_mean(tmp_path, row, doubt):
    gpu = "" if "gpu:" in row else "gpu: h100, "
    sure = "{id: sure, " + ROW.split(", ", 1)[1] + "}"
    report = validate(_write(tmp_path, [sure, "{id: odd, model: llama8b, " + gpu + "seq: 1M, gbs: 2, use: held, " + row + "}"]))
    assert report.rows[1].doubt.startswith(doubt)
    assert bool(report.rows[1].doubt) == bool(doubt)
    assert report.time["held"].rows == (1 if doubt else 2)
    text = render(report)
    assert ("! shown, counted in no mean:" in text) == bool(doubt)
    assert ("odd!" in text.replace(" ", "")) == bool(doubt)


def test_n_is_the_truth(tmp_path):
    measurements, _ = read_measurements(
        _write(tmp_path, ["{id: a, model: llama8b, gpu: h100, n: 16, tp: 8, dp: 7, seq: 1M, gbs: 2, time_s: 9}"])
    )
    assert measurements[0].setup.parallel.world_size == 16


def test_a_file_with_nothing_but_kernels_is_printed(tmp_path):
    path = tmp_path / "kernels.yaml"
    path.write_text("kernel_points:\n- {id: k, gpu: h100, seq: 32768, q: 64, kv: 8, method: fa3, fwd_tflops: 650}\n")
    assert "k " in render(validate(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW + ", speed: 3}", r"points\.yaml:2: points\.0\.speed: unknown name"),
        (ROW + ", gemm: fp4}", r"points\.yaml:2: points\.0\.gemm: 'fp4' is not one of bf16, fp8"),
        (ROW + ", extras: [zero4]}", r"points\.yaml:2: points\.0: a: unknown extra 'zero4'; did you mean zero3"),
        (ROW + ", tp: 0}", r"points\.yaml:2: points\.0: a: tp is 0, expected above 0"),
        (ROW + ", time_s: -1}", r"given twice"),
        (ROW.replace("564", "-564") + "}", r"time_s is -564\.0, expected above 0"),
        (ROW.replace("564", "fast") + "}", r"points\.0\.time_s: 'fast' is not"),
        (ROW.replace(", time_s: 564", "") + "}", r"a: nothing was measured; give time_s"),
        (ROW.replace("time_s", "tflops") + "}", r"a: tflops without convention"),
        (ROW.replace("llama8b", "llama9b") + "}", r"points\.yaml:2: a: no model 'llama9b' is known; did you mean 'llama8b'"),
        (ROW.replace("gpu: h100", "gpu: h101") + "}", r"points\.yaml:2: a: no GPU 'h101'"),
        (ROW.replace("fa2", "fa7") + "}", r"points\.yaml:2: a: h100-80gb has no attention kernel 'fa7'"),
        (ROW.replace("cp_type: a2a", "cp_type: a2a+p2p, a2a: 3") + "}", r"a2a 3 does not divide cp 8"),
        (ROW.replace("seq: 1100000, ", "") + "}", r"points\.0\.seq: missing"),
        (ROW + ", extras: [cpu_adam, bf16_adam]}", r"exclude each other"),
        (ROW + "}\n- " + ROW + "}", r"points\.yaml:3: points: id 'a' is given twice"),
    ],
)
def test_nonsense_is_one_line_with_file_and_line(tmp_path, row, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(_write(tmp_path, [row]))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        validate(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is not a regular file"):
        validate(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        validate(tmp_path / "binary.yaml")


def test_the_page_gives_the_errors_as_they_are():
    """docs/plan.md, Validation: after a change of formulas, constants or rows write the new figures there."""
    page = (FIT_TOOL.parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    report = validate()
    for quantity in ("time", "memory"):
        for error in getattr(report, quantity).values():
            line = f"| {error.rows} | {error.mean:.1%} | {error.bias:+.1%} | {error.worst:.0%}, `{error.worst_id}` |"
            assert line in page
    assert all(
        f"{name}`" in page or f"`{name.split('-', 1)[1]}" in page for name in ("titan-8b-128k", "trl-32b-1m", "alst-32g-32k")
    )


def test_outliers_are_shown_and_marked():
    text = render(validate())
    line = next(line for line in text.splitlines() if line.startswith("titan-8b-256k"))
    assert "*" in line
    assert max(len(line) for line in text.splitlines()) <= 100
