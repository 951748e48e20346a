"""The specs that `--spec mcore_longctx.model.spec NAME` finds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec, import_module

from mcore_longctx.model import LongContextAttention, longctx_layer_spec
from mcore_longctx.model.norm import RMSNorm
from mcore_longctx.model.spec import llama_block
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import build


def test_the_layer_spec_is_found_by_name_and_is_ready() -> None:
    spec = import_module(("mcore_longctx.model.spec", "llama"))
    assert isinstance(spec, ModuleSpec)
    assert spec.submodules.self_attention.submodules.core_attention is LongContextAttention
    assert spec.submodules.input_layernorm is spec.submodules.pre_mlp_layernorm is RMSNorm


def test_each_call_gives_a_spec_of_its_own() -> None:
    changed = longctx_layer_spec()
    changed.submodules.self_attention.submodules.core_attention = object
    assert longctx_layer_spec().submodules.self_attention.submodules.core_attention is LongContextAttention


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_block_spec_has_all_layers_of_the_stage_and_our_final_norm(wrapped: bool) -> None:
    config = build(Parallel()).config
    block = llama_block(SimpleNamespace(transformer=config) if wrapped else config)
    assert len(block.layer_specs) == 4
    assert block.layer_norm is RMSNorm
