"""Which programs read a rope wrongly: the table case by case, and transformers itself as the oracle for its own rules."""

import copy
import logging
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_longctx.rope import RopeBand, RopeScaling, misreadings, write_hf_rope

SIZES: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "factor": 16.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.0,
    "short_factor": [1.0] * 64,
    "long_factor": [1.0] * 64,
}
VERSION = int(transformers.__version__.split(".")[0])


def old(settings: dict[str, Any] | None, **top: Any) -> dict[str, Any]:
    return {"rope_theta": 5e5, "rope_scaling": settings, "max_position_embeddings": 131072} | top


def without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def found(config: dict[str, Any]) -> dict[str, str]:
    """program -> everything that it does."""
    texts: dict[str, list[str]] = {}
    for one in misreadings(config):
        texts.setdefault(one.program, []).append(one.does)
        assert one.source
        assert "{" not in one.describe()
    return {program: "; ".join(does) for program, does in texts.items()}


def test_the_portable_file_is_read_right_by_all_who_read_files() -> None:
    programs = found(write_hf_rope(RopeScaling(type="none", head_dim=128, rope_theta=5e5, max_position_embeddings=8192)))
    assert programs == {}
    rope = RopeScaling(type="llama3", head_dim=128, rope_theta=5e5, factor=8, original_max_position_embeddings=8192)
    assert set(found(write_hf_rope(rope))) == {"Megatron-LM", "mbridge"}  # flags that must be repeated; linear interpolation
    rope = RopeScaling(type="linear", head_dim=128, rope_theta=5e5, factor=8, original_max_position_embeddings=8192)
    assert set(found(write_hf_rope(rope))) == {"older Megatron-Bridge"}
    bands = (RopeBand(pairs=16, rule="none"), RopeBand(pairs=48, rule="ntk"))
    rope = RopeScaling(type="bands", head_dim=128, rope_theta=5e5, factor=8, original_max_position_embeddings=8192, bands=bands)
    assert set(found(write_hf_rope(rope))) == {"llama.cpp", "Megatron-Bridge", "Megatron-LM", "mbridge"}


@pytest.mark.parametrize(
    ("config", "program", "words"),
    [
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, "transformers 4", "takes no scaling, silently"),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, "transformers 4", "takes base 10,000"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "transformers 4", "takes base 10,000"),
        (old(None, rope_parameters=LLAMA3), "transformers 4", "takes no scaling"),
        (without(old({**LLAMA3, "rope_theta": 5e5}), "rope_theta"), "transformers 4", "takes base 10,000"),
        (old(LLAMA3, rope_parameters={**LLAMA3, "factor": 16.0}), "transformers 5", "rope_parameters says otherwise"),
        (old(LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 1e6}), "transformers 4", "rope_parameters says otherwise"),
        (old(YARN, original_max_position_embeddings=4096), "transformers 5", "from the top level"),
        (old(YARN, original_max_position_embeddings=4096), "vLLM", "from the top level"),
        (old(YARN, original_max_position_embeddings=4096), "SGLang", "from the top level"),
        (old(without(YARN, "original_max_position_embeddings")), "transformers 4", "with a warning"),
        (old(without(YARN, "original_max_position_embeddings")), "transformers 5", "silently"),
        (old(without(YARN, "original_max_position_embeddings")), "SGLang", "by factor 40"),
        (old({**YARN, "truncate": None}), "transformers 5", "does not round"),
        (old({**YARN, "truncate": False}), "llama.cpp", "truncate false is dropped"),
        (old({**YARN, "attention_factor": 1.0}), "SGLang", "cos and sin times 1.36889"),
        (old({**YARN, "attention_factor": 1.0}), "llama.cpp", "cos and sin times 1.36889"),
        (old({**YARN, "attention_factor": 1.0}), "Megatron-Bridge", "drops attention_factor"),
        (old({**YARN, "attention_factor": 1.0}), "Megatron-LM", "--mscale"),
        (old({**YARN, "attention_factor": 1.0}), "older vLLM", "drops attention_factor"),
        (old({**YARN, "mscale": 0.707, "mscale_all_dim": 0}), "SGLang", "where one is 0"),
        (old({**YARN, "mscale": 0.707, "mscale_all_dim": 0}), "Megatron-LM", "where one is 0"),
        (old({**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}), "llama.cpp", "drops the mscale pair"),
        (old(without(YARN, "beta_fast", "beta_slow")), "Megatron-Bridge", "TypeError"),
        (old(without(YARN, "truncate")), "Megatron-Bridge", "does not round the ramp"),
        (old(YARN), "mbridge", "linear interpolation by 40"),
        (old(LLAMA3), "mbridge", "linear interpolation by 8"),
        (old({**LLAMA3, "factor": 512.0}), "Megatron-LM", "trains with factor 8"),
        (old({**LLAMA3, "low_freq_factor": 2.0}), "Megatron-LM", "built in: another ramp"),
        (old({**LLAMA3, "high_freq_factor": 8.0}), "Megatron-Bridge", "low 1, high 4 and 8192"),
        (old({**LLAMA3, "original_max_position_embeddings": 4096}), "Megatron-LM", "built in: another ramp"),
        (old(without(LLAMA3, "original_max_position_embeddings")), "transformers 4", "KeyError"),
        (old(without(LLAMA3, "low_freq_factor")), "SGLang", "low 1, high 4"),
        (old({**LLAMA3, "attention_factor": 1.2}), "transformers 5", "ignores attention_factor"),
        (old({"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 16384}), "vLLM", "holds the scaled length already, by 8"),
        (old({"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 131072}), "SGLang", "does not multiply"),
        (old({"rope_type": "linear", "factor": 2.5}), "Megatron-LM", "a whole number"),
        (old(None, rope_theta=500000.5), "Megatron-LM", "--rotary-base is a whole number"),
        (old({"rope_type": "dynamic", "factor": 2.0}), "Megatron-Bridge", "takes no scaling, silently"),
        (old(LONGROPE), "vLLM", "drops attention_factor: cos and sin times 1.14354, by the two lengths"),
        (old(LONGROPE), "SGLang", "drops attention_factor: cos and sin times 1.14354, by the two lengths"),
        (old({**LONGROPE, "original_max_position_embeddings": 131072}, original_max_position_embeddings=8192), "vLLM", "times 1.14354"),
        (old({**LONGROPE, "attention_factor": 1.2}), "SGLang", "drops attention_factor"),
        (old(LONGROPE), "llama.cpp", "drops both lists"),
        (old(LONGROPE), "Megatron-Bridge", "takes no scaling, silently"),
        (old({"rope_type": "ntk", "factor": 2.0}), "transformers 4", "KeyError"),
        (old({"rope_type": "ntk", "factor": 2.0}), "llama.cpp", "with a warning"),
        (old({"rope_type": "ntk", "factor": 2.0}), "SGLang", "unknown"),
    ],
)  # fmt: skip
def test_a_reader_that_errs_is_named(config: dict[str, Any], program: str, words: str) -> None:
    programs = found(config)
    assert program in programs, programs
    assert words in programs[program]


@pytest.mark.parametrize(
    ("config", "program", "words"),
    [
        (old({**YARN, "attention_factor": 0.1 * np.log(40.0) + 1}), "SGLang", "attention_factor"),  # the usual one, written out
        (old({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}), "SGLang", "mscale"),
        (old(YARN, original_max_position_embeddings=8192), "transformers 5", "top level"),
        (old({"rope_type": "linear", "factor": 8.0}), "vLLM", "multiplies"),
        (old(LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5}), "transformers 4", "says otherwise"),
        (old({**without(LLAMA3, "rope_type"), "type": "llama3"}, rope_parameters=LLAMA3), "transformers 5", "says otherwise"),
        (old(LLAMA3), "Megatron-LM", "built in: another ramp"),
        (old(LLAMA3), "Megatron-LM", "trains with factor 8"),
        (old({**LLAMA3, "factor": 512.0}), "Megatron-Bridge", "takes and exports"),
        (old({"rope_type": "linear", "factor": 8.0}), "mbridge", "linear"),
        (old(YARN), "llama.cpp", "rounds"),
        (old({**LONGROPE, "original_max_position_embeddings": 131072}), "vLLM", "attention_factor"),
        (old(without(LONGROPE, "attention_factor")), "vLLM", "attention_factor"),  # all take it from the two lengths
        (old({**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.0}), "SGLang", "attention_factor"),
        (old({**LONGROPE, "attention_factor": (1 + np.log(16) / np.log(8192)) ** 0.5}), "vLLM", "attention_factor"),
    ],
)
def test_a_reader_that_is_right_is_not_named(config: dict[str, Any], program: str, words: str) -> None:
    assert words not in found(config).get(program, "")


def scaling(rope_type: str, **fields: Any) -> RopeScaling:
    fields = {"original_max_position_embeddings": 8192, "factor": 8.0, **fields}
    return RopeScaling(type=rope_type, head_dim=128, rope_theta=5e5, **fields)


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        (old(LLAMA3), scaling("llama3")),
        (old(None, rope_parameters={**LLAMA3, "rope_theta": 5e5}), scaling("llama3")),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "max_position_embeddings": 65536}, scaling("llama3")),
        (old(LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 5e5}), scaling("llama3")),
        (old(YARN), scaling("yarn", factor=40.0)),
        (old({**YARN, "truncate": None}), scaling("yarn", factor=40.0)),
        (old({**YARN, "truncate": False}), scaling("yarn", factor=40.0, truncate=False)),
        (old(without(YARN, "original_max_position_embeddings")), scaling("yarn", factor=40.0)),
        (old(YARN, original_max_position_embeddings=4096), scaling("yarn", factor=40.0)),
        (old(YARN, original_max_position_embeddings=8192), scaling("yarn", factor=40.0)),
        (old({**YARN, "attention_factor": 1.0}), scaling("yarn", factor=40.0, attention_factor=1.0)),
        (old({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}), scaling("yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.5)),
        (old({"rope_type": "linear", "factor": 8.0}), scaling("linear")),
        (old({"type": "linear", "factor": 8.0}), scaling("linear")),
        (without(old({**LLAMA3, "rope_theta": 5e5}), "rope_theta"), scaling("llama3")),
    ],
)
def test_what_is_said_of_transformers_is_what_it_does(config: dict[str, Any], meant: RopeScaling, caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL)
    rotary = LlamaRotaryEmbedding(LlamaConfig(**SIZES, **copy.deepcopy(config)))
    inv_freq, attention_factor = meant.frequencies()
    right = np.allclose(rotary.inv_freq.numpy(), inv_freq, rtol=1e-4) and np.isclose(rotary.attention_scaling, attention_factor)
    assert (f"transformers {VERSION}" in found(config)) == (not right)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from(["yarn", "llama3", "linear", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*YARN, *LLAMA3, "type", "rope_theta"]), inner, max_size=6)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings"]), VALUES))
def test_any_config_has_an_answer(config: dict[str, Any]) -> None:
    for one in misreadings(config):
        assert "\n" not in one.describe()
