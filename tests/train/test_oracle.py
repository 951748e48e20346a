"""The whole loop against transformers and torch's AdamW: losses, gradient norms and learning rates of every step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.data import PackedSamples
from mcore_longctx.recipe import read_card
from mcore_longctx.rope import write_hf_rope
from mcore_longctx.train import TrainJob
from mcore_longctx.train.order import SampleOrder
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
        loss = mean_loss(model, samples, [order[4 * step + i] for i in range(4)], job.stage.cross_document_mask)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.clip_grad)
        optimizer.step()
        found.append((loss.item(), float(norm), lr))
    return found


def mean_loss(model: Any, samples: PackedSamples, ids: list[int], one_by_one: bool) -> torch.Tensor:
    """Over all tokens that carry loss; `one_by_one`: each document on its own, its last token without loss."""
    losses, masks = [], []
    for index in ids:
        tokens, labels, mask = (torch.from_numpy(column) for column in samples.sample(index))
        lengths = samples.document_lengths(index) if one_by_one else [len(tokens)]
        assert not one_by_one or len(lengths) == 2
        for t, y, m in zip(tokens.split(lengths), labels.split(lengths), mask.split(lengths), strict=True):
            losses.append(torch.nn.functional.cross_entropy(model(t[None]).logits[0], y, reduction="none"))
            masks.append(m.clone())
            if one_by_one:
                masks[-1][-1] = False
    return (torch.cat(losses) * torch.cat(masks)).sum() / torch.cat(masks).sum()


@pytest.mark.parametrize(
    "layout",
    [
        {"context_parallel_size": 2},
        {"context_parallel_size": 2, "cp_comm_type": "a2a", "pipeline_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ],
    ids=["CP 2", "CP 2 a2a PP 2", "TP 2 SP"],
)
def test_documents_that_do_not_see_each_other_train_as_if_each_were_alone(tmp_path: Path, layout: dict[str, Any]) -> None:
    world = make_world(tmp_path)
    job = make_job(world, "masked", cross_document_mask=True, train_iters=4, save_interval=100, **layout)
    train(job)
    for row, (loss, norm, _) in zip(rows(job), reference(job, world / "hf"), strict=True):
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert "documents of the first sample: 2 documents, 64 tokens in" in (job.log_folder / "rank0.log").read_text()


def test_every_step_equals_transformers_and_torch_adamw(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    assert read_card(world / "base").rope.type == "none"
    job = make_job(world, "oracle", context_parallel_size=2, save_interval=100)
    train(job)
    for row, (loss, norm, lr) in zip(rows(job), reference(job, world / "hf"), strict=True):
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)  # fp32, and Adam amplifies rounding of small gradients
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
