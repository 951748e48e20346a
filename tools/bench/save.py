"""B9, a checkpoint: how long the training stands still for it, when it waits for the save and when the save goes on beside it.

python tools/bench/save.py

One rank with the whole model, bf16 with float32 Adam, into a folder of its own. `state` is what the rank collects before anything is
planned: the names and places of its own tensors, of the model and of the optimizer. `begin` is that, the plan, and its bytes into host
memory (on a CPU they are there); beside the training also the fork. `end` are the exchanges when all have written. The training that goes
on is a sleep, so that seconds are those of the save alone. The limit is one file of as many bytes, written into the same folder and synced.

Below it: what that makes of an 8B model on 256 GPUs, against 1 % of a step of 20 minutes: a rank's own bytes follow from the layout; the
seconds are this machine's for as many bytes, copied as a GPU's would be, and what does not grow with bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from harness import command_line, machine, table
from models import LLAMA_8B, rope, start_groups

from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import build_gpt_model
from mcore_longctx.recipe import OptimizerSection, Parallel, Stage, TokenCount
from mcore_longctx.train import TrainJob, iteration_folder
from mcore_longctx.train.checkpoint import Checkpointer
from mcore_longctx.train.control import Control
from mcore_longctx.train.optimizer import build_optimizer, build_schedule, prepare_optimizer_state, wrap_model

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=1024,
    ffn_hidden_size=3584,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=16384,
)
BYTES = 14  # of a parameter: bf16, float32 and two moments
BUDGET = 0.01 * 20 * 60  # seconds
GPUS = (256, 64, 32)
COPIED = 256 << 20  # bytes, to learn the rate of copying


@dataclass(frozen=True)
class Measured:
    """Seconds of one save."""

    state: float
    begin: float
    end: float
    whole: float


def build(folder: Path) -> tuple[Checkpointer, int]:
    """A model with an optimizer, as a training holds them, and its parameters."""
    start_groups()
    stage = Stage(
        name="bench",
        kind="pretrain",
        data="none",
        seq_length=TokenCount(1024),
        global_batch_size=1,
        train_iters=1000,
        keep_checkpoints=1,
        optimizer=OptimizerSection(lr=1e-4, min_lr=0.0),
        parallel=Parallel(),
    )
    job = TrainJob(
        shape=SHAPE,
        rope=rope(SHAPE),
        start_rope=rope(SHAPE),
        stage=stage,
        data_prefix=folder / "none",
        start_checkpoint=folder / "none",
        checkpoints=folder / "checkpoints",
        metrics_path=folder / "metrics.jsonl",
        tensorboard=folder / "tensorboard",
        log_folder=folder / "logs",
    )
    job.checkpoints.mkdir()
    model = build_gpt_model(SHAPE, job.rope, stage.parallel, precision="bf16", seq_length=stage.seq_length, seed=1)
    wrapped = wrap_model(model)
    optimizer = build_optimizer(wrapped, stage)
    prepare_optimizer_state(optimizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checkpointer = Checkpointer(
        job,
        settings={},
        source=folder,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, stage.optimizer, stage.iterations),
        control=Control(timedelta(minutes=10)),
    )
    return checkpointer, parameters


def save(checkpointer: Checkpointer, iteration: int, *, beside: bool) -> Measured:
    """One save, with the seconds for which the caller stood still."""
    state = checkpointer._state
    collecting = 0.0

    def timed(number: int) -> object:
        nonlocal collecting
        collecting = -time.perf_counter()
        found = state(number)
        collecting += time.perf_counter()
        return found

    checkpointer._state = timed
    began = time.perf_counter()
    checkpointer.begin(iteration, beside=beside)
    begin, end = time.perf_counter() - began, 0.0
    while checkpointer.is_under_way:
        if beside and checkpointer.is_busy:
            time.sleep(0.01)  # the training
            continue
        now = time.perf_counter()
        checkpointer.advance()
        end += time.perf_counter() - now
    checkpointer._state = state
    return Measured(collecting, begin, end, time.perf_counter() - began)


def main() -> None:
    """Measure, then extrapolate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each way, in turns; one more warms up")
    parser.add_argument("--folder", type=Path, help="where to write (default: the folder for temporary files)")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="bench-save-", dir=given.folder))
    print(f"`{command_line()}`. {machine()}\n", flush=True)
    try:
        with device_context():
            checkpointer, parameters = build(place)
            found: dict[bool, list[Measured]] = {False: [], True: []}
            for number in range(2 * given.rounds + 2):
                found[bool(number % 2)].append(save(checkpointer, number + 1, beside=bool(number % 2)))
        files = [
            path for path in iteration_folder(checkpointer.job.checkpoints, 2 * given.rounds + 2).rglob("*") if path.is_file()
        ]
        size = sum(path.stat().st_size for path in files)
        limit = statistics.median(seconds_of_writing(place / "limit", size) for _ in range(given.rounds))
    finally:
        shutil.rmtree(place)
    gigabytes = size / 1e9
    print(f"{parameters / 1e6:.0f}M parameters, {gigabytes:.2f} GB a checkpoint, median of {given.rounds}\n")
    rows, waits = [], 0.0
    for is_beside, name in ((False, "waited for"), (True, "beside the training")):
        parts = ("state", "begin", "end", "whole")
        state, begin, end, whole = (statistics.median(getattr(one, part) for one in found[is_beside][1:]) for part in parts)
        waits = begin + end
        ratios = (waits / gigabytes, whole / limit)
        rows.append([name, *(f"{value:.2f}" for value in (state, begin, end, waits, whole, *ratios))])
    rows.append(["one file", "-", "-", "-", f"{limit:.2f}", f"{limit:.2f}", f"{limit / gigabytes:.2f}", "1.00"])
    heads = (
        "save",
        "state, s",
        "begin, s",
        "end, s",
        "training waits, s",
        "until it is there, s",
        "waiting, s/GB",
        "over one file",
    )
    print(table(heads, rows))
    total, rate = sum_of_parameters(LLAMA_8B), copy_rate()
    print(
        f"\nLlama 8B ({total / 1e9:.2f}B), a checkpoint of {BYTES * total / 1e9:.0f} GB, any layout; the budget is {BUDGET:.0f} s\n"
    )
    extrapolated = []
    for gpus in GPUS:
        own = BYTES * total / gpus / 1e9
        seconds = waits + own / rate
        extrapolated.append([gpus, f"{own:.2f}", f"{seconds:.1f}", "yes" if seconds < BUDGET else "no"])
    print(
        table(
            ("GPUs", "a rank writes, GB", f"training waits, copying at {rate:.1f} GB/s, s", "within 1 % of 20 min"), extrapolated
        )
    )


def seconds_of_writing(path: Path, size: int) -> float:
    """Seconds until a file of `size` bytes lasts; it is removed again."""
    block = os.urandom(64 << 20)
    began = time.perf_counter()
    with path.open("wb") as file:
        for at in range(0, size, len(block)):
            file.write(block[: size - at])
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took


def copy_rate() -> float:
    """GB/s of copying into memory that is new to the process, as bytes from a GPU come into pageable memory."""
    source, seconds = torch.ones(COPIED, dtype=torch.uint8), []
    for _ in range(5):
        began = time.perf_counter()
        source.clone()
        seconds.append(time.perf_counter() - began)
    return COPIED / statistics.median(seconds) / 1e9


def sum_of_parameters(shape: ModelShape) -> int:
    """Weights of a Llama without tied embeddings."""
    attention = shape.hidden_size * shape.kv_channels * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
    layer = attention + 3 * shape.hidden_size * shape.ffn_hidden_size + 2 * shape.hidden_size
    return shape.num_layers * layer + 2 * shape.vocab_size * shape.hidden_size + shape.hidden_size


if __name__ == "__main__":
    main()
