"""TiledMLP against Megatron's MLP: same weights, same results, same gradients, inside a layer and under DDP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import destroy_process_groups, init_process_groups, longctx_block_spec, transformer_config
from mcore_longctx.model.initial_weights import set_initial_weights
from mcore_longctx.model.mlp import TiledMLP, tiled_mlp_spec
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import PLAIN_ROPE, SHAPE
from tests.multiproc import run_processes

# float32 sums in another order, of the largest entry
TOLERANCE = 1e-6
LENGTH, BATCH = 24, 2


def build(spec: ModuleSpec, parallel: Parallel, **overrides: Any) -> Any:
    """An MLP as TransformerLayer builds it, with weights that do not depend on its class."""
    with device_context():
        config = transformer_config(SHAPE, PLAIN_ROPE, parallel, precision="fp32", **overrides)
        mlp = build_module(spec, config=config, **({"ffn_hidden_size": config.ffn_hidden_size} if spec.module is MLP else {}))
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for parameter in mlp.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return mlp


def stock_spec() -> ModuleSpec:
    return replace(tiled_mlp_spec(), module=MLP, params={})


def inputs(parallel: Parallel) -> tuple[Tensor, Tensor]:
    """This rank's x and its upstream gradient."""
    rows = LENGTH // parallel.tensor_model_parallel_size if parallel.sequence_parallel else LENGTH
    seed = torch.distributed.get_rank() if parallel.sequence_parallel else 7
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(rows, BATCH, SHAPE.hidden_size, generator=generator) for _ in range(2))
    return x.requires_grad_(), grad


def forward_backward(mlp: Any, parallel: Parallel, *, recompute: bool = False, ddp: bool = False) -> dict[str, Tensor]:
    """Result and gradients of two micro-batches (their weight gradients add up)."""
    x, grad = inputs(parallel)
    found = {}
    with device_context():
        if ddp:
            settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
            module = DistributedDataParallel(mlp.config, settings, mlp)
            module.zero_grad_buffer()
        for i in range(2):
            x.grad = None
            if recompute:
                with torch.no_grad():
                    found["out"] = mlp(x)[0]
                with mlp.skipping_forward():
                    out, bias = mlp(x)
                assert out.untyped_storage().nbytes() == 4, "the skipped result takes memory"
            else:
                out, bias = mlp(x, padding_mask=None)
                found["out"] = out.detach()
            assert bias is getattr(mlp.linear_fc2, "bias", None)
            if bias is not None:  # the layer adds it
                out = out + bias
                found["out"] = found["out"] + bias.detach()
            assert out.shape == x.shape
            if ddp and i == 0:
                with module.no_sync():
                    out.backward(grad)
            else:
                out.backward(grad)
    found["x"] = x.grad
    for name, parameter in mlp.named_parameters():
        found[name] = parameter.main_grad if ddp else parameter.grad
        # a bias is a vector: the sum of its gradient is left to DDP
        assert not ddp or parameter.grad_added_to_main_grad == (isinstance(mlp, TiledMLP) and parameter.dim() == 2)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def errors_of_the_mlp(layouts: list[tuple[int, bool]]) -> dict[str, float]:
    """Run in each rank."""
    return {
        what: error
        for tp, sp in layouts
        for biases in (False, True)
        for what, error in errors_of_one_layout(tp, sp, add_bias_linear=biases).items()
    }


def errors_of_one_layout(tp: int, sp: bool, **overrides: Any) -> dict[str, float]:
    errors = {}
    parallel = Parallel(tensor_model_parallel_size=tp, sequence_parallel=sp)
    init_process_groups(parallel, seed=1)
    expected = forward_backward(build(stock_spec(), parallel, **overrides), parallel)
    assert any("bias" in name for name in expected) == overrides["add_bias_linear"]
    for tile in (None, 1, 10, 1000):
        for options in ({}, {"recompute": True}, {"recompute": True, "ddp": True}):
            if tile is None and not options:
                continue
            found = forward_backward(build(tiled_mlp_spec(tile), parallel, **overrides), parallel, **options)
            assert found.keys() == expected.keys()
            for what, tensor in found.items():
                errors[f"tp {tp}, sp {sp}, {overrides}, tile {tile}, {options}: {what}"] = relative(tensor, expected[what])
    plain = forward_backward(build(tiled_mlp_spec(None), parallel, **overrides), parallel)
    assert all(torch.equal(plain[what], tensor) for what, tensor in expected.items()), "without a tile it is Megatron's"
    return errors


@pytest.mark.multiproc
@pytest.mark.parametrize(("size", "layouts"), [(1, [(1, False)]), (2, [(2, False), (2, True)])], ids=["tp 1", "tp 2"])
def test_result_and_gradients_equal_stock_mlp(size: int, layouts: list[tuple[int, bool]]) -> None:
    for rank, errors in enumerate(run_processes(errors_of_the_mlp, size, layouts)):
        assert errors
        wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    init_process_groups(Parallel(), seed=1)
    yield
    destroy_process_groups()


def test_gpt_model_is_built_with_it_and_its_checkpoint_is_the_same() -> None:
    tokens = torch.randint(SHAPE.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    found: dict[Any, Any] = {}
    for tile in (None, 10):
        with device_context():
            config = transformer_config(SHAPE, PLAIN_ROPE, Parallel(), precision="fp32")
            block = longctx_block_spec(config)
            for layer in block.layer_specs:
                stock = get_gpt_layer_local_spec(normalization="RMSNorm").submodules.mlp
                layer.submodules.mlp = stock if tile is None else tiled_mlp_spec(tile)
            model = GPTModel(
                config=config,
                transformer_layer_spec=block,
                vocab_size=384,
                max_sequence_length=LENGTH,
                position_embedding_type="rope",
            )
            set_initial_weights(model, SHAPE.vocab_size, seed=3)
            losses = model(tokens, torch.arange(LENGTH).unsqueeze(0), None, labels=tokens)
            losses.sum().backward()
            stored = model.sharded_state_dict(metadata={"singleton_local_shards": False})
        assert isinstance(model.decoder.layers[0].mlp, TiledMLP) == (tile is not None)
        found[tile] = losses, {name: p.grad for name, p in model.named_parameters()}, sorted(stored)
    assert found[None][2] == found[10][2]
    assert relative(found[10][0], found[None][0]) < TOLERANCE
    for name, gradient in found[None][1].items():
        assert relative(found[10][1][name], gradient) < 10 * TOLERANCE, name


def test_weights_that_are_still_on_their_way_are_waited_for() -> None:
    mlp = build(tiled_mlp_spec(8), Parallel())
    seen = []
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        linear.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    mlp(inputs(Parallel())[0])
    assert seen == [mlp.linear_fc1, mlp.linear_fc2]


def test_skipping_ends_with_its_block() -> None:
    mlp = build(tiled_mlp_spec(), Parallel())
    x, _ = inputs(Parallel())
    with mlp.skipping_forward():
        assert not mlp(x)[0].any()
        with pytest.raises(ConfigError), mlp.skipping_forward():
            mlp(x, per_token_scale=x)
        assert not mlp(x)[0].any()
    assert mlp(x)[0].any()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"gated_linear_unit": False}, "gated_linear_unit is False"),
        ({"activation_func": F.gelu}, "activation_func is 'gelu'"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value is 7.0"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset is 1.0"),
    ],
)
def test_what_is_not_computed_is_refused_in_one_line(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tiled_mlp_spec(), Parallel(), **overrides)
    assert str(caught.value).startswith(said + "; the tiled MLP computes SwiGLU in the dtype of its weights only")
    assert "\n" not in str(caught.value)


def test_other_layers_experts_fp8_and_bad_tiles_are_refused() -> None:
    with pytest.raises(ConfigError, match="tile of the MLP is 0, expected at least one token"):
        build(tiled_mlp_spec(0), Parallel())
    spec = tiled_mlp_spec()
    with pytest.raises(ConfigError, match="does not compute experts"):
        build(replace(spec, params={"tile": None, "is_expert": True}), Parallel())
    spec.submodules.linear_fc1 = FusedNormLinear
    with pytest.raises(ConfigError, match="needs Megatron's ColumnParallelLinear, not FusedNormLinear"):
        build(spec, Parallel())
    config = transformer_config(SHAPE, PLAIN_ROPE, Parallel(), precision="fp32")
    config.fp8 = "hybrid"  # the config itself refuses it without TransformerEngine
    with pytest.raises(ConfigError, match="fp8 is 'hybrid'"):
        build_module(tiled_mlp_spec(), config=config)
    with pytest.raises(ConfigError, match="per_token_scale is given"):
        build(tiled_mlp_spec(), Parallel())(torch.zeros(1, 1, SHAPE.hidden_size), per_token_scale=torch.ones(1))


class FusedNormLinear(torch.nn.Module):
    """Stands for TransformerEngine's linear layers, which hold a norm that the tiled MLP would leave out."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
