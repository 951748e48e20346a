"""The model of one process against transformers: every rope, grouped queries, tied embeddings, vocabulary padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import (
    LongContextGPTModel,
    build_gpt_model,
    destroy_process_groups,
    init_process_groups,
    transformer_config,
)
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeBand, RopeScaling
from tests.model.llama import PLAIN_ROPE, SHAPE, build, hf_llama, megatron_names

TOLERANCE = 1e-5  # relative to the largest logit: float32 sums in another order
WIDE = ModelShape(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,  # not hidden_size / heads
    vocab_size=264,
)
COMMON = {"head_dim": 32, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
BANDS = (RopeBand(pairs=4, rule="none"), RopeBand(pairs=6, rule="mix", ntk_share=0.3), RopeBand(pairs=6, rule="ntk"))
ROPES = {
    "none": RopeScaling(type="none", head_dim=32, rope_theta=10_000.0),
    "linear": RopeScaling(type="linear", factor=4, **COMMON),
    "abf": RopeScaling(type="abf", head_dim=32, rope_theta=500_000.0),
    "ntk": RopeScaling(type="ntk", factor=4, **COMMON),
    "llama3": RopeScaling(type="llama3", factor=8, **COMMON),
    "bands": RopeScaling(type="bands", factor=8, bands=BANDS, **COMMON),
    "yarn": RopeScaling(type="yarn", factor=8, **COMMON),
    "yarn with attention_factor": RopeScaling(type="yarn", factor=8, attention_factor=1.7, **COMMON),
    "yarn with attention_factor 1": RopeScaling(type="yarn", factor=8, attention_factor=1.0, **COMMON),
}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    init_process_groups(Parallel(), seed=0)
    yield
    destroy_process_groups()


def tokens(vocab_size: int, length: int, samples: int = 2) -> torch.Tensor:
    return torch.randint(vocab_size, (samples, length), generator=torch.Generator().manual_seed(1))


def compare_logits(shape: ModelShape, rope: RopeScaling, start: int = 0, **options: Any) -> float:
    """Largest difference to transformers' logits, relative to the largest logit; padding must be -inf."""
    length = 128
    hf = hf_llama(shape, rope)
    model = build(Parallel(), megatron_names(dict(hf.state_dict()), shape), shape=shape, rope=rope, seq_length=length, **options)
    ids, positions = tokens(shape.vocab_size, length), torch.arange(start, start + length).expand(2, -1)
    with torch.no_grad():
        theirs, ours = hf(ids, position_ids=positions).logits, model(ids, positions)
    assert ours.shape[-1] % 128 == 0
    assert ours[..., shape.vocab_size :].eq(-torch.inf).all()
    return ((ours[..., : shape.vocab_size] - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_transformers_for_every_rope_that_it_can_express(name: str) -> None:
    assert compare_logits(WIDE, ROPES[name]) < TOLERANCE
    if name in ("llama3", "yarn"):  # far beyond: the angles are the same bits
        assert compare_logits(WIDE, ROPES[name], start=1_000_000) < TOLERANCE


def test_the_attention_factor_is_what_makes_yarn_equal() -> None:
    without = replace(ROPES["yarn with attention_factor"], attention_factor=1.0)
    hf = hf_llama(WIDE, ROPES["yarn with attention_factor"])
    model = build(Parallel(), megatron_names(dict(hf.state_dict()), WIDE), shape=WIDE, rope=without, seq_length=64)
    ids, positions = tokens(264, 64), torch.arange(64).expand(2, -1)
    with torch.no_grad():
        assert (hf(ids).logits - model(ids, positions)[..., :264]).abs().max() > 1e-2


@pytest.mark.parametrize("groups", [8, 4, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers_for_grouped_queries_and_tied_embeddings(groups: int, tied: bool) -> None:
    shape = replace(SHAPE, num_layers=2, num_query_groups=groups, tie_word_embeddings=tied)
    assert compare_logits(shape, PLAIN_ROPE) < TOLERANCE


def test_vocabulary_that_needs_no_padding_is_left_alone() -> None:
    assert compare_logits(replace(SHAPE, num_layers=1, vocab_size=256), PLAIN_ROPE) < TOLERANCE


def test_float64_phases_change_logits_only_where_float32_phases_are_wrong() -> None:
    near = compare_logits(WIDE, ROPES["none"], phase_dtype="float64")
    far = compare_logits(WIDE, ROPES["none"], start=4_000_000, phase_dtype="float64")
    assert near < 1e-4
    assert far > 1e-3


def test_loss_with_a_padded_vocabulary_equals_the_loss_over_the_real_one() -> None:
    hf = hf_llama(SHAPE)
    model = build(Parallel(), megatron_names(dict(hf.state_dict()), SHAPE))
    assert model.output_layer.weight.size(0) == 384
    with torch.no_grad():
        model.output_layer.weight[264:] = 50.0  # a padding row that would win every softmax
    ids, positions = tokens(264, 64), torch.arange(64).expand(2, -1)
    labels = ids.roll(-1, 1)
    losses = model(ids, positions, labels=labels)
    assert losses.shape == ids.shape
    assert losses.dtype is torch.float32
    expected = torch.nn.functional.cross_entropy(hf(ids).logits.transpose(1, 2), labels, reduction="none")
    assert ((losses - expected).abs().max() / expected.max()).item() < TOLERANCE
    losses.sum().backward()
    assert not model.output_layer.weight.grad[264:].any()


def test_positions_move_the_logits_only_by_their_differences() -> None:
    model = build(Parallel(), seq_length=64)
    ids, positions = tokens(264, 64, samples=1), torch.arange(64)[None]
    with torch.no_grad():
        plain, shifted, spread = (model(ids, p) for p in (positions, positions + 1000, positions * 3))
    real = slice(0, 264)
    assert (plain[..., real] - shifted[..., real]).abs().max() < 1e-4
    assert (plain[..., real] - spread[..., real]).abs().max() > 1e-3
    assert model.rotary_pos_emb.positions is None


def test_logits_at_rows_equal_the_full_logits_and_need_no_others() -> None:
    model = build(Parallel())
    ids, positions = tokens(264, 64), torch.arange(64).expand(2, -1)
    rows = torch.tensor([0, 63, 64, 127, 5])
    with torch.no_grad():
        full = model(ids, positions).flatten(0, 1)[:, :264]
    found = model.logits_at(ids, positions, rows)
    assert found.dtype is torch.float32
    assert (found - full[rows]).abs().max() < 1e-6
    assert model.logits_at(ids, positions, torch.empty(0, dtype=torch.int64)).shape == (0, 264)
    assert model(ids, positions).shape == (2, 64, 384)  # the next forward is an ordinary one


def test_tokens_without_positions_are_refused() -> None:
    model = build(Parallel())
    with pytest.raises(LayoutError, match=r"position_ids are \[1, 8\], input_ids \[1, 64\]: every token has one"):
        model(tokens(264, 64, samples=1), torch.arange(8)[None])


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (build(Parallel(), seed=seed).state_dict() for seed in (3, 3, 4))
    for name, tensor in first.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, again[name])
            if tensor.dim() == 2:
                assert not torch.equal(tensor, other[name])
    assert not first["embedding.word_embeddings.weight"][264:].any()


def test_a_model_that_is_to_be_loaded_starts_as_nan() -> None:
    model = build(Parallel(), seed=None)
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_weights_split_over_tensor_parallel_ranks_are_marked_for_the_gradient_norm() -> None:
    marked = {
        name for name, parameter in build(Parallel()).named_parameters() if getattr(parameter, "tensor_model_parallel", False)
    }
    expected = {name for name, parameter in build(Parallel()).named_parameters() if parameter.dim() == 2}
    assert marked == expected


def test_config_sums_losses_per_token_and_carries_the_temperature() -> None:
    config = transformer_config(WIDE, ROPES["yarn with attention_factor"], Parallel(), precision="bf16")
    assert config.calculate_per_token_loss
    assert config.softmax_scale == pytest.approx(1.7**2 / 32**0.5)
    assert config.params_dtype is config.pipeline_dtype is torch.bfloat16
    assert not hasattr(config, "yarn_rotary_scaling_factor")  # megatron would multiply cos and sin as well


@pytest.mark.parametrize(
    ("parallel", "seq_length", "message"),
    [
        (Parallel(tensor_model_parallel_size=3), 64, "num_attention_heads 8 is not divisible by tensor_model_parallel_size 3"),
        (Parallel(pipeline_model_parallel_size=3), 64, "num_layers 4 is not divisible by pipeline_model_parallel_size 3"),
        (
            Parallel(context_parallel_size=2),
            66,
            "seq_length 66 is not a multiple of 2 x context_parallel_size (4); nearest: 64 or 68",
        ),
        (
            Parallel(context_parallel_size=1, tensor_model_parallel_size=2, sequence_parallel=True),
            63,
            "seq_length / context_parallel_size (63) is not a multiple of tensor_model_parallel_size 2",
        ),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(parallel: Parallel, seq_length: int, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        build_gpt_model(SHAPE, PLAIN_ROPE, parallel, precision="fp32", seq_length=seq_length)
    assert message in str(caught.value)


def test_a_rope_for_other_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope is for heads of 32, the model's heads have 8"):
        build_gpt_model(SHAPE, ROPES["none"], Parallel(), precision="fp32", seq_length=64)


def test_the_stock_model_with_our_layer_spec_and_with_its_own_gives_our_logits() -> None:
    """What somebody gets who uses only the spec, and what Megatron's own attention gives."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from mcore_longctx.model import longctx_layer_spec

    ours = build(Parallel())
    ids, positions = tokens(264, 64), torch.arange(64).expand(2, -1)
    mask = torch.ones(64, 64, dtype=torch.bool).triu(1)[None, None]
    with device_context(), torch.no_grad():
        expected = ours(ids, positions)[..., :264]
        for spec, attention_mask in ((longctx_layer_spec(), None), (get_gpt_layer_local_spec(normalization="RMSNorm"), mask)):
            stock = GPTModel(
                config=transformer_config(SHAPE, PLAIN_ROPE, Parallel(), precision="fp32"),
                transformer_layer_spec=spec,
                vocab_size=384,
                max_sequence_length=64,
                position_embedding_type="rope",
                rotary_base=10_000,
            )
            stock.load_state_dict(ours.state_dict(), strict=False)
            assert (stock(ids, positions, attention_mask)[..., :264] - expected).abs().max() < 1e-5
    assert isinstance(ours, LongContextGPTModel)
