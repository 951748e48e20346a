"""The rope of a model as it is built here: `python -m mcore_longctx.model.as_built` reads a question and prints the answer, as JSON.

A recipe, a config.json and a command line say which rope is wanted. This builds a model of one narrow layer with it, through the same
code as a training, and reads what is in the modules: for `mcore-longctx doctor`, and for whoever doubts.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
import warnings
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import gpt_layer_specs

from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import MEGATRON_VERSION, quiet_import
from mcore_longctx.model.builder import Backend, build_gpt_model
from mcore_longctx.model.process_groups import destroy_process_groups, init_process_groups
from mcore_longctx.model.rotary import PhaseDtype
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling, write_hf_rope

__all__ = ["rope_as_built"]

_POSITIONS = 4096  # looked at: the last ones of the context


def rope_as_built(shape: ModelShape, rope: RopeScaling, phase_dtype: PhaseDtype, backend: Backend = "local") -> dict[str, Any]:
    """Build one layer of a model, 2 heads wide with the model's own head dimension d, and read its rope.

    Returns:
        inv_freq: the d/2 inverse frequencies in the rotary module, as float64; softmax_scale: of the core attention;
        angle_error: largest error in rad, modulo 2 pi, of the angles that the module makes at the end of the context;
        module, core_attention: the classes that were built; device; transformers: whether transformers makes the same bits (None: it
        is not installed, or has no such rope); stock: see `_stock_frequencies`; megatron, te: versions (te None: not installed).
    """
    narrow = replace(
        shape,
        num_layers=1,
        hidden_size=2 * shape.kv_channels,
        ffn_hidden_size=64,
        num_attention_heads=2,
        num_query_groups=1 if shape.num_query_groups < shape.num_attention_heads else 2,
        vocab_size=128,
    )
    init_process_groups(Parallel(), seed=0)
    try:
        model = build_gpt_model(
            narrow, rope, Parallel(), precision="bf16", seq_length=1024, phase_dtype=phase_dtype, backend=backend
        )
        rotary, core = model.rotary_pos_emb, model.decoder.layers[0].self_attention.core_attention
        return {
            "inv_freq": rotary.inv_freq.double().tolist(),
            "softmax_scale": float(getattr(core, "softmax_scale", None) or model.config.softmax_scale),
            "angle_error": _angle_error(rotary, rope),
            "module": type(rotary).__name__,
            "core_attention": type(core).__name__,
            "device": next(model.parameters()).device.type,
            "transformers": _like_transformers(rotary.inv_freq, rope) if phase_dtype == "float32" else None,
            "stock": _stock_frequencies(rope),
            "megatron": MEGATRON_VERSION,
            "te": metadata.version("transformer-engine") if gpt_layer_specs.HAVE_TE else None,
        }
    finally:
        destroy_process_groups()


def _angle_error(rotary: Any, rope: RopeScaling) -> float:
    end = rope.resolved_max_position_embeddings or _POSITIONS
    positions = np.arange(max(0, end - _POSITIONS), end)
    built = rotary.angles(torch.from_numpy(positions).unsqueeze(0))[:, 0, 0, : rope.head_dim // 2].double().cpu().numpy()
    difference = np.remainder(built - np.outer(positions, rope.frequencies()[0]), 2 * math.pi)
    return float(np.minimum(difference, 2 * math.pi - difference).max())


def _like_transformers(inv_freq: torch.Tensor, rope: RopeScaling) -> bool | None:
    """Whether these are the bits that transformers computes from the config.json that is exported."""
    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    except ImportError:
        return None
    if rope.type == "yarn" and rope.ramp == "rotations":
        return None
    config = LlamaConfig(
        hidden_size=2 * rope.head_dim,
        num_attention_heads=2,
        head_dim=rope.head_dim,
        **write_hf_rope(rope),
    )
    return torch.equal(LlamaRotaryEmbedding(config).inv_freq.cpu(), inv_freq.float().cpu())


def _stock_frequencies(rope: RopeScaling) -> list[float] | None:
    """What stock Megatron-LM builds from `--use-rope-scaling --rope-scaling-factor F`: its builder passes no factor on.

    None for other types of rope. Source: `gpt_config_from_args` (0.19) and `gpt_builder` (before).
    """
    if rope.type != "llama3":
        return None
    with quiet_import():
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    known = inspect.signature(RotaryEmbedding.__init__).parameters
    wanted = {
        "kv_channels": rope.head_dim,
        "rotary_percent": 1.0,
        "rotary_base": rope.rope_theta,
        "rope_scaling": True,
        "use_cpu_initialization": True,
    }
    stock = RotaryEmbedding(**{name: value for name, value in wanted.items() if name in known})
    frequencies: list[float] = stock.inv_freq.double().cpu().tolist()
    return frequencies


def _main() -> None:
    question = json.load(sys.stdin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rope_as_built(
            ModelShape.from_dict(question["shape"]),
            RopeScaling.from_dict(question["rope"]),
            question["phase_dtype"],
            question["backend"],
        )
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    _main()
