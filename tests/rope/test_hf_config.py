"""Reading and writing the rope of a Hugging Face config: both spellings, and every config that other programs misread."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope import RopeBand, RopeScaling, merge_hf_rope, read_hf_rope, write_hf_rope

SIZES: dict[str, Any] = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 64,
    "long_factor": [1.0] * 64,
    "attention_factor": 1.0,
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA_31: dict[str, Any] = SIZES | {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3}
EXPECTED_31 = RopeScaling(
    type="llama3", head_dim=128, rope_theta=5e5, factor=8, original_max_position_embeddings=8192, max_position_embeddings=131072
)


def scaled(settings: dict[str, Any], **top: Any) -> dict[str, Any]:
    return SIZES | {"max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": settings} | top


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_hf_rope(config, where="model/config.json")
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix("model/config.json: ")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_31,
        without(LLAMA_31, "rope_theta", "rope_scaling") | {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        LLAMA_31 | {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        LLAMA_31 | {"rope_parameters": LLAMA3},
        LLAMA_31 | {"rope_scaling": {**without(LLAMA3, "rope_type"), "type": "llama3"}},
        LLAMA_31 | {"rope_scaling": {**LLAMA3, "type": "llama3"}},
        LLAMA_31 | {"rope_scaling": {**LLAMA3, "rope_theta": 500000}},
        without(LLAMA_31, "rope_theta") | {"rope_scaling": {**LLAMA3, "rope_theta": 5e5}},
        LLAMA_31 | {"rope_scaling": None, "rope_parameters": LLAMA3},
        LLAMA_31 | {"rope_scaling": {**LLAMA3, "factor": 8}},
        LLAMA_31 | {"head_dim": 128, "hidden_size": 9999},
        LLAMA_31 | {"original_max_position_embeddings": 8192, "partial_rotary_factor": 1.0},
    ],
    ids=[
        *("4.x", "5.x", "both", "base once", "legacy type", "type twice", "base twice", "base inside", "null", "int factor"),
        *("head_dim", "top level agrees"),
    ],
)
def test_llama_31_is_read_from_every_good_spelling(config: dict[str, Any]) -> None:
    assert read_hf_rope(config) == EXPECTED_31


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SIZES, RopeScaling(type="none", head_dim=128, rope_theta=10_000.0)),
        (
            SIZES | {"rope_theta": 8e6, "rope_scaling": None, "max_position_embeddings": 65536},
            RopeScaling(type="none", head_dim=128, rope_theta=8e6, max_position_embeddings=65536),
        ),
        (
            SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            RopeScaling(type="none", head_dim=128, rope_theta=5e5),
        ),
        (SIZES | {"rope_parameters": {"rope_theta": 5e5}}, RopeScaling(type="none", head_dim=128, rope_theta=5e5)),
        (SIZES | {"rope_scaling": {}}, RopeScaling(type="none", head_dim=128, rope_theta=1e4)),
        (
            SIZES | {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
            RopeScaling(
                type="linear",
                head_dim=128,
                rope_theta=1e4,
                factor=4,
                original_max_position_embeddings=4096,
                max_position_embeddings=16384,
            ),
        ),
        (
            SIZES | {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            RopeScaling(type="dynamic", head_dim=128, rope_theta=1e4, factor=2, max_position_embeddings=4096),
        ),
        (
            scaled({**YARN, "beta_fast": 32, "beta_slow": None, "attention_factor": 1}),
            RopeScaling(
                type="yarn",
                head_dim=128,
                rope_theta=5e5,
                factor=4,
                original_max_position_embeddings=32768,
                attention_factor=1.0,
                max_position_embeddings=131072,
            ),
        ),
        (  # explicit factor, whatever max_position_embeddings says
            scaled(YARN, max_position_embeddings=40960),
            RopeScaling(
                type="yarn",
                head_dim=128,
                rope_theta=5e5,
                factor=4,
                original_max_position_embeddings=32768,
                max_position_embeddings=40960,
            ),
        ),
        (  # a pair that transformers ignores, and Megatron uses to the same effect
            scaled({**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}),
            RopeScaling(
                type="yarn",
                head_dim=128,
                rope_theta=5e5,
                factor=4,
                original_max_position_embeddings=32768,
                max_position_embeddings=131072,
            ),
        ),
        (  # DeepSeek's
            scaled({**YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "truncate": False}),
            RopeScaling(
                type="yarn",
                head_dim=128,
                rope_theta=5e5,
                factor=4,
                original_max_position_embeddings=32768,
                max_position_embeddings=131072,
                mscale=0.707,
                mscale_all_dim=0.707,
                truncate=False,
            ),
        ),
    ],
)
def test_other_ropes_are_read(config: dict[str, Any], expected: RopeScaling) -> None:
    assert read_hf_rope(config) == expected


NEW_31 = {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # unknown types
        (
            scaled({"rope_type": "ntk", "factor": 8.0}),
            "rope_scaling: rope type 'ntk' is unknown; known are default, linear, dynamic, llama3, yarn, longrope",
        ),
        (
            scaled({"type": ["yarn"]}),
            "rope_scaling: rope type ['yarn'] is unknown; known are default, linear, dynamic, llama3, yarn, longrope",
        ),
        (
            scaled(
                {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 4.0, "attention_factor": 1.0}
            ),
            "rope_scaling: rope type longrope switches between two frequency tables by sequence length; no one table can be trained;"
            " start from a model with plain, linear, llama3 or yarn rope",
        ),
        (
            scaled({"factor": 8.0}),
            "rope_scaling.rope_type is missing; known are default, linear, dynamic, llama3, yarn, longrope",
        ),
        (
            scaled({**LLAMA3, "type": "yarn"}),
            "rope_scaling.rope_type is 'llama3' and rope_scaling.type is 'yarn'; make them equal or remove type",
        ),
        # the two spellings disagree: transformers takes the old one, silently
        (
            LLAMA_31 | {"rope_parameters": {**LLAMA3, "factor": 128.0}},
            "rope_scaling and rope_parameters disagree: factor is 8.0 and 128.0; other programs pick one silently: make them equal or remove one",
        ),
        (
            LLAMA_31 | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            "rope_scaling and rope_parameters disagree: rope_type is 'llama3' and 'default';"
            " other programs pick one silently: make them equal or remove one",
        ),
        # three places for the base: transformers 4 takes the outer one, 5 an inner one
        (
            without(LLAMA_31, "rope_scaling") | {"rope_parameters": {**LLAMA3, "rope_theta": 1e6}},
            "rope_theta is 500,000 and rope_parameters.rope_theta is 1,000,000; other programs pick one silently: make them equal",
        ),
        (
            LLAMA_31 | {"rope_scaling": {**LLAMA3, "rope_theta": 500000.5}},
            "rope_theta is 500,000 and rope_scaling.rope_theta is 500,000.5; other programs pick one silently: make them equal",
        ),
        (LLAMA_31 | {"rope_theta": None}, "rope_theta is None, expected a number"),
        # the original length: transformers guesses it or takes it from another place
        (
            scaled(without(YARN, "original_max_position_embeddings")),
            "rope_scaling.original_max_position_embeddings is missing (rope type yarn); write it down: other programs guess it or stop",
        ),
        (
            scaled(without(LLAMA3, "original_max_position_embeddings")),
            "rope_scaling.original_max_position_embeddings is missing (rope type llama3); write it down: other programs guess it or stop",
        ),
        (
            scaled(YARN, original_max_position_embeddings=8192),
            "original_max_position_embeddings is 8192 at the top level and 32768 in the rope settings;"
            " transformers 4 and 5 pick different ones: remove the one at the top level",
        ),
        (
            scaled({**YARN, "factor": None}),
            "rope_scaling.factor is missing (rope type yarn); write it down: other programs guess it or stop",
        ),
        # temperature: transformers, Megatron and SGLang differ on half a pair
        (
            scaled({**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0}),
            "yarn with mscale 0.707, mscale_all_dim 0.0, attention_factor None: transformers multiplies cos and sin by 1.36889,"
            " Megatron by 1.2608; give attention_factor alone, or an mscale pair above 0 alone",
        ),
        (
            scaled({**YARN, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.5}),
            "yarn with mscale 1.0, mscale_all_dim 0.5, attention_factor 1.0: transformers multiplies cos and sin by 1,"
            " Megatron by 1.06482; give attention_factor alone, or an mscale pair above 0 alone",
        ),
        (
            scaled({**YARN, "mscale": -1.0, "mscale_all_dim": 1.0}),
            "yarn with mscale -1.0, mscale_all_dim 1.0: expected 0 or more",
        ),
        # settings that the type does not have
        (
            scaled({**LLAMA3, "attention_factor": 1.2}),
            "rope_scaling.attention_factor is not a setting of rope type llama3; remove it: other programs ignore it",
        ),
        (
            scaled({**YARN, "betafast": 4.0}),
            "rope_scaling.betafast is not a setting of rope type yarn; remove it: other programs ignore it",
        ),
        # wrong types of values
        (scaled({**LLAMA3, "factor": "128"}), "rope_scaling.factor is '128', expected a number"),
        (scaled({**LLAMA3, "factor": True}), "rope_scaling.factor is True, expected a number"),
        (scaled({**LLAMA3, "factor": float("inf")}), "rope_scaling.factor is inf, expected a number"),
        (
            scaled({**LLAMA3, "original_max_position_embeddings": 8192.5}),
            "rope_scaling.original_max_position_embeddings is 8192.5, expected a positive whole number",
        ),
        (scaled({**YARN, "truncate": None}), "rope_scaling.truncate is None, expected true or false"),  # transformers: false
        (scaled({**YARN, "truncate": "false"}), "rope_scaling.truncate is 'false', expected true or false"),
        (SIZES | {"rope_theta": "500000"}, "rope_theta is '500000', expected a number"),
        (SIZES | {"rope_scaling": "llama3"}, "rope_scaling is 'llama3', expected an object"),
        (SIZES | {"max_position_embeddings": None}, "max_position_embeddings is None, expected a number"),
        (SIZES | {"max_position_embeddings": 0}, "max_position_embeddings is 0, expected a positive whole number"),
        # values out of range
        (scaled({**LLAMA3, "factor": 0.5}), "rope: factor is 0.5, expected 1 or more"),
        (
            scaled({**LLAMA3, "low_freq_factor": 4.0}),
            "rope: low_freq_factor is 4 and high_freq_factor 4, expected low_freq_factor below high_freq_factor",
        ),
        # per layer, partly rotated, sizes
        (
            SIZES | {"rope_parameters": {"full_attention": LLAMA3, "sliding_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention holds rope settings for one kind of layer; one rope for all layers is supported",
        ),
        (SIZES | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1; partly rotated heads are not supported"),
        (
            SIZES | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is not 1; partly rotated heads are not supported",
        ),
        ({"hidden_size": 4096}, "num_attention_heads is missing, and there is no head_dim"),
        (
            {"hidden_size": 100, "num_attention_heads": 3},
            "hidden_size 100 is not a multiple of num_attention_heads 3, and there is no head_dim",
        ),
        (SIZES | {"head_dim": 127}, "rope: head_dim is 127, expected an even number (rope turns pairs)"),
        (
            scaled({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4096}),
            "rope type dynamic: original_max_position_embeddings differs from max_position_embeddings, the trained length",
        ),
    ],
)
def test_what_other_programs_misread_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    assert refusal(config) == message


def test_refusals_name_the_file() -> None:
    with pytest.raises(ConfigError, match=r"^here/config\.json: rope_scaling: rope type 'ntk' is unknown"):
        read_hf_rope(scaled({"rope_type": "ntk"}), where="here/config.json")


def test_ultralong_is_written_in_both_spellings() -> None:
    rope = RopeScaling(type="llama3", head_dim=128, rope_theta=500000, factor=512, original_max_position_embeddings=8192)
    settings = {
        "rope_type": "llama3",
        "factor": 512.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    written = write_hf_rope(rope)
    assert written == {
        "rope_theta": 500000.0,
        "rope_scaling": settings,
        "rope_parameters": {**settings, "rope_theta": 500000.0},
        "max_position_embeddings": 4194304,
    }
    text = json.dumps(written)
    assert '"factor": 512.0' in text, "transformers 4 wants floats as floats"
    assert '"rope_theta": 500000.0' in text


def test_yarn_is_written_with_every_setting() -> None:
    rope = RopeScaling(type="yarn", head_dim=128, rope_theta=5e5, factor=512, original_max_position_embeddings=8192, beta_fast=4)
    assert write_hf_rope(rope)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 512.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "truncate": True,
    }


def test_ntk_is_written_as_a_changed_base_and_read_back_as_the_same_rope() -> None:
    rope = RopeScaling(type="ntk", head_dim=128, rope_theta=5e5, factor=8, original_max_position_embeddings=8192)
    written = write_hf_rope(rope)
    assert written["rope_theta"] == pytest.approx(4134231.132, abs=5e-4)
    assert written["rope_scaling"] is None
    assert written["max_position_embeddings"] == 65536
    again = read_hf_rope(SIZES | json.loads(json.dumps(written)))
    assert again.type == "none"
    assert again.fingerprint() == rope.fingerprint()


def test_linear_is_written_with_the_unscaled_length_that_servers_multiply() -> None:
    rope = RopeScaling(type="linear", head_dim=128, rope_theta=5e5, factor=8, max_position_embeddings=65536)
    written = write_hf_rope(rope)
    assert written["max_position_embeddings"] == 8192
    again = read_hf_rope(SIZES | written)
    assert (again.resolved_max_position_embeddings, again.fingerprint()) == (65536, rope.fingerprint())


def test_yarn_over_rotations_without_temperature_is_written_as_the_llama3_that_it_is() -> None:
    rope = RopeScaling(
        type="yarn",
        ramp="rotations",
        head_dim=128,
        rope_theta=5e5,
        factor=512,
        original_max_position_embeddings=8192,
        alpha=1,
        beta=4,
        attention_factor=1,
    )
    again = read_hf_rope(SIZES | write_hf_rope(rope))
    assert again.type == "llama3"
    assert again.fingerprint() == rope.fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"type": "yarn", "ramp": "rotations", "factor": 512, "original_max_position_embeddings": 8192, "beta": 4},
            "yarn with ramp rotations and attention factor 1.62383 has no name in a Hugging Face config;"
            " train with type llama3 (the same frequencies, no temperature), or with ramp index",
        ),
        (
            {"type": "dynamic", "factor": 2, "max_position_embeddings": 8192},
            "rope type dynamic is not exported: what is trained here has one fixed table; use ntk, abf, llama3 or yarn",
        ),
        ({"type": "abf"}, "rope type abf: the model's length is not known; set max_position_embeddings beside the rope type"),
        (
            {"type": "linear", "factor": 8},
            "rope type linear: the model's length is not known; set max_position_embeddings beside the rope type",
        ),
        (
            {"type": "linear", "factor": 8, "original_max_position_embeddings": 8192, "max_position_embeddings": 60000},
            "rope type linear: max_position_embeddings 60,000 is not factor x original_max_position_embeddings (8 x 8,192);"
            " other programs compute it so: set original_max_position_embeddings, and leave max_position_embeddings out",
        ),
        (
            {"type": "yarn", "factor": 8, "original_max_position_embeddings": 8192, "max_position_embeddings": 65537},
            "yarn: max_position_embeddings 65,537 is more than factor x original_max_position_embeddings (65,536), where the tables of"
            " other programs end; raise factor, or lower max_position_embeddings",
        ),
    ],
)
def test_what_a_config_cannot_hold_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        write_hf_rope(RopeScaling(head_dim=128, rope_theta=5e5, **fields))
    assert str(caught.value) == message


def test_merging_replaces_the_rope_and_keeps_the_rest() -> None:
    rope = RopeScaling(type="llama3", head_dim=128, rope_theta=5e5, factor=128, original_max_position_embeddings=8192)
    merged = merge_hf_rope(LLAMA_31 | {"original_max_position_embeddings": 4096, "vocab_size": 7}, rope)
    assert "original_max_position_embeddings" not in merged, "transformers 5 would take it instead of the one in the settings"
    assert (merged["vocab_size"], merged["hidden_size"]) == (7, 4096)
    assert read_hf_rope(merged).fingerprint() == rope.fingerprint()


@st.composite
def writable_ropes(draw: st.DrawFn) -> RopeScaling:
    original = draw(st.integers(512, 131072))
    scaled_types: dict[str, Any] = {"factor": draw(st.floats(1.0, 512.0)), "original_max_position_embeddings": original}
    low = draw(st.floats(0.5, 8.0))
    high = low * draw(st.floats(1.5, 32.0))
    half, share = draw(st.integers(8, 128)), draw(st.floats(0.0, 1.0))
    fields: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"type": "none", "max_position_embeddings": original},
                {"type": "abf", "max_position_embeddings": original},
                {"type": "linear", **scaled_types},
                {"type": "ntk", **scaled_types},
                {"type": "llama3", "low_freq_factor": low, "high_freq_factor": high, **scaled_types},
                {"type": "yarn", "ramp": "rotations", "alpha": low, "beta": high, "attention_factor": 1, **scaled_types},
                {"type": "yarn", "beta_slow": low, "beta_fast": high, "truncate": draw(st.booleans()), **scaled_types},
                {"type": "yarn", "attention_factor": draw(st.floats(0.5, 2.0)), **scaled_types},
                {"type": "yarn", "mscale": low, "mscale_all_dim": high, **scaled_types},
                {"type": "bands", "bands": (RopeBand(pairs=half, rule="mix", ntk_share=share),), **scaled_types},
                {"type": "longrope", "long_factor": (low,) * half, "max_position_embeddings": original},
            ]
        )
    )
    return RopeScaling(head_dim=2 * half, rope_theta=draw(st.floats(1e4, 1e9)), **fields)


@given(writable_ropes(), st.sampled_from(["both", "old", "new"]))
def test_what_is_written_reads_back_as_the_same_rope(rope: RopeScaling, spelling: str) -> None:
    written = json.loads(json.dumps(write_hf_rope(rope)))
    if spelling == "old":
        del written["rope_parameters"]
    elif spelling == "new":
        del written["rope_theta"], written["rope_scaling"]
    again = read_hf_rope({"head_dim": rope.head_dim} | written)
    inv_freq, attention_factor = rope.frequencies()
    assert np.array_equal(again.frequencies()[0], inv_freq)
    assert again.frequencies()[1] == attention_factor
    assert again.fingerprint() == rope.fingerprint()
    assert again.resolved_max_position_embeddings == rope.resolved_max_position_embeddings


JSON_VALUES = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        40,
        8192,
        10**400,
        -0.0,
        0.5,
        1.0,
        4.0,
        1e200,
        float("nan"),
        float("inf"),
        "128",
        "yarn",
        "llama3",
        "linear",
        "dynamic",
        "default",
        [],
        [1.0],
        {},
        {"a": 1},
    ]
)
ROPE_KEYS = st.sampled_from([*LLAMA3, *LONGROPE, "type", "rope_theta", "beta_fast", "mscale", "mscale_all_dim", "truncate"])


@settings(max_examples=1000)
@given(
    st.sampled_from(["rope_scaling", "rope_parameters"]),
    st.sampled_from([LLAMA3, YARN, LONGROPE, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}]),
    st.dictionaries(ROPE_KEYS, JSON_VALUES, max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_theta", "max_position_embeddings", "head_dim", "partial_rotary_factor"]), JSON_VALUES, max_size=2
    ),
)
def test_any_json_gives_a_rope_or_one_clear_line(spelling: str, good: dict[str, Any], damage: Any, top: Any) -> None:
    with contextlib.suppress(ConfigError):  # anything else, a KeyError or OverflowError say, fails the test
        read_hf_rope(scaled({}) | {spelling: good | damage} | top)
