"""Stands in for torchrun and its rank where the scheduler is the point: no torch, and accidents to order.

It takes the words that the job script gives to torchrun (on every node, with one rank), trains nothing, and leaves what a training leaves: STATUS, checkpoints with
a manifest, exit code 1 whatever happened, because torchrun has no other. What it does is read from RUN/stub.json, if there is one, at every start:

    {"start_seconds": 0.3, "deaf": true, "step_seconds": 0.2, "save_interval": 4, "saves": true, "status": "", "code": 0}

`deaf`: while they start, its ranks ignore signals, as those of torchrun do; false: the first TERM ends them.
`status`: what to write at once instead of training, for example `failed 2 no such data`, or `die` to write nothing more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from mcore_longctx.checkpoint_folder import iteration_folder, iteration_of, latest_checkpoint
from mcore_longctx.manifest import write_atomic, write_manifest
from mcore_longctx.recipe.load import open_recipe

ASKED: list[int] = []  # signals, in order


def remember(number: int, frame: FrameType | None) -> None:
    ASKED.append(number)


def save(checkpoints: Path, iteration: int, stage: str) -> None:
    folder = iteration_folder(checkpoints, iteration)
    partial = folder.with_name(f"{folder.name}.partial-stub-{os.getpid()}")
    partial.mkdir(parents=True)
    (partial / "weights").write_text(f"{iteration}\n")
    write_manifest(partial, "checkpoint", stage=stage, iteration=iteration)
    partial.rename(folder)


def start_up(folder: Path, rank: str) -> dict[str, Any]:
    """Imports, on every rank. Returns the orders."""
    orders = folder / "stub.json"
    how: dict[str, Any] = json.loads(orders.read_text()) if orders.exists() else {"step_seconds": 0.5}
    if not how.get("deaf", True):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with (folder / "stub.log").open("a") as log:
        log.write(f"rank {rank} imports, restart {os.environ.get('SLURM_RESTART_COUNT', '0')}\n")
    time.sleep(how.get("start_seconds", 0.2))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, remember)
    return how


def train(recipe_path: str, overrides: list[str], stage_name: str) -> str:
    """Returns the STATUS that it ends with."""
    recipe = open_recipe(recipe_path, overrides).recipe
    stage = next(stage for stage in recipe.stages if stage.name == stage_name)
    folder = recipe.run_folder
    how = start_up(folder, "0")
    checkpoints, status = folder / "checkpoints" / stage.name, folder / "logs" / stage.name / "STATUS"
    write_atomic(status, f"running - process {os.getpid()} on stub\n")
    if how.get("status") == "die":
        sys.exit(1)
    if how.get("status"):
        return str(how["status"])
    newest = latest_checkpoint(checkpoints)
    done = 0 if newest is None else iteration_of(newest)
    with (folder / "stub.log").open("a") as log:
        log.write(f"start at {done}\n")
        log.flush()
        while done < stage.iterations:
            end = time.monotonic() + how.get("step_seconds", 0.2)
            while time.monotonic() < end and not ASKED:
                time.sleep(0.01)
            if not ASKED:
                done += 1
                log.write(f"step {done}\n")
                log.flush()
            due = bool(ASKED) or done == stage.iterations or done % stage.save_interval == 0
            if due and done and how.get("saves", True) and not iteration_folder(checkpoints, done).exists():
                save(checkpoints, done, stage.name)
            if ASKED:
                return f"stopped 75 {signal.Signals(ASKED[0]).name} at iteration {done}, checkpoint saved"
    return f"done 0 {done} iterations"


def main() -> int:
    parser = argparse.ArgumentParser()
    for option in ("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port", "--signals_to_handle"):
        parser.add_argument(option, required=True)
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("verb")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--stage", required=True)
    words = parser.parse_intermixed_args()
    assert (words.module, words.verb, words.nproc_per_node) == ("mcore_longctx", "train", "1")
    stop = Path(words.recipe).parent / f"stub-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}.end"
    if words.node_rank != "0":
        start_up(Path(words.recipe).parent, words.node_rank)
        patience = 2.0  # with a rank 0 that has died: real ranks lose their connection to it
        while not stop.exists() and patience > 0:
            time.sleep(0.02)
            patience -= 0.02 if ASKED else 0
        return int(stop.read_text()) if stop.exists() else 1
    code = 1
    try:
        status = train(words.recipe, words.overrides, words.stage)
        write_atomic(Path(words.recipe).parent / "logs" / words.stage / "STATUS", f"{status}\n")
        code = 0 if status.startswith("done") else 1
    finally:
        aside = stop.with_suffix(".partial")
        aside.write_text(str(code))
        aside.replace(stop)
    return code


if __name__ == "__main__":
    sys.exit(main())
