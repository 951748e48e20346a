"""The rope in words: one line per type, the paper's scaling, the warning about a dropped scaling."""

import doctest
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcore_longctx.recipe.load import load_recipe
from mcore_longctx.rope import RopeBand, RopeScaling, dropped_scaling, explain

BASE: dict[str, Any] = {"head_dim": 128, "rope_theta": 500_000.0}
OVER_8K: dict[str, Any] = BASE | {"original_max_position_embeddings": 8192}
LLAMA_31 = RopeScaling(type="llama3", factor=8, max_position_embeddings=131072, **OVER_8K)
BANDS = (
    RopeBand(pairs=16, rule="none"),
    RopeBand(pairs=23, rule="mix", ntk_share=0.25),
    RopeBand(pairs=1, rule="linear"),
    RopeBand(pairs=24, rule="ntk"),
)
PAIRS = "pairs 0-28 kept, 29-34 mixed, 35-63 divided by 512"


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (RopeScaling(type="none", **BASE), "none: no scaling, base 500,000"),
        (RopeScaling(type="abf", head_dim=128, rope_theta=8e6), "abf: base changed to 8,000,000, no other scaling"),
        (RopeScaling(type="linear", factor=1.5, **BASE), "linear factor 1.5, base 500,000: every pair divided by 1.5"),
        (
            RopeScaling(type="ntk", factor=8, **BASE),
            "ntk factor 8, base 500,000 changed to 4,134,231.132: the slowest pair divided by 8, faster ones by less",
        ),
        (
            RopeScaling(type="dynamic", factor=8, max_position_embeddings=8192, **BASE),
            "dynamic factor 8 over a trained length of 8,192, base 500,000: changes with the sequence, not for training",
        ),
        (
            RopeScaling(type="llama3", factor=512, **OVER_8K),
            "llama3 factor 512 over 8,192 (low 1, high 4), base 500,000: YaRN as published with alpha 1, beta 4, without temperature; "
            + PAIRS,
        ),
        (
            RopeScaling(type="yarn", factor=512, beta_fast=4, **OVER_8K),
            "yarn factor 512 over 8,192 (beta_fast 4, beta_slow 1), base 500,000: as libraries compute it, ramp over the pair index,"
            " attention factor 1.62383; " + PAIRS,
        ),
        (
            RopeScaling(type="yarn", factor=512, beta_fast=4, beta_slow=0.5, truncate=False, attention_factor=1, **OVER_8K),
            "yarn factor 512 over 8,192 (beta_fast 4, beta_slow 0.5, not truncated), base 500,000: as libraries compute it,"
            " ramp over the pair index, attention factor 1; pairs 0-28 kept, 29-38 mixed, 39-63 divided by 512",
        ),
        (
            RopeScaling(type="yarn", ramp="rotations", factor=512, beta=4, **OVER_8K),
            "yarn factor 512 over 8,192 (alpha 1, beta 4), base 500,000: as published, ramp over rotations, attention factor 1.62383; "
            + PAIRS,
        ),
        (
            RopeScaling(type="bands", factor=4, bands=BANDS, **OVER_8K),
            "bands factor 4, base 500,000: pairs 0-15 kept, 16-38 mixed (0.25 ntk, 0.75 linear), 39 divided by 4, 40-63 as ntk",
        ),
        (
            RopeScaling(type="longrope", long_factor=(1.0,) * 60 + (1.5, 2.0, 3.0, 4.0), **BASE),
            "longrope with one list, base 500,000: 60 of 64 pairs kept, each pair divided by a number of its own, from 1 to 4",
        ),
        (
            RopeScaling(type="longrope", long_factor=(2.0,) * 64, **BASE),
            "longrope with one list, base 500,000: each pair divided by a number of its own, from 2 to 2",
        ),
    ],
)
def test_a_rope_in_one_line(rope: RopeScaling, words: str) -> None:
    assert rope.describe() == words


def test_a_ramp_of_one_pair_is_not_a_range() -> None:
    rope = RopeScaling(type="llama3", head_dim=4, rope_theta=1e4, factor=8, original_max_position_embeddings=512)
    assert rope.describe().endswith("pairs 0 kept, 1 divided by 8")


def test_llama3_is_explained_as_the_papers_yarn_with_the_rival_reading() -> None:
    words, identity, library, rival = explain(RopeScaling(type="llama3", factor=512, **OVER_8K)).split("\n")
    assert words.startswith("llama3 factor 512 over 8,192")
    assert '"YaRN, alpha 1, beta 4, s 512" as published' in identity
    assert "low_freq_factor 1, high_freq_factor 4, factor 512 over 8,192" in identity
    assert "temperature (cos and sin times 1.62383)" in identity
    assert "beta_fast 4, beta_slow 1, 6 of 64 frequencies differ, by up to 1.89 times" in library
    assert "32 and 1, 16 of 64 frequencies differ, by up to 2.42 times" in library
    assert rival.endswith("rope.type=yarn rope.beta_fast=4 rope.beta_slow=1")


def test_library_yarn_is_explained_as_not_the_papers() -> None:
    lines = explain(RopeScaling(type="yarn", factor=512, beta_fast=4, **OVER_8K)).split("\n")
    assert len(lines) == 3
    assert "is the rope type llama3" in lines[1]


def test_a_plain_rope_needs_no_explanation() -> None:
    assert explain(RopeScaling(type="none", **BASE)) == "none: no scaling, base 500,000"


def test_an_original_length_without_a_yarn_ramp_can_still_be_explained() -> None:
    assert "no ramp" in explain(RopeScaling(type="llama3", factor=8, original_max_position_embeddings=4, **BASE))


@pytest.mark.parametrize("preset", ["ultralong-8b-1m", "ultralong-8b-2m", "ultralong-8b-4m"])
def test_the_presets_train_the_papers_scaling_and_the_explained_override_trains_the_rival(preset: str) -> None:
    rope = load_recipe(preset).rope.scaling(LLAMA_31)
    factor = {"1m": 128, "2m": 256, "4m": 512}[preset[-2:]]
    assert rope.fingerprint() == RopeScaling(type="llama3", factor=factor, **OVER_8K).fingerprint()
    assert rope.resolved_max_position_embeddings == factor * 8192
    overrides = re.findall(r"rope\.\w+=\S+", explain(rope).split("\n")[-1])
    rival = load_recipe(preset, overrides).rope.scaling(LLAMA_31)
    assert rival.fingerprint() == RopeScaling(type="yarn", factor=factor, beta_fast=4, **OVER_8K).fingerprint()
    if preset.endswith("4m"):  # T3d
        sha256 = hashlib.sha256(rival.frequencies()[0].astype("<f4").tobytes()).hexdigest()
        assert sha256 == "2375c276667f0a504bd22be110a98dc1fd7ccf39908066d559e096d9b183212b"


def test_yarn_that_drops_the_scaling_of_llama_31_is_warned_about() -> None:
    yarn = RopeScaling(type="yarn", factor=32, original_max_position_embeddings=131072, **BASE)
    warning = dropped_scaling(LLAMA_31, yarn)
    assert warning is not None
    assert warning.startswith("19 pairs (29-47) turn faster than in the model's own rope (llama3 factor 8 over 8,192")
    assert warning.endswith("count factor from original_max_position_embeddings 8,192, as the model does")


def test_a_plain_rope_on_llama_31_is_warned_about() -> None:
    assert dropped_scaling(LLAMA_31, RopeScaling(type="none", **BASE)) is not None


@pytest.mark.parametrize(
    "rope",
    [
        RopeScaling(type="llama3", factor=128, **OVER_8K),
        RopeScaling(type="yarn", factor=128, **OVER_8K),
        RopeScaling(type="yarn", factor=128, ramp="rotations", **OVER_8K),
        LLAMA_31,
    ],
)
def test_scalings_that_continue_the_models_own_pass_without_warning(rope: RopeScaling) -> None:
    assert dropped_scaling(LLAMA_31, rope) is None


DOCS = Path(__file__).parents[2] / "docs" / "rope.md"


def test_the_examples_of_the_documentation_are_true() -> None:
    result = doctest.testfile(str(DOCS), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_precision_table_of_the_documentation_is_true() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) rad \| ([\d.]+) rad \|$", DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 4
    inv_freq = RopeScaling(type="llama3", factor=512, **OVER_8K).frequencies()[0]
    for length, in_float32, in_float64 in ((int(row[0].replace(",", "")), float(row[1]), float(row[2])) for row in rows):
        positions = np.append(np.arange(0, length, 997), np.arange(length - 512, length))
        exact = positions[:, None] * inv_freq
        float32 = (positions[:, None].astype(np.float32) * inv_freq.astype(np.float32)).astype(np.float64)
        float64 = np.fmod(exact, 2 * math.pi).astype(np.float32)
        assert np.abs(float32 - exact).max() == pytest.approx(in_float32, rel=0.03)
        error = np.remainder(float64 - exact + math.pi, 2 * math.pi) - math.pi
        assert np.abs(error).max() == pytest.approx(in_float64, rel=0.03)
