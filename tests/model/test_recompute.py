"""Recompute policies: the same gradients, one attention forward, and exactly the bytes that the formulas say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.layout import pack_layout
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import LongContextGPTModel, destroy_process_groups, init_process_groups
from mcore_longctx.model.builder import transformer_config
from mcore_longctx.model.packed import packed_batch
from mcore_longctx.model.recompute import LongContextLayer
from mcore_longctx.model.spec import longctx_block_spec
from mcore_longctx.recipe.schema import Activations, Parallel
from tests.model.llama import PLAIN_ROPE, SEQ_LENGTH, SHAPE, build
from tests.model.test_layouts import batches, forward_backward, layout
from tests.multiproc import run_processes

ALONE = Parallel()
POLICIES = ("none", "full", "attention_kept")
TWO_RANKS = [layout(cp=2), layout(cp=2, comm="all_gather"), layout(tp=2), layout(tp=2, sp=True), layout(pp=2)]
FOUR_RANKS = [layout(cp=2, tp=2, sp=True), layout(cp=2, pp=2), layout(tp=2, pp=2, sp=True)]


def model_with(recompute: Any, parallel: Parallel = ALONE, mlp_tile: int | None = 12, **options: Any) -> LongContextGPTModel:
    activations = Activations(recompute=recompute, mlp_tile=mlp_tile)  # type: ignore[arg-type]
    return build(parallel, activations=activations, **options).train()


def gradients(model: LongContextGPTModel) -> tuple[float | None, dict[str, Tensor]]:
    result = forward_backward(model, batches(SHAPE.vocab_size)["uneven"])
    return result.loss, {name: gradient for name, (_, _, gradient) in result.gradients.items()}


def attention_calls(model: LongContextGPTModel) -> set[int]:
    return {layer.self_attention.core_attention.forward_calls for layer in model.decoder.layers}


def compare_policies(layouts: list[Parallel]) -> dict[str, float]:
    """Run in each rank. Largest difference of any gradient: full to none, relative; attention_kept to full, absolute."""
    errors: dict[str, float] = {}
    for parallel in layouts:
        init_process_groups(parallel, seed=1)
        results, microbatches = {}, 4 // parallel.data_parallel_size
        for policy in POLICIES:
            model = model_with(policy, parallel, new_groups=False)
            results[policy] = gradients(model)
            assert attention_calls(model) == {2 * microbatches if policy == "full" else microbatches}, policy
        (loss, none), (full_loss, full), (kept_loss, kept) = (results[policy] for policy in POLICIES)
        assert loss == full_loss == kept_loss
        assert none.keys() == full.keys() == kept.keys()
        assert all(gradient.abs().max() > 0 for gradient in none.values())
        label = parallel.describe()
        errors[f"{label}: none"] = max(((full[name] - none[name]).abs().max() / none[name].abs().max()).item() for name in none)
        errors[f"{label}: kept"] = max((kept[name] - full[name]).abs().max().item() for name in full)
    return errors


def assert_equal(results: list[dict[str, float]]) -> None:
    for errors in results:
        assert errors
        for label, error in errors.items():
            assert error <= (0 if label.endswith("kept") else 2e-6), label


def test_one_process_gives_the_same_gradients_under_every_policy_bit_for_bit() -> None:
    assert_equal([compare_policies([Parallel()])])
    destroy_process_groups()


@pytest.mark.multiproc
def test_two_ranks_give_the_same_gradients_under_every_policy_bit_for_bit() -> None:
    assert_equal(run_processes(compare_policies, 2, TWO_RANKS))


@pytest.mark.multiproc
def test_four_ranks_give_the_same_gradients_under_every_policy_bit_for_bit() -> None:
    assert_equal(run_processes(compare_policies, 4, FOUR_RANKS))


def compare_policies_on_packs(kinds: list[str]) -> dict[str, float]:
    """Run in each rank: as `compare_policies`, on five documents that do not see each other."""
    errors: dict[str, float] = {}
    for kind in kinds:
        parallel = layout(cp=torch.distributed.get_world_size(), comm=kind)
        init_process_groups(parallel, seed=1)
        pack = pack_layout([19, 1, 70, 8, 33], parallel.context_parallel_size, inner=parallel.attention_neighbours)
        rank = parallel_state.get_context_parallel_rank()
        tokens = torch.randint(SHAPE.vocab_size, (132,), generator=torch.Generator().manual_seed(2))
        source = torch.from_numpy(pack.source(rank))
        weights = torch.from_numpy(pack.has_next(rank)).float()[None]
        positions = torch.from_numpy(pack.positions(rank))[None]
        found: dict[str, dict[str, Tensor]] = {}
        for policy in ("full", "attention_kept"):
            model = model_with(policy, parallel, new_groups=False)
            with device_context():
                model(
                    tokens[source.clamp(0)][None],
                    positions,
                    labels=tokens[source + 1][None],
                    loss_weights=weights,
                    packed_seq_params=packed_batch(pack),
                ).backward()
            found[policy] = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient.abs().max() > 0 for gradient in found["full"].values())
        errors[f"{kind}: kept"] = max((found["attention_kept"][name] - g).abs().max().item() for name, g in found["full"].items())
    return errors


@pytest.mark.multiproc
def test_packs_have_the_same_gradients_under_both_policies_bit_for_bit() -> None:
    assert_equal(run_processes(compare_policies_on_packs, 2, ["p2p", "all_gather", "a2a"]))


def kept_bytes(model: LongContextGPTModel) -> int:
    """Bytes of distinct storages that one layer keeps for its backward pass, weights and angles excluded."""
    hidden = torch.randn(SEQ_LENGTH, 1, SHAPE.hidden_size, requires_grad=True)
    angles = model.rotary_pos_emb(SEQ_LENGTH)
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), angles)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with device_context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = model.decoder.layers[0](hidden, None, rotary_pos_emb=angles)
    assert output.requires_grad
    return sum(kept.values())


def test_kept_bytes_are_those_of_the_formulas() -> None:
    h, q, d = SHAPE.hidden_size, SHAPE.num_attention_heads, SHAPE.kv_channels
    expected = {
        "full": 4 * h,
        "attention_kept": 4 * h + 4 * q * d + 4 * q,
    }  # float32: twice the bf16 figures, lse is float32 anyway
    for policy, per_token in expected.items():
        assert kept_bytes(model_with(policy)) == per_token * SEQ_LENGTH, policy
    assert kept_bytes(model_with("none", mlp_tile=None)) > 3 * expected["attention_kept"] * SEQ_LENGTH
    destroy_process_groups()


def test_the_down_projection_is_not_run_again() -> None:
    """Products of one layer, forward and backward: 6 matrices (qkv, o, gate_up, down and two gradients each) and what is redone."""

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.multiplied = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
                a = args[-1] if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm) else args[2]
                self.multiplied += out.numel() * a.size(-2)
            return out

    h, f = SHAPE.hidden_size, SHAPE.ffn_hidden_size
    qkv = h * SHAPE.kv_channels * (SHAPE.num_attention_heads + 2 * SHAPE.num_query_groups)
    proj, gate_up, down = h * SHAPE.kv_channels * SHAPE.num_attention_heads, 2 * h * f, h * f
    once = qkv + proj + gate_up + down
    for policy, tile, expected in (
        ("none", None, 3 * once),
        ("full", None, 4 * once - down),
        ("attention_kept", None, 4 * once - down),
        ("attention_kept", 16, 4 * once - down),
    ):
        model = model_with(policy, mlp_tile=tile)
        hidden = torch.randn(SEQ_LENGTH, 1, h, requires_grad=True)
        with device_context(), Products() as products:
            output, _ = model.decoder.layers[0](hidden, None, rotary_pos_emb=model.rotary_pos_emb(SEQ_LENGTH))
            output.sum().backward()
        assert products.multiplied == expected * SEQ_LENGTH, (policy, tile)
    destroy_process_groups()


def test_weights_get_gradients_when_the_layer_input_needs_none() -> None:
    model = model_with("attention_kept")
    hidden = torch.randn(SEQ_LENGTH, 1, SHAPE.hidden_size)
    with device_context():
        output, _ = model.decoder.layers[0](hidden, None, rotary_pos_emb=model.rotary_pos_emb(SEQ_LENGTH))
        output.sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in model.decoder.layers[0].parameters())
    destroy_process_groups()


def test_nothing_is_kept_or_run_again_without_a_backward_pass() -> None:
    model = model_with("attention_kept")
    hidden = torch.randn(SEQ_LENGTH, 1, SHAPE.hidden_size)
    with device_context(), torch.no_grad():
        output, _ = model.decoder.layers[0](hidden, None, rotary_pos_emb=model.rotary_pos_emb(SEQ_LENGTH))
    assert not output.requires_grad
    assert model.decoder.layers[0].self_attention.core_attention.forward_calls == 1
    destroy_process_groups()


@pytest.mark.parametrize(
    ("recompute", "overrides", "message"),
    [
        ("some", {}, "recompute is 'some'"),
        ("full", {"hidden_dropout": 0.1}, "hidden_dropout is 0.1 with recompute full: its random numbers are not replayed"),
        (
            "attention_kept",
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            "recompute is attention_kept and Megatron's recompute_granularity is full",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_refused(recompute: Any, overrides: dict[str, Any], message: str) -> None:
    init_process_groups(Parallel(), seed=1)
    with device_context():
        config = transformer_config(SHAPE, PLAIN_ROPE, Parallel(), precision="fp32", **overrides)
        spec = longctx_block_spec(config, recompute=recompute).layer_specs[0]
        with pytest.raises(ConfigError, match=message):
            LongContextLayer(config, spec.submodules, **spec.params)
    destroy_process_groups()


def test_attention_kept_needs_an_attention_that_can_be_kept() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    init_process_groups(Parallel(), seed=1)
    with device_context():
        config = transformer_config(SHAPE, PLAIN_ROPE, Parallel(), precision="fp32")
        spec = longctx_block_spec(config, recompute="attention_kept").layer_specs[0]
        spec.submodules.self_attention.submodules.core_attention = DotProductAttention
        with pytest.raises(ConfigError, match="needs LongContextAttention, the core attention is DotProductAttention"):
            LongContextLayer(config, spec.submodules, **spec.params)
    destroy_process_groups()
