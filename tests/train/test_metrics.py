"""Metrics: one readable line, one JSON line, and no step twice after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mcore_longctx.train.metrics import MetricsWriter, StepMetrics, iteration_line, sample_digest

STEP = StepMetrics(
    step=12,
    loss=2.5,
    lr=1e-4,
    grad_norm=0.75,
    tokens_per_second=81234.5,
    memory_bytes=3 << 30,
    seconds=1.25,
    consumed_samples=1200,
    loss_tokens=77,
    samples="00ff",
)


def test_the_line_has_megatrons_field_names() -> None:
    line = iteration_line(STEP, iterations=360, global_batch_size=100, eta_seconds=3725.4)
    assert line == (
        " iteration  12/360 | consumed samples: 1200 | elapsed time per iteration (ms): 1250.0 | learning rate: 1.000000E-04 |"
        " global batch size: 100 | lm loss: 2.500000E+00 | grad norm: 0.750 | tokens/s: 81,234 | mem: 3.00 GiB | ETA: 1:02:05 |"
    )
    assert "ETA: - |" in iteration_line(STEP, iterations=360, global_batch_size=100, eta_seconds=None)


def test_lines_after_the_resumed_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path, board = tmp_path / "metrics" / "extend.jsonl", tmp_path / "tensorboard"
    writer = MetricsWriter(path, board, resumed_step=0)
    for step in range(1, 6):
        writer.write(replace(STEP, step=step))
    writer.sync()
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    writer = MetricsWriter(path, board, resumed_step=3)
    writer.write(replace(STEP, step=4, loss=1.0))
    writer.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.5), (2, 2.5), (3, 2.5), (4, 1.0)]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_second", "memory_bytes", "seconds"} <= set(rows[0])
    assert len(list(board.iterdir())) == 2


def test_the_digest_tells_orders_apart() -> None:
    assert sample_digest([1, 23]) != sample_digest([23, 1])
    assert sample_digest([1, 23]) != sample_digest([12, 3])
    assert sample_digest([1, 23]) == sample_digest((1, 23))
