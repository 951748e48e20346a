"""What a cache holds, where, and what cannot keep one. Results of every mode and layout: tests/evaluate/test_cached.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import builder, destroy_process_groups
from mcore_longctx.model.kv_cache import Branch, extend, prefill
from mcore_longctx.recipe.schema import CpCommType, Parallel
from tests.model.llama import SHAPE as FOUR_LAYERS
from tests.model.llama import build
from tests.multiproc import run_processes

SHAPE = replace(FOUR_LAYERS, num_layers=2)
PROMPT = torch.randint(SHAPE.vocab_size, (13,), generator=torch.Generator().manual_seed(4))
MORE = torch.randint(SHAPE.vocab_size, (7,), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model() -> Iterator[Any]:
    with device_context():
        yield build(Parallel(), shape=SHAPE).double().eval()
    destroy_process_groups()


def kept_rows(model: Any, rank: int, size: int) -> dict[str, Any]:
    """Cache of the prompt, padded to 16, and of five tokens after it in steps of 1 and 4."""
    tokens = torch.nn.functional.pad(PROMPT, (0, 3))
    positions = torch.from_numpy(zigzag_positions(16, size, rank))
    cache = prefill(model, tokens[positions][None], positions[None], len(PROMPT))
    branch = Branch(cache)
    none = torch.empty(0, dtype=torch.int64)
    for piece in (MORE[:1], MORE[1:5]):
        assert extend(model, branch, piece, none).shape == (0, SHAPE.vocab_size)
    return {"rows": positions[positions < len(PROMPT)], "prompt": cache.layers, "bytes": cache.bytes, "new": branch.layers}


def kept_of_rank(comm: CpCommType) -> dict[str, Any]:
    with device_context():
        model = build(Parallel(context_parallel_size=2, cp_comm_type=comm), shape=SHAPE).double().eval()
    return kept_rows(model, torch.distributed.get_rank(), 2)


@pytest.mark.multiproc
def test_each_rank_keeps_its_zigzag_rows_and_every_other_new_token(model: Any) -> None:
    alone = kept_rows(model, 0, 1)
    assert [tensor.shape for layer in alone["prompt"] for tensor in layer] == [(13, 1, 4, 8)] * 4
    for comm in ("p2p", "a2a"):  # a2a exchanges heads, and a rank keeps what it had before
        ranks = run_processes(kept_of_rank, 2, comm)
        assert [rank["rows"].tolist() for rank in ranks] == [[0, 1, 2, 3, 12], [4, 5, 6, 7, 8, 9, 10, 11]]
        for number, rank in enumerate(ranks):
            assert rank["bytes"] == 2 * 2 * len(rank["rows"]) * 4 * 8 * 8  # layers, keys and values, rows, heads, d, float64
            for layer in range(2):
                for kind in range(2):
                    of_prompt, of_new = alone["prompt"][layer][kind], alone["new"][layer][kind]
                    torch.testing.assert_close(rank["prompt"][layer][kind], of_prompt[rank["rows"]], rtol=0, atol=1e-12)
                    torch.testing.assert_close(rank["new"][layer][kind], of_new[number::2], rtol=0, atol=1e-12)


def test_kept_rows_hold_nothing_else_alive(model: Any) -> None:
    kept = kept_rows(model, 0, 1)
    for tensor in (tensor for name in ("prompt", "new") for layer in kept[name] for tensor in layer):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 8  # a view would keep a whole projection


def test_a_fork_goes_on_alone(model: Any) -> None:
    positions = torch.arange(len(PROMPT))[None]
    branch = Branch(prefill(model, PROMPT[None], positions, len(PROMPT)))
    every = torch.arange(2)
    extend(model, branch, MORE[:3], every)
    fork = branch.fork()
    found = extend(model, fork, MORE[3:5], every)
    assert (branch.new_tokens, fork.new_tokens) == (3, 5)
    assert [tensor.size(0) for layer in branch.layers for tensor in layer] == [3] * 4
    assert torch.equal(extend(model, branch, MORE[3:5], every), found)


def test_a_step_that_fails_leaves_the_branch_and_the_model_as_they_were(model: Any) -> None:
    positions = torch.arange(len(PROMPT))[None]
    branch = Branch(prefill(model, PROMPT[None], positions, len(PROMPT)))
    before = model.logits_at(PROMPT[None], positions, positions[0])
    with pytest.raises(IndexError):
        extend(model, branch, torch.tensor([10_000]), torch.tensor([0]))
    assert branch.new_tokens == 0
    assert branch.layers == ()
    assert torch.equal(model.logits_at(PROMPT[None], positions, positions[0]), before)  # no mode is left on
    assert torch.equal(before[-1], branch.prefix.next_logits)


def test_other_attention_keeps_no_cache(model: Any) -> None:
    class TEDotProductAttention(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            raise AssertionError("asked to compute")

    model.decoder.layers[1].self_attention.core_attention = TEDotProductAttention()
    with pytest.raises(ConfigError) as told:
        prefill(model, PROMPT[None], torch.arange(len(PROMPT))[None], len(PROMPT))
    assert str(told.value).startswith("model.backend: te: keys and values cannot be kept in TEDotProductAttention")
    assert "set backend: local" in str(told.value)


def test_pipeline_stages_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "post_process", False)
    with pytest.raises(LayoutError, match="need a model without pipeline stages"):
        prefill(model, PROMPT[None], torch.arange(len(PROMPT))[None], len(PROMPT))


def test_logits_of_a_head_that_is_widened_in_parts_are_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.arange(len(PROMPT))[None]
    whole = model.logits_at(PROMPT[None], positions, positions[0])
    monkeypatch.setattr(builder, "_WORDS_AT_ONCE", 100)  # of 384
    assert (model.logits_at(PROMPT[None], positions, positions[0]) - whole).abs().max() < 1e-12
