"""TiledMLP against Megatron's MLP: same weights, same results, same gradients, inside a layer and under DDP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import init_process_groups, transformer_config
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
            assert bias is None
            assert out.shape == x.shape
            if ddp and i == 0:
                with module.no_sync():
                    out.backward(grad)
            else:
                out.backward(grad)
    found["x"] = x.grad
    for name, parameter in mlp.named_parameters():
        found[name] = parameter.main_grad if ddp else parameter.grad
        assert not ddp or parameter.grad_added_to_main_grad == isinstance(mlp, TiledMLP)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def errors_of_the_mlp(layouts: list[tuple[int, bool]]) -> dict[str, float]:
    """Run in each rank."""
    errors = {}
    for tp, sp in layouts:
        parallel = Parallel(tensor_model_parallel_size=tp, sequence_parallel=sp)
        init_process_groups(parallel, seed=1)
        expected = forward_backward(build(stock_spec(), parallel), parallel)
        for tile in (None, 1, 10, 1000):
            for options in ({}, {"recompute": True}, {"recompute": True, "ddp": True}):
                if tile is None and not options:
                    continue
                found = forward_backward(build(tiled_mlp_spec(tile), parallel), parallel, **options)
                assert found.keys() == expected.keys()
                for what, tensor in found.items():
                    errors[f"tp {tp}, sp {sp}, tile {tile}, {options}: {what}"] = relative(tensor, expected[what])
        plain = forward_backward(build(tiled_mlp_spec(None), parallel), parallel)
        assert all(torch.equal(plain[what], tensor) for what, tensor in expected.items()), "without a tile it is Megatron's"
    return errors


@pytest.mark.multiproc
@pytest.mark.parametrize(("size", "layouts"), [(1, [(1, False)]), (2, [(2, False), (2, True)])], ids=["tp 1", "tp 2"])
def test_result_and_gradients_equal_stock_mlp(size: int, layouts: list[tuple[int, bool]]) -> None:
    for rank, errors in enumerate(run_processes(errors_of_the_mlp, size, layouts)):
        assert errors
        wrong = {what: error for what, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}: {wrong}"
