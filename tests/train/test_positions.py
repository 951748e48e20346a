"""Positions with jumps through rope, context parallelism and passes, against transformers that is given the same positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_longctx.data import PackedSamples
from mcore_longctx.data.methods.positions import jumping_positions, segment_lengths
from mcore_longctx.recipe import TokenCount
from mcore_longctx.recipe.stage import PositionsSection
from mcore_longctx.rope import write_hf_rope
from mcore_longctx.train import TrainJob
from mcore_longctx.train.order import SampleOrder
from tests.train.jobs import ROPE, SAMPLES, make_job, make_world, refused, rows, train
from tests.train.test_dataset import step_data

TARGET, ENDS = 256, tuple(range(40))  # some of each sample


def section(kind: Any, target: int = TARGET) -> PositionsSection:
    return PositionsSection(type=kind, target=TokenCount(target))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def samples(world: Path) -> PackedSamples:
    return PackedSamples(world / "data" / "set")


@pytest.mark.parametrize("kind", ["pose", "rpes", "segments"])
def test_the_shares_of_context_parallel_ranks_are_parts_of_one_draw(samples: PackedSamples, kind: Any) -> None:
    how = section(kind)
    order, places = SampleOrder(SAMPLES, seed=3), {0: 8 * 2, 5: 8 * 2 + 5}  # of iteration 2: the second pass begins inside it
    whole = step_data(samples, positions=how, micro_batch_size=8, sentence_ends=ENDS)
    (batch,) = whole.micro_batches(2)
    for row, place in places.items():
        index = order[place]
        segments = segment_lengths(samples.tokens(index), np.array(ENDS))
        wanted = jumping_positions(how, 64, seed=3, sample=index, number=place // SAMPLES, segments=segments)
        np.testing.assert_array_equal(batch.positions[row].numpy(), wanted)
    for rank in range(2):
        (mine,) = step_data(samples, cp=2, ranks=(0, rank), positions=how, micro_batch_size=8, sentence_ends=ENDS).micro_batches(
            2
        )
        (plain,) = step_data(samples, cp=2, ranks=(0, rank), micro_batch_size=8).micro_batches(2)
        for row in range(8):
            assert torch.equal(mine.positions[row], batch.positions[row][plain.positions[row]])
            assert torch.equal(mine.tokens[row], plain.tokens[row])
    for dp_rank in range(2):  # another layout and micro-batch: the same positions for the same sample
        for part in step_data(
            samples, dp=2, ranks=(dp_rank, 0), positions=how, micro_batch_size=1, sentence_ends=ENDS
        ).micro_batches(2):
            row = batch.sample_ids.index(part.sample_ids[0])
            assert torch.equal(part.positions[0], batch.positions[row])


def reference_loss(job: TrainJob, hf: Path) -> float:
    """Of the first step's samples one by one, weights as they are: transformers with `position_ids`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaConfig.from_pretrained(hf).to_dict() | {"attn_implementation": "eager"}
    for name in ("rope_scaling", "rope_parameters", "rope_theta"):
        plain.pop(name, None)
    config = LlamaConfig(**(plain | write_hf_rope(replace(ROPE, max_position_embeddings=TARGET))))
    model = LlamaForCausalLM.from_pretrained(hf, config=config, dtype=torch.float32)
    samples, order, how = PackedSamples(job.data_prefix), SampleOrder(SAMPLES, seed=job.seed), job.stage.positions
    total, count = 0.0, 0.0
    for index in (order[place] for place in range(4)):
        tokens, labels, mask = (torch.from_numpy(column) for column in samples.sample(index))
        segments = segment_lengths(samples.tokens(index), np.array(job.sentence_ends, np.int64))
        places = (
            np.arange(64) if how is None else jumping_positions(how, 64, seed=job.seed, sample=index, number=0, segments=segments)
        )
        with torch.no_grad():
            logits = model(tokens[None], position_ids=torch.from_numpy(places)[None]).logits[0]
        total += float((torch.nn.functional.cross_entropy(logits, labels, reduction="none") * mask).sum())
        count += float(mask.sum())
    return total / count


@pytest.mark.multiproc
def test_a_stage_with_jumps_trains_as_transformers_computes_at_any_layout(world: Path) -> None:
    plain = make_job(world, "plain", train_iters=2, lr_warmup_iters=0, save_interval=9)
    train(plain)
    losses = {"plain": [row["loss"] for row in rows(plain)]}
    first = reference_loss(plain, world / "hf")
    assert losses["plain"][0] == pytest.approx(first, rel=1e-5)
    for kind, layout in (("segments", {"micro_batch_size": 2}), ("rpes", {"context_parallel_size": 2, "micro_batch_size": 2})):
        job = make_job(world, kind, train_iters=2, lr_warmup_iters=0, save_interval=9, positions=section(kind), **layout)
        job = replace(job, sentence_ends=ENDS)
        train(job)
        losses[kind] = [row["loss"] for row in rows(job)]
        first = reference_loss(job, world / "hf")
        assert losses[kind][0] == pytest.approx(first, rel=1e-5)
        assert abs(losses[kind][0] / losses["plain"][0] - 1) > 1e-4  # jumps do something
    alone = make_job(world, "alone", train_iters=2, lr_warmup_iters=0, save_interval=9, positions=section("rpes"))
    train(alone)
    assert [row["loss"] for row in rows(alone)] == pytest.approx(losses["rpes"], rel=1e-5)
    without_jumps = make_job(world, "none", train_iters=2, lr_warmup_iters=0, save_interval=9, positions=section("rpes", 64))
    train(without_jumps)
    assert [row["loss"] for row in rows(without_jumps)] == losses["plain"]  # the same bits
    other = replace(alone, stage=replace(alone.stage, positions=section("rpes", 512), train_iters=2))
    assert "positions.target was 256, is 512 now" in refused(other)
