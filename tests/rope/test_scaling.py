"""`RopeScaling`: what it refuses, its fingerprint, its JSON form."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope import RopeBand, RopeScaling

BASE: dict[str, Any] = {"head_dim": 128, "rope_theta": 500_000.0}
OVER_8K: dict[str, Any] = BASE | {"original_max_position_embeddings": 8192}
ULTRALONG_4M = RopeScaling(type="llama3", factor=512, **OVER_8K)
BANDS = (RopeBand(pairs=16, rule="none"), RopeBand(pairs=24, rule="mix", ntk_share=0.5), RopeBand(pairs=24, rule="ntk"))
GIRAFFE = RopeScaling(type="bands", factor=4, bands=BANDS, **OVER_8K)
EVERY_TYPE = [
    RopeScaling(type="none", **BASE),
    RopeScaling(type="abf", max_position_embeddings=65536, **BASE | {"rope_theta": 8e6}),
    RopeScaling(type="linear", factor=8, **OVER_8K),
    RopeScaling(type="ntk", factor=8, max_position_embeddings=65536, **BASE),
    RopeScaling(type="dynamic", factor=8, max_position_embeddings=8192, **BASE),
    ULTRALONG_4M,
    RopeScaling(type="yarn", factor=128, beta_fast=4, truncate=False, attention_factor=1, **OVER_8K),
    RopeScaling(type="yarn", factor=128, mscale=1, mscale_all_dim=0.5, **OVER_8K),
    RopeScaling(type="yarn", ramp="rotations", factor=512, alpha=1, beta=4, **OVER_8K),
    GIRAFFE,
    RopeScaling(type="longrope", long_factor=(1.0,) * 32 + (1.5,) * 32, max_position_embeddings=65536, **BASE),
]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "su"}, "rope type 'su' is unknown; there are none, linear, ntk, dynamic, abf, llama3, yarn, bands, longrope"),
        ({"type": "none", "head_dim": 127}, "head_dim is 127, expected an even number (rope turns pairs)"),
        ({"type": "none", "head_dim": 0}, "head_dim is 0, expected a whole number above 0 and up to 4,096"),
        ({"type": "none", "head_dim": 128.0}, "head_dim is 128.0, expected a whole number above 0 and up to 4,096"),
        ({"type": "none", "head_dim": None}, "head_dim is None, expected a whole number above 0 and up to 4,096"),
        ({"type": "none", "rope_theta": 1.0}, "rope_theta is 1, expected more than 1"),
        ({"type": "none", "rope_theta": float("nan")}, "rope_theta is nan, expected a number above 0 and up to 1e+30"),
        ({"type": "none", "rope_theta": 10**400}, f"rope_theta is 1{'0' * 400}, expected a number above 0 and up to 1e+30"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5, expected 1 or more"),
        ({"type": "linear", "factor": "8"}, "factor is '8', expected a number above 0 and up to 1,000,000"),
        ({"type": "linear", "factor": True}, "factor is True, expected a number above 0 and up to 1,000,000"),
        ({"type": "none", "factor": 8}, "factor is given, but rope type none does not use it"),
        ({"type": "abf", "factor": 8}, "factor is given, but rope type abf does not use it"),
        ({"type": "ntk", "factor": 8, "head_dim": 2}, "rope type ntk needs a head_dim of 4 or more"),
        ({"type": "dynamic", "factor": 8}, "rope type dynamic needs max_position_embeddings, the trained length"),
        ({"type": "llama3", "factor": 8}, "rope type llama3 needs original_max_position_embeddings (8192 for Llama 3)"),
        ({"type": "yarn", "factor": 8}, "rope type yarn needs original_max_position_embeddings (8192 for Llama 3)"),
        (
            OVER_8K | {"type": "llama3", "low_freq_factor": 4, "high_freq_factor": 1},
            "low_freq_factor is 4 and high_freq_factor 1, expected low_freq_factor below high_freq_factor",
        ),
        (
            OVER_8K | {"type": "yarn", "beta_fast": 1, "beta_slow": 32},
            "beta_slow is 32 and beta_fast 1, expected beta_slow below beta_fast",
        ),
        (
            OVER_8K | {"type": "yarn", "ramp": "rotations", "alpha": 4, "beta": 4},
            "alpha is 4 and beta 4, expected alpha below beta",
        ),
        (
            OVER_8K | {"type": "llama3", "low_freq_factor": 0},
            "low_freq_factor is 0, expected a number above 0 and up to 1,000,000,000",
        ),
        (
            OVER_8K | {"type": "llama3", "attention_factor": 1.0},
            "attention_factor is given, but rope type llama3 does not use it",
        ),
        (OVER_8K | {"type": "llama3", "beta_fast": 4}, "beta_fast is given, but rope type llama3 does not use it"),
        (
            OVER_8K | {"type": "yarn", "high_freq_factor": 8},
            "high_freq_factor is given, but rope type yarn with ramp index does not use it",
        ),
        (OVER_8K | {"type": "yarn", "beta": 4}, "beta is given, but rope type yarn with ramp index does not use it"),
        (
            OVER_8K | {"type": "yarn", "ramp": "rotations", "beta_fast": 4},
            "beta_fast is given, but rope type yarn with ramp rotations does not use it",
        ),
        (
            OVER_8K | {"type": "yarn", "ramp": "rotations", "mscale": 1, "mscale_all_dim": 1},
            "mscale is given, but rope type yarn with ramp rotations does not use it",
        ),
        (OVER_8K | {"type": "yarn", "ramp": "pairs"}, "ramp is 'pairs', expected index or rotations"),
        (OVER_8K | {"type": "yarn", "truncate": 1}, "truncate is 1, expected true or false"),
        (OVER_8K | {"type": "yarn", "mscale": 1}, "give both mscale and mscale_all_dim, or neither"),
        (
            OVER_8K | {"type": "yarn", "mscale": 0, "mscale_all_dim": 1},
            "mscale is 0, expected a number above 0 and up to 1,000,000",
        ),
        (
            OVER_8K | {"type": "yarn", "mscale": 1, "mscale_all_dim": 1, "attention_factor": 1},
            "give attention_factor or the pair mscale and mscale_all_dim, not both",
        ),
        (
            BASE | {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4},
            "the yarn ramp ends (pair -2) before it starts (pair 0): no pair of base 500,000 turns between 1 and 32 times in 4 positions",
        ),
    ],
)
def test_what_cannot_be_a_rope_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RopeScaling(**BASE | fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("rope", EVERY_TYPE, ids=lambda rope: rope.describe().split(",")[0])
def test_as_dict_goes_through_json_and_back(rope: RopeScaling) -> None:
    again = RopeScaling.from_dict(json.loads(json.dumps(rope.as_dict())))
    assert again == rope
    assert again.fingerprint() == rope.fingerprint()


def test_as_dict_holds_only_what_the_type_uses() -> None:
    assert ULTRALONG_4M.as_dict() == {
        "type": "llama3",
        "head_dim": 128,
        "rope_theta": 500000.0,
        "max_position_embeddings": None,
        "factor": 512.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


def test_numbers_are_stored_as_floats_and_plain_ints() -> None:
    class Count(int):
        pass

    rope = RopeScaling(type="llama3", factor=512, head_dim=128, rope_theta=500000, original_max_position_embeddings=Count(8192))
    assert type(rope.factor) is float
    assert type(rope.rope_theta) is float
    assert type(rope.original_max_position_embeddings) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "none", "head_dim": 128}, "rope has no rope_theta"),
        ({**BASE, "type": "none", "faktor": 8}, "unknown rope field 'faktor'"),
    ],
)
def test_from_dict_refuses_missing_and_unknown_fields(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RopeScaling.from_dict(values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"type": "none"}, None),
        ({"type": "abf", "max_position_embeddings": 65536}, 65536),
        ({"type": "llama3", "factor": 128, "original_max_position_embeddings": 8192}, 1048576),
        ({"type": "yarn", "factor": 512, "original_max_position_embeddings": 8192}, 4194304),
        ({"type": "llama3", "factor": 8, "original_max_position_embeddings": 8192, "max_position_embeddings": 131072}, 131072),
        ({"type": "linear", "factor": 1.5, "original_max_position_embeddings": 4095}, 6142),
        ({"type": "ntk", "factor": 8}, None),
        ({"type": "ntk", "factor": 8, "original_max_position_embeddings": 512}, 4096),
    ],
)
def test_the_length_follows_from_factor_and_original_length(fields: dict[str, Any], length: int | None) -> None:
    assert RopeScaling(**BASE, **fields).resolved_max_position_embeddings == length


# Stored in checkpoints: a change of these makes every existing checkpoint look like one of another rope.
FINGERPRINTS = {
    "cc0108e6210da18da918f478688390b61a027af83a9c871989bab30d14529328": ULTRALONG_4M,
    "deb907bd": RopeScaling(type="none", **BASE),
    "821ac895": RopeScaling(type="yarn", factor=512, beta_fast=4, **OVER_8K),
    "e70076e0": RopeScaling(type="yarn", ramp="rotations", beta=4, factor=512, **OVER_8K),
    "3d8117b8": GIRAFFE,
    "98334381": RopeScaling(type="dynamic", factor=8, max_position_embeddings=8192, **BASE),
}


@pytest.mark.parametrize("start", FINGERPRINTS)
def test_fingerprints_never_change(start: str) -> None:
    assert FINGERPRINTS[start].fingerprint().startswith(start)


@pytest.mark.parametrize(
    "other",
    [
        {"factor": 256},
        {"rope_theta": 500001.0},
        {"original_max_position_embeddings": 8193},
        {"low_freq_factor": 1.0001},
        {"head_dim": 64},
        {"type": "yarn"},
        {"type": "yarn", "ramp": "rotations", "beta": 4},
    ],
)
def test_another_rope_has_another_fingerprint(other: dict[str, Any]) -> None:
    assert RopeScaling(**{"type": "llama3", "factor": 512, **OVER_8K, **other}).fingerprint() != ULTRALONG_4M.fingerprint()


def test_attention_factor_alone_changes_the_fingerprint() -> None:
    with_temperature = RopeScaling(type="yarn", factor=8, **OVER_8K)
    without = RopeScaling(type="yarn", factor=8, attention_factor=1, **OVER_8K)
    assert np.array_equal(with_temperature.frequencies()[0], without.frequencies()[0])
    assert with_temperature.fingerprint() != without.fingerprint()


def test_ropes_that_compute_the_same_share_a_fingerprint() -> None:
    published = RopeScaling(type="yarn", ramp="rotations", alpha=1, beta=4, factor=512, attention_factor=1, **OVER_8K)
    assert published.fingerprint() == ULTRALONG_4M.fingerprint()
    longer = RopeScaling(type="llama3", factor=512, max_position_embeddings=4_200_000, **OVER_8K)
    assert longer.fingerprint() == ULTRALONG_4M.fingerprint(), "the length of the model is no part of its rope"
    plain, abf = (RopeScaling(type=kind, head_dim=128, rope_theta=8e6) for kind in ("none", "abf"))  # type: ignore[arg-type]
    assert plain.fingerprint() == abf.fingerprint()


def test_another_program_with_its_own_pow_arrives_at_the_same_fingerprint() -> None:
    exponents = np.arange(0, 128, 2) / 128
    inv_freq = 1.0 / np.power(500_000.0, exponents)  # not correctly rounded: differs in the last place
    keep = np.clip((8192 * inv_freq / (2 * np.pi) - 1) / 3, 0, 1)
    inv_freq = inv_freq * ((1 - keep) / 512 + keep)
    assert not np.array_equal(inv_freq, ULTRALONG_4M.frequencies()[0])
    values = [float(f"{value:.11e}") for value in [*inv_freq, 1.0, 8192.0]]
    assert hashlib.sha256(np.array(values, "<f8").tobytes()).hexdigest() == ULTRALONG_4M.fingerprint()


def test_dynamic_is_refused_for_training_with_a_way_out() -> None:
    rope = RopeScaling(type="dynamic", factor=8, max_position_embeddings=8192, **BASE)
    for refused in (rope.check_trainable, rope.frequencies):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert str(caught.value) == (
            "rope type dynamic changes its frequencies with the sequence length; a model cannot be trained or extended with it;"
            " use type ntk with factor 8 (the same formula at one length), or llama3 or yarn"
        )
    other = RopeScaling(type="dynamic", factor=4, max_position_embeddings=8192, **BASE)
    assert rope.fingerprint() != other.fingerprint()
    ULTRALONG_4M.check_trainable()


def test_only_types_with_a_ramp_have_a_share_kept() -> None:
    with pytest.raises(ValueError, match="rope type linear has no ramp"):
        RopeScaling(type="linear", factor=8, **BASE).share_kept()
