"""Sparse to dense: the smallest weights are 0 and stay 0, at any layout and over a stop, until all train again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_longctx.convert import export_hf
from mcore_longctx.data import PackedSamples
from mcore_longctx.recipe.stage import SparsitySection
from mcore_longctx.rope import write_hf_rope
from mcore_longctx.train import TrainJob, iteration_folder
from mcore_longctx.train.order import SampleOrder
from tests.convert.hf_folders import read_weights
from tests.train.jobs import ROPE, SAMPLES, make_job, make_world, refused, rows, start_at, tensor_hashes, train
from tests.train.test_oracle import mean_loss

pytestmark = pytest.mark.multiproc

SHARE, DENSE_FROM, STEPS = 0.4, 4, 5
# what Megatron keeps as one matrix
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def job_of(world: Path, run: str, **changes: Any) -> TrainJob:
    how = SparsitySection(sparsity=SHARE, dense_from=DENSE_FROM)
    fields = {"train_iters": STEPS, "save_interval": 1, "keep_checkpoints": 9, "lr_warmup_iters": 1, "sparsity": how}
    return make_job(world, run, **(fields | changes))


@pytest.fixture(scope="module")
def straight(world: Path) -> TrainJob:
    job = job_of(world, "straight")
    train(job)
    return job


def groups_of(names: list[str]) -> list[list[str]]:
    layers = sorted({name.split(".")[2] for name in names if ".layers." in name})
    return [
        [name for name in names if f".layers.{layer}." in name and name.split(".")[-2] in group]
        for layer in layers
        for group in FUSED
    ]


def held(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where the weights of linear layers are to be 0, by sorting: an independent rule."""
    found = {}
    for group in groups_of(list(weights)):
        magnitudes = np.sort(np.concatenate([np.abs(weights[name]).ravel() for name in group]))
        limit = magnitudes[int(SHARE * magnitudes.size) - 1]
        found |= {name: np.abs(weights[name]) <= limit for name in group}
    return found


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Weights as float32, from float32 or bf16."""
    kinds = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}
    return {
        name: torch.frombuffer(bytearray(data), dtype=kinds[dtype]).float().reshape(shape).numpy()
        for name, (dtype, shape, data) in read_weights(folder).items()
    }


def zeros_after(job: TrainJob, iteration: int, out: Path) -> dict[str, np.ndarray]:
    export_hf(iteration_folder(job.checkpoints, iteration), out)
    return {name: weights == 0 for name, weights in arrays(out).items() if ".layers." in name and weights.ndim == 2}


def reference(job: TrainJob, hf: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step: transformers and AdamW, with masks that are found by sorting."""
    from dataclasses import replace

    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaConfig.from_pretrained(hf).to_dict() | {"attn_implementation": "eager"}
    for name in ("rope_scaling", "rope_parameters", "rope_theta"):
        plain.pop(name, None)
    config = LlamaConfig(**(plain | write_hf_rope(replace(ROPE, max_position_embeddings=64))))
    model = LlamaForCausalLM.from_pretrained(hf, config=config, dtype=torch.float32)
    masks = {name: torch.from_numpy(mask) for name, mask in held(arrays(hf)).items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name][mask] = 0
    section, found = job.stage.optimizer, []
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(section.adam_beta1, section.adam_beta2), eps=section.adam_eps)
    samples, order = PackedSamples(job.data_prefix), SampleOrder(SAMPLES, seed=job.seed)
    for step, row in enumerate(rows(job)):
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]  # held against the formula in test_oracle
        loss = mean_loss(model, samples, [order[4 * step + i] for i in range(4)], False)
        optimizer.zero_grad()
        loss.backward()
        if step + 1 < DENSE_FROM:
            for name, mask in masks.items():
                parameters[name].grad[mask] = 0
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        found.append((loss.item(), float(norm)))
    return found


def test_the_smallest_weights_are_held_at_0_until_all_train(world: Path, straight: TrainJob, tmp_path: Path) -> None:
    expected = held(arrays(world / "hf"))
    assert 0.39 < np.mean(np.concatenate([mask.ravel() for mask in expected.values()])) < 0.41
    for iteration in (1, DENSE_FROM - 1):
        found = zeros_after(straight, iteration, tmp_path / str(iteration))
        assert found.keys() == expected.keys()
        for name, mask in expected.items():
            np.testing.assert_array_equal(found[name], mask, err_msg=f"{name} after {iteration}")
    dense = zeros_after(straight, DENSE_FROM, tmp_path / "dense")
    assert not any(mask.any() for mask in dense.values())
    for row, (loss, norm) in zip(rows(straight), reference(straight, world / "hf"), strict=True):
        assert row["loss"] == pytest.approx(loss, rel=2e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=2e-4)


def test_the_same_weights_are_held_by_tensor_parallel_ranks(world: Path, straight: TrainJob, tmp_path: Path) -> None:
    job = job_of(world, "tp", tensor_model_parallel_size=2, data_parallel_size=2, train_iters=DENSE_FROM)
    train(job)
    expected = held(arrays(world / "hf"))
    for name, mask in zeros_after(job, DENSE_FROM - 1, tmp_path / "tp").items():
        np.testing.assert_array_equal(mask, expected[name], err_msg=name)
    for row, alone in list(zip(rows(job), rows(straight), strict=False))[: DENSE_FROM - 1]:
        assert row["loss"] == pytest.approx(alone["loss"], rel=2e-5)
    again = start_at(job_of(world, "again"), iteration_folder(straight.checkpoints, 2))
    train(again)
    assert tensor_hashes(iteration_folder(again.checkpoints, STEPS)) == tensor_hashes(
        iteration_folder(straight.checkpoints, STEPS)
    )
    line = refused(job_of(world, "again", sparsity=None))
    assert "sparsity.dense_from was 4, is None now, sparsity.sparsity was 0.4, is None now" in line


def test_weights_of_bf16_are_held_with_their_main_weights(world: Path, tmp_path: Path) -> None:
    job = job_of(world, "bf16", precision="bf16", train_iters=DENSE_FROM)
    train(job)
    rounded = {name: torch.from_numpy(weights).bfloat16().float().numpy() for name, weights in arrays(world / "hf").items()}
    expected = held(rounded)
    for iteration in (1, DENSE_FROM - 1):
        for name, mask in zeros_after(job, iteration, tmp_path / str(iteration)).items():
            np.testing.assert_array_equal(mask, expected[name], err_msg=f"{name} after {iteration}")
    dense = zeros_after(job, DENSE_FROM, tmp_path / "dense")
    # a gradient of 8 significant bits may be exactly 0 for one step: in 1 of 2^8 weights at the very most
    left, before = (sum(int(mask.sum()) for mask in masks.values()) for masks in (dense, expected))
    assert left < before / 2**8
