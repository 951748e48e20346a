"""A pack of documents under context parallelism has the loss and gradients of its documents one by one in transformers."""

from __future__ import annotations

import logging
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_longctx.errors import LongctxError
from mcore_longctx.layout.packed import PackLayout, pack_from_cu_seqlens, pack_layout
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import LongContextGPTModel, destroy_process_groups, init_process_groups
from mcore_longctx.model.initial_weights import global_name
from mcore_longctx.model.packed import packed_batch
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import SHAPE, build, hf_llama, megatron_names, own_part
from tests.multiproc import run_processes

LENGTHS = [37, 5, 1, 64, 22, 9]
STARTS = [0, *accumulate(LENGTHS)]
TOLERANCE = 1e-5  # float32 against float64
MASKS = ("all", "uneven", "one document alone")
TWO = [Parallel(context_parallel_size=2, cp_comm_type=kind) for kind in ("p2p", "all_gather", "a2a")]
FOUR = [
    *(Parallel(context_parallel_size=4, cp_comm_type=kind) for kind in ("p2p", "all_gather", "a2a")),
    Parallel(context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=(2, 2)),
    Parallel(
        context_parallel_size=4,
        cp_comm_type=("p2p", "a2a+p2p", "all_gather", "a2a"),
        hierarchical_context_parallel_sizes=(2, 2),
    ),
    Parallel(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
]


def tokens_and_masks() -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens [138] of the pack and which of them are to be learned from (never the last of a document: it has no label)."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(SHAPE.vocab_size, (sum(LENGTHS),), generator=generator)
    alone = torch.zeros(len(tokens))
    alone[STARTS[4] : STARTS[5]] = 1
    uneven = (torch.rand(len(tokens), generator=generator) < 0.4).float()
    return tokens, {"all": torch.ones(len(tokens)), "uneven": uneven, "one document alone": alone}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and by mask: summed loss and gradients of every document alone, in float64 by transformers."""
    tokens, masks = tokens_and_masks()
    hf = hf_llama()
    saved: dict[str, Any] = {"weights": megatron_names(dict(hf.state_dict()), SHAPE)}
    hf = hf.double()
    for name, mask in masks.items():
        hf.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for start, end in pairwise(STARTS):
            logits = hf(tokens[None, start:end]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, tokens[start + 1 : end], reduction="none")
            loss = loss + (losses * mask[start : end - 1]).sum()
        loss.backward()
        gradients = {key: parameter.grad.float() for key, parameter in hf.named_parameters()}
        saved[name] = (loss.item(), megatron_names(gradients, SHAPE))
    torch.save(saved, path := tmp_path_factory.mktemp("packs") / "reference.pt")
    return path


def stock_params(cp: int, qkv_format: str, max_seqlen: int | None = None) -> tuple[PackLayout, PackedSeqParams]:
    """What Megatron's own data path gives: padded cu_seqlens, with an empty document behind."""
    unit = 2 * cp
    padded = [0, *accumulate(-(-length // unit) * unit for length in LENGTHS)]
    real, padded = [*STARTS, STARTS[-1]], [*padded, padded[-1] + 4 * unit]
    layout = pack_from_cu_seqlens(real, padded, cp)
    sums, sums_padded = (torch.tensor(x, dtype=torch.int32) for x in (real, padded))
    longest = max_seqlen or int(np.diff(padded).max())
    return layout, PackedSeqParams(
        qkv_format=qkv_format,
        cu_seqlens_q=sums,
        cu_seqlens_kv=sums,
        cu_seqlens_q_padded=sums_padded,
        cu_seqlens_kv_padded=sums_padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def ways(parallel: Parallel) -> dict[str, tuple[PackLayout, Any]]:
    """Every way to hand the pack to the model."""
    cp, tp, inner = parallel.context_parallel_size, parallel.tensor_model_parallel_size, parallel.attention_neighbours
    made = {
        "hybrid": pack_layout(LENGTHS, cp, inner=inner, limit=20, multiple=tp),
        "chosen": pack_layout(LENGTHS, cp, inner=inner, multiple=tp),
        "zigzag": pack_layout(LENGTHS, cp, inner=inner, split="zigzag", multiple=tp, rows=192 // cp),
    }
    given: dict[str, tuple[PackLayout, Any]] = {name: (layout, packed_batch(layout)) for name, layout in made.items()}
    given["stock thd"] = stock_params(cp, "thd")
    given["stock thd, max_seqlen of the whole pack"] = stock_params(cp, "thd", int(given["stock thd"][1].cu_seqlens_q_padded[-1]))
    given["stock sbhd"] = stock_params(cp, "sbhd")
    return given


def loss_and_gradients(
    model: LongContextGPTModel, layout: PackLayout, params: Any, tokens: Tensor, mask: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Of the rows of this rank, summed over the context-parallel ranks."""
    group, rank = parallel_state.get_context_parallel_group(), parallel_state.get_context_parallel_rank()
    source = torch.from_numpy(layout.source(rank))
    rows = source.clamp(min=0)
    inputs = torch.where(source >= 0, tokens[rows], 0)[None]
    labels = tokens[(rows + 1).clamp(max=len(tokens) - 1)][None]
    weights = torch.from_numpy(layout.has_next(rank)) * mask[rows]
    model.zero_grad()
    with device_context():
        losses = model(inputs, torch.from_numpy(layout.positions(rank))[None], labels=labels, packed_seq_params=params)
        loss = (losses * weights).sum()
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        if parallel_state.get_tensor_model_parallel_world_size() > 1 and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        gradients[name] = parameter.grad
    return total.item(), gradients


def errors_of_packs(path: Path, layouts: list[Parallel]) -> dict[str, float]:
    """Run in each rank: largest relative difference of loss and gradients, by layout, way and mask."""
    saved = torch.load(path, weights_only=True)
    tokens, masks = tokens_and_masks()
    errors = {}
    for parallel in layouts:
        model = build(parallel, saved["weights"], seq_length=64)
        for way, (layout, params) in ways(parallel).items():
            if parallel.sequence_parallel and "stock" in way:
                continue  # its rows do not divide by TP
            for name in MASKS if way == "hybrid" else ("uneven",):
                expected_loss, expected = saved[name]
                loss, gradients = loss_and_gradients(model, layout, params, tokens, masks[name])
                label = f"{parallel.describe()}, {way}, {name}"
                errors[f"{label}: loss"] = abs(loss - expected_loss) / expected_loss
                for own_name, parameter in model.named_parameters():
                    wanted = own_part(model, own_name, parameter, expected)
                    largest = expected[global_name(own_name, model.config)].abs().max()
                    errors[f"{label}: {own_name}"] = ((gradients[own_name] - wanted).abs().max() / largest).item()
    return errors


def assert_all_small(results: list[dict[str, float]], ways_and_masks: int) -> None:
    for rank, errors in enumerate(results):
        assert sum(name.endswith(": loss") for name in errors) == ways_and_masks
        wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: " + "\n".join(f"{name}: {error:.1e}" for name, error in wrong.items())


@pytest.mark.multiproc
def test_two_ranks_have_the_loss_and_gradients_of_the_documents_alone(reference: Path) -> None:
    assert_all_small(run_processes(errors_of_packs, 2, reference, TWO), 3 * 8)


@pytest.mark.multiproc
def test_four_ranks_have_the_loss_and_gradients_of_the_documents_alone(reference: Path) -> None:
    assert_all_small(run_processes(errors_of_packs, 4, reference, FOUR), 5 * 8 + 5)


def test_one_rank_has_the_loss_and_gradients_of_the_documents_alone(reference: Path) -> None:
    try:
        assert_all_small([errors_of_packs(reference, [Parallel()])], 8)
    finally:
        destroy_process_groups()


class Lines(logging.Handler):
    """Collects messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def exchanges_of_layers() -> list[str]:
    """A list of exchanges, one for each layer, arrives in order; the first line of the log names what is used."""
    parallel, lines = FOUR[4], Lines()
    logger = logging.getLogger("mcore_longctx.model.attention")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    model = build(parallel)
    return [layer.self_attention.core_attention.cp_comm_type for layer in model.decoder.layers] + lines.lines


@pytest.mark.multiproc
def test_each_layer_gets_its_own_exchange() -> None:
    for found in run_processes(exchanges_of_layers, 4):
        assert found == [
            *("p2p", "a2a+p2p", "all_gather", "a2a"),
            "long-context attention: p2p over 4 ranks, kernel cpu_flash for float32 heads of 8 on cpu",
        ]


def refusals_of_packs() -> dict[str, str]:
    """What each rank says about packs that cannot be right. Rank 1 alone is given the mistake where its name says so."""
    parallel, rank = TWO[0], dist.get_rank()
    init_process_groups(parallel, seed=1)
    model = build(parallel, new_groups=False)
    layout, params = stock_params(2, "sbhd")
    other = pack_layout([*LENGTHS[1:], LENGTHS[0]], 2, split="zigzag", rows=layout.rows)
    short = stock_params(2, "thd", 61)[1]
    past = stock_params(2, "sbhd")[1]
    past.cu_seqlens_q_padded = past.cu_seqlens_kv_padded = past.cu_seqlens_q_padded + 8 * (past.cu_seqlens_q_padded > 0)
    unpadded = stock_params(2, "sbhd")[1]
    unpadded.cu_seqlens_q_padded = unpadded.cu_seqlens_kv_padded = None
    descending = stock_params(2, "sbhd")[1]
    if rank == 1:
        descending.cu_seqlens_q = descending.cu_seqlens_kv = descending.cu_seqlens_q.flip(0)
    ids = torch.zeros(1, layout.rows, dtype=torch.int64)
    attempts = {
        "one row too many on rank 1": (torch.zeros(1, layout.rows + rank, dtype=torch.int64), packed_batch(layout)),
        "another pack on rank 1": (ids, packed_batch(other if rank else layout)),
        "cannot be read on rank 1": (ids, descending),
        "max_seqlen of real lengths": (ids, short),
        "past the buffer": (ids, past),
        "not padded": (ids, unpadded),
        "four ranks": (ids, packed_batch(pack_layout(LENGTHS, 4, rows=layout.rows))),
        "micro batch of two": (ids.expand(2, -1), packed_batch(layout)),
    }
    messages = {}
    for name, (inputs, params) in attempts.items():
        with device_context(), pytest.raises(LongctxError) as caught:
            model(inputs, torch.zeros_like(inputs), labels=inputs, packed_seq_params=params)
        messages[name] = str(caught.value).removeprefix("packed_seq_params: ")
    return messages


@pytest.mark.multiproc
def test_a_pack_that_does_not_fit_is_one_line_on_every_rank_and_no_hang() -> None:
    fix = "; slice tokens, labels and positions with the pack's own rows (PackLayout.source)"
    same = {
        "one row too many on rank 1": "context-parallel rank 1 holds 85 rows of a pack that has 84 on each of 2"
        " (168 in all, padding included)" + fix,
        "another pack on rank 1": "context-parallel ranks hold different packs; give all of them the same documents",
        "max_seqlen of real lengths": "max_seqlen_q is 61, the longest document has 64 rows with its padding; "
        "max_seqlen counts padded rows, before the split over ranks",
        "past the buffer": "context-parallel rank 0 holds 84 rows of a pack that has 88 on each of 2"
        " (176 in all, padding included)" + fix,
        "not padded": "document 0 is padded to 37 rows, not a multiple of 2 x context_parallel_size (4); "
        "pad each document at its end, here to 40, and give these sums as cu_seqlens_padded",
        "four ranks": "the pack is laid out for 4 context-parallel ranks, there are 2",
        "micro batch of two": "attention of layer 1: a pack with micro batch size 2; use 1: a pack is a batch of documents",
    }
    for rank, messages in enumerate(run_processes(refusals_of_packs, 2, timeout=60)):
        expected = (
            "cu_seqlens are [138, 138, 129, 107, 43, 42, ...]; they begin with 0 and have one more entry than documents"
            if rank == 1
            else "context-parallel rank 1 cannot read its pack; see that rank's own message"
        )
        assert messages == same | {"cannot be read on rank 1": expected}
