"""`loss_reduction: sequence_mean` through the loop: loss and gradients of a plain recomputation in float64, for CP, DP, accumulation."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_longctx.data import IndexedWriter, PackedSamples
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe import OptimizerSection, Stage, TokenCount
from mcore_longctx.rope import write_hf_rope
from mcore_longctx.train import TrainJob, iteration_folder
from mcore_longctx.train.job import refuse_changed_settings
from mcore_longctx.train.order import SampleOrder
from tests.sidecars import write_runs
from tests.train.jobs import ROPE, SEQ_LENGTH, make_job, make_world, rows, train
from tests.train.test_dataset import step_data

SAMPLES = 8
# prompt and answer of each conversation of a sample; what is left is padding
PACKS = [[(2, 60)], [(3, 2), (5, 30), (9, 4)], [(20, 20), (4, 1)], [(8, 16), (8, 16), (3, 1), (2, 7)]]

NAMES = {  # Megatron's and transformers' of one gradient; the rest (joined there) is in the gradient norm
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.mlp.linear_fc2.weight": "model.layers.{}.mlp.down_proj.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "model.layers.{}.post_attention_layernorm.weight",
    "decoder.layers.self_attention.linear_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
}


def write_chats(folder: Path) -> Path:
    """Packed conversations with answers of 1 to 60 tokens, and their manifest. Returns the prefix."""
    folder.mkdir(parents=True)
    rng, runs, first = np.random.default_rng(3), [], [0]
    documents = 0
    with IndexedWriter(folder / "set", "uint16") as writer:
        for index in range(SAMPLES):
            writer.add(rng.integers(0, 126, SEQ_LENGTH).astype(np.uint16))
            for prompt, answer in PACKS[index % len(PACKS)]:
                runs += [(documents, 0, prompt, False), (documents, prompt, answer, True)]
                documents += 1
            rest = SEQ_LENGTH - sum(map(sum, PACKS[index % len(PACKS)]))
            runs += [(-2, 0, rest, False)] if rest else []
            first.append(len(runs))
    names = ("document", "start", "length", "loss")
    columns = dict(zip(names, map(list, zip(*runs, strict=True)), strict=True))
    ids = [("chats", str(number)) for number in range(documents)]
    write_runs(folder / "set", seq_length=SEQ_LENGTH, documents=ids, first_run=first, **columns)
    write_manifest(folder, "data", name="set", samples=SAMPLES)
    return folder / "set"


def reference(job: TrainJob, hf: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean over conversations of the mean over their answers, and its gradients by name: transformers, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaConfig.from_pretrained(hf).to_dict() | {"attn_implementation": "eager"}
    for name in ("rope_scaling", "rope_parameters", "rope_theta"):
        plain.pop(name, None)
    scaled = write_hf_rope(replace(ROPE, max_position_embeddings=64))
    model = LlamaForCausalLM.from_pretrained(hf, config=LlamaConfig(**(plain | scaled)), dtype=torch.float64)
    samples, order = PackedSamples(job.data_prefix), SampleOrder(SAMPLES, seed=job.seed)
    means = []
    for place in range(job.stage.global_batch_size):
        index = order[place]
        tokens = torch.from_numpy(samples.tokens(index).astype(np.int64))
        lengths = [prompt + answer for prompt, answer in PACKS[index % len(PACKS)]]
        parts = tokens[: sum(lengths)].split(lengths)
        logits = [model(part[None]).logits[0] for part in parts] if job.stage.cross_document_mask else None
        whole = model(tokens[None]).logits[0] if logits is None else torch.cat(logits)
        at = 0
        for prompt, answer in PACKS[index % len(PACKS)]:
            begin = at + prompt
            losses = torch.nn.functional.cross_entropy(
                whole[begin - 1 : begin - 1 + answer], tokens[begin : begin + answer], reduction="none"
            )
            means.append(losses.mean())
            at += prompt + answer
    loss = torch.stack(means).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def first_moments(folder: Path) -> dict[str, torch.Tensor]:
    """exp_avg of every parameter in a checkpoint, by its Megatron name."""
    found = {}
    for name, tensor in read_torch_dist(folder).tensors.items():
        if ".exp_avg." not in name:
            continue
        whole = torch.zeros(tensor.shape)
        for chunk in tensor.chunks:
            with chunk.file.open("rb") as file:
                file.seek(chunk.offset)
                values = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, values.shape, strict=True))] = values
        found[name] = whole
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "settings",
    [{"context_parallel_size": 2, "cross_document_mask": True}, {"data_parallel_size": 2, "micro_batch_size": 2}],
    ids=["CP 2, masked, 8 micro-batches", "DP 2, micro-batches of 2"],
)
def test_a_step_has_the_loss_and_the_gradients_of_the_mean_over_conversations(tmp_path: Path, settings: dict[str, Any]) -> None:
    world = make_world(tmp_path)
    prefix = write_chats(world / "chats")
    common = {"kind": "sft", "loss_reduction": "sequence_mean", "data_prefix": prefix, "global_batch_size": 8}
    job = make_job(world, "run", train_iters=1, save_interval=1, lr_warmup_iters=0, clip_grad=1e9, **common, **settings)
    train(job)
    (row,) = rows(job)
    loss, gradients = reference(job, world / "hf")
    assert row["loss"] == pytest.approx(loss, rel=1e-6)
    norm = torch.stack([(grad**2).sum() for grad in gradients.values()]).sum().sqrt()
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert row["loss_tokens"] == 2 * sum(answer for pack in PACKS for _, answer in pack)
    moments = first_moments(iteration_folder(job.checkpoints, 1))
    for ours, theirs in NAMES.items():
        if "{}" in theirs:
            expected = torch.stack([gradients[theirs.format(layer)] for layer in range(2)])
        else:
            expected = gradients[theirs]
        found = moments[f"optimizer.state.exp_avg.{ours}"][: len(expected)].double() / 0.1  # 1 - beta 1
        # float32 forward and backward over sums of some hundred terms of size 1e-1: 1e-5 of the largest is ten times their rounding
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), ours


def test_ranks_and_micro_batches_together_weigh_as_many_as_there_are_conversations(tmp_path: Path) -> None:
    """The numbers that Megatron adds up, and those that the losses are multiplied with, for layouts that would cost processes."""
    samples = PackedSamples(write_chats(tmp_path / "chats"))
    for masked, size in ((False, 1), (False, 2), (True, 1)):
        for dp, cp in ((1, 1), (2, 1), (1, 2), (2, 4), (4, 2)):
            whole, weights = 0, 0.0
            for dp_rank in range(dp):
                for cp_rank in range(cp):
                    settings = {"kind": "sft", "loss_reduction": "sequence_mean", "cross_document_mask": masked}
                    data = step_data(samples, dp=dp, cp=cp, ranks=(dp_rank, cp_rank), micro_batch_size=size, **settings)
                    for batch in data.micro_batches(0):
                        assert batch.weights is not None
                        assert batch.weight is not None
                        assert torch.equal(batch.weights > 0, batch.loss_mask)
                        whole += batch.weight
                        weights += float(batch.weights.double().sum())
            assert whole == 2 * sum(map(len, PACKS))
            assert weights == pytest.approx(whole, rel=2**-23)


def test_token_mean_has_no_weights(tmp_path: Path) -> None:
    (batch, *_) = step_data(PackedSamples(write_chats(tmp_path / "chats"))).micro_batches(0)
    assert (batch.weights, batch.weight) == (None, None)


def test_a_run_that_was_begun_with_another_reduction_is_not_resumed(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    sft = {"kind": "sft"}
    before, after = (
        make_job(world, "run", loss_reduction=name, **sft).settings(data="x") for name in ("token_mean", "sequence_mean")
    )
    with pytest.raises(CheckpointError, match="loss_reduction was None, is 'sequence_mean' now"):
        refuse_changed_settings(before, after, where=tmp_path)


@pytest.mark.parametrize("settings", [{"kind": "pretrain"}])
def test_documents_have_no_conversations_to_weigh(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="weighs the conversations of sft stages; it does not go with kind pretrain"):
        Stage(
            name="s",
            data="d",
            seq_length=TokenCount(64),
            global_batch_size=1,
            train_iters=1,
            optimizer=OptimizerSection(lr=1e-3),
            loss_reduction="sequence_mean",
            **settings,
        )
