"""`--rope`: one line against ropes that are written out, and every slip that must not pass."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.schema import RopeSection
from mcore_longctx.rope import RopeScaling, parse_rope_spec, read_hf_rope, write_hf_rope

PLAIN = RopeScaling(type="none", head_dim=128, rope_theta=5e5, max_position_embeddings=8192)
LLAMA_31 = RopeScaling(
    type="llama3", head_dim=128, rope_theta=5e5, factor=8, original_max_position_embeddings=8192, max_position_embeddings=131072
)
LINEAR = RopeScaling(type="linear", head_dim=64, rope_theta=1e4, factor=4, original_max_position_embeddings=2048)
LLAMA_31_EXTENDED: dict[str, Any] = {"type": "llama3", "factor": 128, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("spec", "own", "fields", "length"),
    [
        ("llama3:128", LLAMA_31, LLAMA_31_EXTENDED, 1048576),
        ("llama3:128", PLAIN, LLAMA_31_EXTENDED, 1048576),
        ("llama3,factor=128", PLAIN, LLAMA_31_EXTENDED, 1048576),
        (
            "llama3:512,low=2,high=8",
            LLAMA_31,
            {**LLAMA_31_EXTENDED, "factor": 512, "low_freq_factor": 2, "high_freq_factor": 8},
            4 << 20,
        ),
        ("llama3:4,original=128K", PLAIN, {**LLAMA_31_EXTENDED, "factor": 4, "original_max_position_embeddings": 131072}, 524288),
        ("yarn:32,original=8192", LLAMA_31, {"type": "yarn", "factor": 32, "original_max_position_embeddings": 8192}, 262144),
        (
            "yarn:32,beta_fast=4,beta_slow=1,truncate=false,attention_factor=1.0",
            PLAIN,
            {
                "type": "yarn",
                "factor": 32,
                "original_max_position_embeddings": 8192,
                "beta_fast": 4,
                "truncate": False,
                "attention_factor": 1,
            },
            262144,
        ),
        (
            "yarn:8,mscale=1,mscale_all_dim=0.5,max=64K",
            PLAIN,
            {
                "type": "yarn",
                "factor": 8,
                "original_max_position_embeddings": 8192,
                "mscale": 1,
                "mscale_all_dim": 0.5,
                "max_position_embeddings": 65536,
            },
            65536,
        ),
        (
            "yarn:16,ramp=rotations,alpha=1,beta=4,attention_factor=1",
            PLAIN,
            {
                "type": "yarn",
                "ramp": "rotations",
                "factor": 16,
                "original_max_position_embeddings": 8192,
                "beta": 4,
                "attention_factor": 1,
            },
            131072,
        ),
        ("linear:8", PLAIN, {"type": "linear", "factor": 8, "original_max_position_embeddings": 8192}, 65536),
        ("linear:8", LINEAR, {"type": "linear", "factor": 8, "original_max_position_embeddings": 2048}, 16384),
        ("ntk:8", PLAIN, {"type": "ntk", "factor": 8, "original_max_position_embeddings": 8192}, 65536),
        (
            "ntk:8,theta=1e6,max=1M",
            PLAIN,
            {
                "type": "ntk",
                "factor": 8,
                "rope_theta": 1e6,
                "original_max_position_embeddings": 8192,
                "max_position_embeddings": 1 << 20,
            },
            1 << 20,
        ),
        ("abf,theta=5e6", PLAIN, {"type": "abf", "rope_theta": 5e6, "max_position_embeddings": 8192}, 8192),
        ("abf,theta=5e6,max=512K", LLAMA_31, {"type": "abf", "rope_theta": 5e6, "max_position_embeddings": 524288}, 524288),
        (
            "abf,rope_theta=5e6,max_position_embeddings=524288",
            PLAIN,
            {"type": "abf", "rope_theta": 5e6, "max_position_embeddings": 524288},
            524288,
        ),
        ("none", LLAMA_31, {"type": "none", "max_position_embeddings": 131072}, 131072),
        ("none,theta=1e4", LLAMA_31, {"type": "none", "rope_theta": 1e4, "max_position_embeddings": 131072}, 131072),
    ],
)
def test_a_line_says_what_its_fields_say(spec: str, own: RopeScaling, fields: dict[str, Any], length: int) -> None:
    expected = RopeScaling(**{"head_dim": own.head_dim, "rope_theta": own.rope_theta, **fields})
    rope = parse_rope_spec(spec, own)
    assert rope == expected
    assert rope.resolved_max_position_embeddings == length


def test_keep_keeps() -> None:
    assert parse_rope_spec("keep", LLAMA_31) is LLAMA_31


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "rope type '' is unknown; known are keep, none, linear"),
        ("rope:8", "rope type 'rope' is unknown"),
        ("longrope:8", "rope type longrope has a list, which does not fit into one line; write it into the rope section of a recipe"),
        ("bands:8,original=8K", "rope type bands has a list, which does not fit into one line"),
        ("llama3", "factor is missing; write llama3:8"),
        ("llama3:", "'factor=' is not key=value"),
        ("llama3:x", "factor is 'x', expected a number"),
        ("llama3:0.5", "factor is 0.5, expected 1 or more"),
        ("llama3:nan", "factor is nan, expected a number above 0"),
        ("llama3:inf", "factor is inf"),
        ("llama3:8,factor=8", "factor is given twice"),
        ("llama3:8,original=8K,original_max_position_embeddings=8192", "original is given twice"),
        ("llama3:8,", "'' is not key=value"),
        ("llama3:8,original", "'original' is not key=value"),
        ("llama3:8,beta_fast=32", "beta_fast is not a setting of rope type llama3; known are factor, theta, original, max, low, high"),
        ("llama3:8,beta_fats=32", "'beta_fats' is not a setting of rope type llama3; known are factor, theta"),
        ("yarn:8,alpha=1", "alpha is not a setting of rope type yarn; known are factor, theta, original, max, ramp, beta_fast"),
        ("yarn:8,ramp=rotations,beta_fast=1", "beta_fast is not a setting of rope type yarn; known are factor, theta, original, max, ramp, alpha"),
        ("yarn:8,ramp=sideways", "ramp is 'sideways', expected index or rotations"),
        ("yarn:8,truncate=no", "truncate is 'no', expected true or false"),
        ("yarn:8,original=8.3K", "original is '8.3K', expected a number of tokens"),
        ("yarn:8,original=0", "original_max_position_embeddings is 0"),
        ("yarn:8,mscale=1", "give both mscale and mscale_all_dim"),
        ("yarn:8,max=1M", "more than factor x original_max_position_embeddings"),
        ("yarn:8,ramp=rotations", "has no name in a Hugging Face config"),
        ("none:8", "factor is not a setting of rope type none; known are theta, max"),
        ("abf", "theta is missing; type abf is a changed base"),
        ("abf:8,theta=5e6", "factor is not a setting of rope type abf"),
        ("linear:8,max=1M", "is not factor x original_max_position_embeddings"),
        ("dynamic:8,max=8192", "cannot be trained or extended with it"),
    ],
)  # fmt: skip
def test_a_slip_is_refused_in_one_line_that_names_it(spec: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rope_spec(spec, PLAIN)
    message = str(caught.value)
    assert message.startswith(f"--rope {spec}: ")
    assert words in message
    assert "\n" not in message


def test_a_model_of_unknown_length_needs_one() -> None:
    unknown = RopeScaling(type="none", head_dim=128, rope_theta=5e5)
    with pytest.raises(ConfigError, match="max is missing; the length does not follow from rope type abf"):
        parse_rope_spec("abf,theta=5e6", unknown)
    with pytest.raises(ConfigError, match="needs original_max_position_embeddings"):
        parse_rope_spec("llama3:8", unknown)
    assert parse_rope_spec("llama3:8,original=4K", unknown).resolved_max_position_embeddings == 32768


def test_a_line_and_a_recipe_mean_the_same() -> None:
    section = RopeSection(type="llama3", factor=128.0, original_max_position_embeddings=8192)
    assert parse_rope_spec("llama3:128", LLAMA_31) == section.scaling(LLAMA_31)


@given(st.text(st.sampled_from("abfyarnllinearntkone3:,=.0123456789KMe-_"), max_size=40))
def test_any_text_is_a_rope_that_can_be_written_or_one_line(text: str) -> None:
    try:
        rope = parse_rope_spec(text, LLAMA_31)
    except ConfigError:
        return
    written = write_hf_rope(rope)
    again = read_hf_rope({"head_dim": 128, **written})
    assert again.fingerprint() == rope.fingerprint()
    assert np.isfinite(rope.frequencies()[0]).all()


@given(
    st.sampled_from(["llama3", "yarn", "linear", "ntk"]),
    st.integers(1, 4096),
    st.sampled_from([2048, 4096, 8192, 131072]),
)
def test_lengths_are_factor_times_original(rope_type: str, factor: int, original: int) -> None:
    rope = parse_rope_spec(f"{rope_type}:{factor},original={original}", PLAIN)
    assert rope.resolved_max_position_embeddings == factor * original
    written = write_hf_rope(rope)["max_position_embeddings"]
    assert written == (original if rope_type == "linear" else factor * original)
    assert re.fullmatch(r"\d+", str(written))
