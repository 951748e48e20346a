"""The verb `train`: from a recipe to a job, and a real start under torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mcore_longctx.cli import main as command_line
from mcore_longctx.cli import train as verb
from mcore_longctx.errors import ConfigError
from tests.train.jobs import SEQ_LENGTH, make_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose run folder holds base and data."""
    folder = tmp_path_factory.mktemp("verb")
    make_world(folder / "run" / "made")
    for old, new in (("made/base", "checkpoints/base"), ("made/data", "data/extend")):
        (folder / "run" / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / old).rename(folder / "run" / new)
    stage = {
        "name": "extend",
        "kind": "pretrain",
        "data": "set",
        "seq_length": SEQ_LENGTH,
        "global_batch_size": 2,
        "train_iters": 40,
        "precision": "fp32",
        "save_interval": 100,
        "parallel": {"context_parallel_size": 2},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 2},
    }
    text = {
        "name": "verb",
        "seed": 5,
        "output": str(folder / "run"),
        "model": {"path": str(folder / "run" / "made" / "hf")},
        "rope": {"type": "llama3", "factor": 2, "original_max_position_embeddings": 32},
        "data": {"set": {"sources": [{"name": "a", "path": str(folder / "a.txt")}]}},
        "stages": [stage, stage | {"name": "instruct", "train_iters": 4}],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(text))
    return path


def parse(*words: str) -> argparse.Namespace:
    return command_line.parse(["train", *words])


def test_overrides_may_stand_before_and_behind_the_stage() -> None:
    first = parse("r.yaml", "a.b=1", "--stage", "extend", "c.d=2")
    assert (first.recipe, first.overrides, first.stage) == ("r.yaml", ["a.b=1", "c.d=2"], "extend")
    assert parse("r.yaml", "--stage", "extend").stage == "extend"
    assert parse("r.yaml").stage is None


def test_a_recipe_gives_the_job_of_a_stage(recipe: Path) -> None:
    run = recipe.parent / "run"
    job = verb.train_job(str(recipe), ["stages.extend.optimizer.lr=0.5", "rope.phase_dtype=float64"], "extend")
    assert (job.start_checkpoint, job.start_rope.type, job.rope.type) == (run / "checkpoints" / "base", "none", "llama3")
    assert (job.data_prefix, job.checkpoints) == (run / "data" / "extend" / "set", run / "checkpoints" / "extend")
    assert (job.metrics_path, job.log_folder) == (run / "metrics" / "extend.jsonl", run / "logs" / "extend")
    assert (job.seed, job.stage.optimizer.lr, job.phase_dtype) == (5, 0.5, "float64")
    assert job.tokenizer_sha256 is not None


def test_a_stage_that_is_missing_or_comes_too_early_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml: --stage is missing; stages: extend, instruct$"):
        verb.train_job(str(recipe), [], None)
    with pytest.raises(ConfigError, match=r"recipe.yaml: no stage 'extent'; stages: extend, instruct$"):
        verb.train_job(str(recipe), [], "extent")
    early = r"stage extend, which instruct goes on from, has no checkpoint, its end is iter_0000040; train stage extend to its end first$"
    with pytest.raises(ConfigError, match=early):
        verb.train_job(str(recipe), ["output=elsewhere"], "instruct")


def command(recipe: Path, *words: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "mcore_longctx", "train", str(recipe), "--stage", *words]


@pytest.mark.multiproc
def test_torchrun_passes_a_stop_on_and_another_layout_goes_on(recipe: Path) -> None:
    run = recipe.parent / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    metrics, status = run / "metrics" / "extend.jsonl", run / "logs" / "extend" / "STATUS"
    with (run / "out.log").open("w") as log:
        child = subprocess.Popen(command(recipe, "extend", ranks=2), env=environment, cwd=recipe.parent, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not (metrics.exists() and metrics.read_text()):
                assert time.monotonic() < deadline, (run / "out.log").read_text()[-3000:]
                assert child.poll() is None, (run / "out.log").read_text()[-3000:]
                time.sleep(0.01)
            child.send_signal(signal.SIGTERM)
            child.wait(60)
        finally:
            child.kill()
            child.wait()
    reached = len(metrics.read_text().splitlines())
    assert status.read_text() == f"stopped 75 SIGTERM at iteration {reached}, checkpoint saved; start again to go on\n"
    assert 0 < reached < 40
    again = command(recipe, "extend", "stages.extend.parallel.context_parallel_size=1")
    done = subprocess.run(again, env=environment, cwd=recipe.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert status.read_text() == "done 0 40 iterations\n"
    assert len(metrics.read_text().splitlines()) == 40
    assert f"going on after iteration {reached} from " in done.stdout
    assert done.stderr == ""
    # the next stage starts from this one's end; a changed setting ends with 2
    assert verb.train_job(str(recipe), [], "instruct").start_checkpoint == run / "checkpoints" / "extend" / "iter_0000040"
    changed = command(recipe, "extend", "stages.extend.parallel.context_parallel_size=1", "stages.extend.optimizer.lr=0.5")
    refused = subprocess.run(
        changed, env=environment, cwd=recipe.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 2
    assert "optimizer.lr was 0.001, is 0.5 now" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
