"""Is a model spec right under context parallelism? Loss and every gradient, against the same model in one piece.

For those who extend a Megatron model of their own with these parts: a tiny model is built from the spec twice, once whole and once cut
over the context-parallel ranks, with the same weights and tokens and an uneven loss mask, in float32 on the CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.families import ModelShape
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model.builder import gpt_model_of_spec, transformer_config
from mcore_longctx.model.process_groups import destroy_process_groups, init_process_groups
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling

__all__ = ["TINY", "Difference", "compare_context_parallel", "load_target"]

TINY = ModelShape(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    vocab_size=256,
)
_ROPE = RopeScaling(type="none", head_dim=TINY.kv_channels, rope_theta=10_000.0)
_TOKENS = 128


@dataclass(frozen=True)
class Difference:
    """One quantity: the loss, or the gradient of a parameter. `relative` is to the largest entry in one piece."""

    name: str
    relative: float


def load_target(target: str) -> Any:
    """`path/to/file.py:NAME` or `package.module:NAME`.

    Raises:
        ConfigError: no such module or name.
    """
    place, _, name = target.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    if not hasattr(module, name):
        raise ConfigError(f"it has no {name!r}", where=place)
    return getattr(module, name)


def compare_context_parallel(target: Any, parallel: Parallel) -> list[Difference]:
    """Every rank of `parallel` calls it; all get the same list.

    Args:
        target: a layer spec (ModuleSpec), a block spec (TransformerBlockSubmodules), or a function of the TransformerConfig that
            returns one of these or a whole model (called as `model(tokens, positions, None, labels=labels)`, it gives per-token
            losses [b, s/c]).
        parallel: a layout with context_parallel_size above 1 and nothing else.

    Raises:
        ConfigError: `target` is none of these, or a parameter got no gradient.
    """
    whole = Parallel(data_parallel_size=parallel.context_parallel_size)
    loss, gradients = _loss_and_gradients(target, whole)
    cut_loss, cut_gradients = _loss_and_gradients(target, parallel)
    found = [Difference("loss", abs(cut_loss - loss) / abs(loss))]
    for name, gradient in gradients.items():
        difference = (cut_gradients[name] - gradient).abs().max()
        found.append(Difference(name, (difference / gradient.abs().max()).item()))
    largest = torch.tensor([one.relative for one in found], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    destroy_process_groups()
    return [Difference(one.name, value) for one, value in zip(found, largest.tolist(), strict=True)]


def _loss_and_gradients(target: Any, parallel: Parallel) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the tokens that count, and its gradients, summed over the context-parallel ranks."""
    init_process_groups(parallel, seed=1)
    with device_context():
        model = _build(target, parallel)
        _set_weights(model)
        tokens, labels, weights, positions = _batch(parallel)
        total = (model(tokens, positions, None, labels=labels) * weights).sum() / _batch(Parallel())[2].sum()
        total.backward()
    group = parallel_state.get_context_parallel_group()
    loss = total.detach().clone()
    dist.all_reduce(loss, group=group)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise ConfigError(f"parameter {name} got no gradient", where=type(model).__name__)
        dist.all_reduce(parameter.grad, group=group)
        gradients[name] = parameter.grad
    return loss.item(), gradients


def _build(target: Any, parallel: Parallel) -> torch.nn.Module:
    config = transformer_config(TINY, _ROPE, parallel, precision="fp32")
    is_spec = isinstance(target, ModuleSpec | TransformerBlockSubmodules)
    built = target if is_spec or not isinstance(target, Callable) else target(config)  # type: ignore[arg-type]
    if isinstance(built, torch.nn.Module):
        return built
    if not isinstance(built, ModuleSpec | TransformerBlockSubmodules):
        raise ConfigError(f"{type(built).__name__} is neither a ModuleSpec nor TransformerBlockSubmodules nor a model")
    return gpt_model_of_spec(config, built, vocab_size=TINY.padded_vocab_size(), seq_length=_TOKENS, rope=_ROPE)


def _set_weights(model: torch.nn.Module) -> None:
    """By name, so that they are the same however the model is cut; large enough for attention to matter."""
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        parameter.data.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else 0.2 * drawn)


def _batch(parallel: Parallel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's tokens, labels, loss weights (uneven, and none on the last quarter) and positions, [1, s/c] each."""
    tokens = torch.randint(TINY.vocab_size, (1, _TOKENS + 1), generator=torch.Generator().manual_seed(3))
    weights = (torch.arange(_TOKENS) % 5 != 0).float()
    weights[-_TOKENS // 4 :] = 0
    cp = parallel.context_parallel_size
    rank = parallel_state.get_context_parallel_rank() if cp > 1 else 0
    rows = torch.from_numpy(zigzag_positions(_TOKENS, cp, rank))
    return tokens[:, rows], tokens[:, 1:][:, rows], weights[rows], rows.unsqueeze(0)


def _module_of_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import {name} ({error})") from error
