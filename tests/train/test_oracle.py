"""The whole loop against transformers and torch's AdamW: losses, gradient norms and learning rates of every step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcore_longctx.data import PackedSamples
from mcore_longctx.recipe import read_card
from mcore_longctx.rope import write_hf_rope
from mcore_longctx.train import TrainJob
from mcore_longctx.train.dataset import SampleOrder
from tests.train.jobs import ROPE, SAMPLES, make_job, make_world, rows, train

pytestmark = pytest.mark.multiproc


def reference(job: TrainJob, hf: Path) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of each step, with nothing of Megatron and nothing of the loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaConfig.from_pretrained(hf).to_dict() | {"attn_implementation": "eager"}
    for name in ("rope_scaling", "rope_parameters", "rope_theta"):
        plain.pop(name, None)
    scaled = write_hf_rope(replace(ROPE, max_position_embeddings=64))
    model = LlamaForCausalLM.from_pretrained(hf, config=LlamaConfig(**(plain | scaled)), dtype=torch.float32)
    section, steps = job.stage.optimizer, job.stage.iterations
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": section.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(section.adam_beta1, section.adam_beta2), eps=section.adam_eps)
    samples, order, found = PackedSamples(job.data_prefix), SampleOrder(SAMPLES, seed=job.seed), []
    for step in range(steps):
        if step <= section.lr_warmup_iters:
            lr = section.lr * step / section.lr_warmup_iters
        else:
            ratio = (step - section.lr_warmup_iters) / (steps - section.lr_warmup_iters)
            lr = section.min_lr + (section.lr - section.min_lr) * 0.5 * (1 + math.cos(math.pi * ratio))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [samples.sample(order[4 * step + i]) for i in range(4)]
        tokens, labels, mask = (torch.stack([torch.from_numpy(row[i]) for row in batch]) for i in range(3))
        losses = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses * mask.flatten()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        found.append((loss.item(), float(norm), lr))
    return found


def test_every_step_equals_transformers_and_torch_adamw(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    assert read_card(world / "base").rope.type == "none"
    job = make_job(world, "oracle", context_parallel_size=2, save_interval=100)
    train(job)
    for row, (loss, norm, lr) in zip(rows(job), reference(job, world / "hf"), strict=True):
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)  # fp32, and Adam amplifies rounding of small gradients
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
