"""A stage after another: its own rope, the moments of the one before, at another layout, against torch's AdamW that simply goes on."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.data import PackedSamples
from mcore_longctx.rope import RopeScaling, write_hf_rope
from mcore_longctx.train import TrainJob, iteration_folder
from mcore_longctx.train.order import SampleOrder
from tests.train.jobs import ROPE, SAMPLES, make_job, make_world, refused, rows, train
from tests.train.test_oracle import mean_loss

pytestmark = pytest.mark.multiproc

FIRST, SECOND = 4, 3
RAISED = RopeScaling(type="abf", head_dim=16, rope_theta=80000.0, max_position_embeddings=64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def first(world: Path) -> TrainJob:
    job = make_job(world, "first", train_iters=FIRST, save_interval=FIRST, data_parallel_size=2)
    train(job)
    return job


def after(world: Path, run: str, first: TrainJob, **changes: Any) -> TrainJob:
    """A second stage with another rope, another schedule, other betas, on one rank."""
    job = make_job(
        world,
        run,
        **{"name": "second", "train_iters": SECOND, "save_interval": 1, "lr": 1e-3, "min_lr": 1e-3, "lr_warmup_iters": 1}
        | {"adam_beta2": 0.9, "optimizer_from": "previous", "keep_checkpoints": 9}
        | changes,
    )
    return replace(job, rope=RAISED, start_rope=ROPE, start_checkpoint=iteration_folder(first.checkpoints, FIRST))


def reference(first: TrainJob, second: TrainJob, hf: Path, *, forget: bool) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of both stages: transformers and one AdamW, with nothing of Megatron or of the loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def config(rope: RopeScaling) -> Any:
        plain = LlamaConfig.from_pretrained(hf).to_dict() | {"attn_implementation": "eager"}
        for name in ("rope_scaling", "rope_parameters", "rope_theta"):
            plain.pop(name, None)
        return LlamaConfig(**(plain | write_hf_rope(replace(rope, max_position_embeddings=64))))

    model, samples, found = None, PackedSamples(first.data_prefix), []
    state: dict[str, Any] = {}
    for job in (first, second):
        section, steps = job.stage.optimizer, job.stage.iterations
        weights = {} if model is None else model.state_dict()
        model = LlamaForCausalLM.from_pretrained(hf, config=config(job.rope), dtype=torch.float32)
        if weights:
            model.load_state_dict(weights)
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(section.adam_beta1, section.adam_beta2), eps=section.adam_eps)
        if state and not forget:  # moments and step count, not the settings
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        order = SampleOrder(SAMPLES, seed=job.seed)
        for step in range(steps):
            warm_up, lr = section.lr_warmup_iters, section.lr
            ratio = (step - warm_up) / (steps - warm_up)
            rate = (
                lr * step / warm_up
                if step <= warm_up
                else section.min_lr + (lr - section.min_lr) * 0.5 * (1 + math.cos(math.pi * ratio))
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = mean_loss(model, samples, [order[4 * step + i] for i in range(4)], False)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
            optimizer.step()
            found.append((loss.item(), float(norm)))
        state = optimizer.state_dict()["state"]
    return found


def test_a_stage_goes_on_with_the_moments_of_the_one_before_and_its_own_rope(world: Path, first: TrainJob) -> None:
    second = after(world, "second", first, context_parallel_size=2)
    train(second)
    expected = reference(first, second, world / "hf", forget=False)
    found = [(row["loss"], row["grad_norm"]) for job in (first, second) for row in rows(job)]
    assert len(found) == len(expected) == FIRST + SECOND
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
        # float32 sums in another order; as in test_oracle
        assert loss == pytest.approx(wanted_loss, rel=2e-5)
        assert norm == pytest.approx(wanted_norm, rel=2e-4)
    forgotten = reference(first, second, world / "hf", forget=True)
    assert abs(forgotten[-1][0] / expected[-1][0] - 1) > 2e-4  # else this test could not tell

    # stopped after its first step, and on one rank: the moments are its own by then
    again = after(world, "again", first)
    shutil.copytree(iteration_folder(second.checkpoints, 1), iteration_folder(again.checkpoints, 1))
    train(again)
    for row, straight in zip(rows(again), rows(second)[1:], strict=True):
        assert row["loss"] == pytest.approx(straight["loss"], rel=2e-5)
    forgets = replace(again, stage=replace(again.stage, optimizer_from="none"))
    assert "optimizer_from was 'previous', is None now" in refused(forgets)


def test_a_start_without_optimizer_state_is_refused(world: Path, first: TrainJob) -> None:
    job = after(world, "imported", first)
    line = refused(replace(job, start_checkpoint=world / "base", start_rope=make_job(world, "x").start_rope))
    assert line.endswith(
        f"{world / 'base'}: holds no optimizer state, and stage second has optimizer_from: previous; train the stage before it again,"
        " or begin with moments of 0: optimizer_from: none"
    )
