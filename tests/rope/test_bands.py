"""A rope in bands against the paper's rule in a few lines, its laws for any bands, and the longrope that it is exported as."""

import json
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import load_recipe
from mcore_longctx.rope import RopeBand, RopeScaling, RopeType, read_hf_rope, write_hf_rope
from mcore_longctx.rope.bands import BandRule

RULES: tuple[BandRule, ...] = get_args(BandRule)
BASE: dict[str, Any] = {"head_dim": 128, "rope_theta": 1e6}
SECTIONS = (RopeBand(pairs=16, rule="none"), RopeBand(pairs=24, rule="mix", ntk_share=0.3), RopeBand(pairs=24, rule="ntk"))
GIRAFFE = RopeScaling(type="bands", factor=4, original_max_position_embeddings=32768, bands=SECTIONS, **BASE)


def the_papers_rule(
    dim: int, base: float, scale: float, sections: tuple[int, int, int], ntk_factor: float
) -> np.ndarray[Any, Any]:
    """M-RoPE++ with equal positions on all three axes: time plain, height a mix, width NTK."""
    exponents = np.arange(0, dim, 2) / dim
    plain, ntk = base**-exponents, (base * scale ** (dim / (dim - 2))) ** -exponents
    time, height = sections[0], sections[0] + sections[1]
    mix = (1 - ntk_factor) * plain / scale + ntk_factor * ntk
    return np.concatenate([plain[:time], mix[time:height], ntk[height:]])


@pytest.mark.parametrize("ntk_factor", [0.0, 0.3, 0.5, 1.0])
def test_giraffes_bands_are_the_papers_rule(ntk_factor: float) -> None:
    bands = (SECTIONS[0], RopeBand(pairs=24, rule="mix", ntk_share=ntk_factor), SECTIONS[2])
    rope = RopeScaling(type="bands", factor=4, bands=bands, **BASE)
    np.testing.assert_allclose(rope.frequencies()[0], the_papers_rule(128, 1e6, 4.0, (16, 24, 24), ntk_factor), rtol=1e-13)
    assert rope.frequencies()[1] == 1.0


@pytest.mark.parametrize(
    ("preset", "dim", "base", "sections", "length"),
    [("tiny-giraffe", 32, 1e4, (4, 6, 6), 4096), ("giraffe-7b-128k", 128, 1e6, (16, 24, 24), 131072)],
)
def test_the_presets_are_the_papers_rule(preset: str, dim: int, base: float, sections: tuple[int, int, int], length: int) -> None:
    section = load_recipe(preset).rope
    rope = section.scaling(RopeScaling(type="none", head_dim=dim, rope_theta=base))
    np.testing.assert_allclose(rope.frequencies()[0], the_papers_rule(dim, base, section.factor, sections, 0.5), rtol=1e-13)
    assert rope.resolved_max_position_embeddings == length


def test_the_tiny_preset_trains_as_many_tokens_as_the_one_it_is_compared_with() -> None:
    def tokens(name: str) -> list[int]:
        return [stage.iterations * stage.global_batch_size * stage.seq_length for stage in load_recipe(name).stages]

    assert tokens("tiny-giraffe") == tokens("tiny-cpu")


@st.composite
def ropes(draw: st.DrawFn) -> RopeScaling:
    bands = []
    left = draw(st.integers(2, 64))
    head_dim = 2 * left
    while left:
        pairs = draw(st.integers(1, left))
        rule = draw(st.sampled_from(RULES))
        share = draw(st.floats(0.0, 1.0)) if rule == "mix" else None
        bands.append(RopeBand(pairs=pairs, rule=rule, ntk_share=share))
        left -= pairs
    return RopeScaling(
        type="bands",
        head_dim=head_dim,
        rope_theta=draw(st.floats(1e3, 1e9)),
        factor=draw(st.floats(1.0, 1024.0)),
        original_max_position_embeddings=draw(st.integers(512, 131072)),
        bands=tuple(bands),
    )


def one_band(rope: RopeScaling, rule: BandRule, share: float | None = None) -> RopeScaling:
    bands = (RopeBand(pairs=rope.head_dim // 2, rule=rule, ntk_share=share),)
    return RopeScaling(type="bands", head_dim=rope.head_dim, rope_theta=rope.rope_theta, factor=rope.factor, bands=bands)


def of_type(rope: RopeScaling, kind: RopeType) -> np.ndarray[Any, Any]:
    factor: dict[str, Any] = {} if kind == "none" else {"factor": rope.factor}
    return RopeScaling(type=kind, head_dim=rope.head_dim, rope_theta=rope.rope_theta, **factor).frequencies()[0]


@given(ropes())
def test_one_band_is_the_type_of_its_rule(rope: RopeScaling) -> None:
    assert np.array_equal(one_band(rope, "none").frequencies()[0], of_type(rope, "none"))
    assert np.array_equal(one_band(rope, "linear").frequencies()[0], of_type(rope, "linear"))
    assert np.array_equal(one_band(rope, "mix", 0.0).frequencies()[0], of_type(rope, "linear"))
    for ntk in (one_band(rope, "ntk"), one_band(rope, "mix", 1.0)):  # here the divisor is rounded, there the base
        np.testing.assert_allclose(ntk.frequencies()[0], of_type(rope, "ntk"), rtol=1e-14)


@given(ropes())
def test_no_pair_turns_faster_than_plain_or_slower_than_linear(rope: RopeScaling) -> None:
    inv_freq, plain = rope.frequencies()[0], of_type(rope, "none")
    assert (inv_freq <= plain).all()
    assert (inv_freq >= plain / rope.factor).all()
    assert all(1.0 <= divisor <= rope.factor for divisor in rope.divisors())


@given(ropes())
def test_each_pair_follows_the_rule_of_its_band_alone(rope: RopeScaling) -> None:
    assert rope.bands is not None
    first = 0
    for band in rope.bands:
        alone = one_band(rope, band.rule, band.ntk_share).divisors()
        assert rope.divisors()[first : first + band.pairs] == alone[first : first + band.pairs]
        first += band.pairs


@given(ropes())
def test_what_is_exported_is_read_back_to_the_bit(rope: RopeScaling) -> None:
    again = read_hf_rope(json.loads(json.dumps({"head_dim": rope.head_dim, **write_hf_rope(rope)})))
    assert again.type == "longrope"
    assert again.long_factor == rope.divisors()
    assert np.array_equal(again.frequencies()[0], rope.frequencies()[0])
    assert again.fingerprint() == rope.fingerprint()
    assert again.resolved_max_position_embeddings == rope.resolved_max_position_embeddings
    assert write_hf_rope(again) == write_hf_rope(rope), "exported once more it is the same file"


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (None, "rope type bands needs bands, a list of pairs and rule"),
        ((), "the bands have 0 pairs, a head of 128 has 64"),
        (SECTIONS[:2], "the bands have 40 pairs, a head of 128 has 64"),
        ((*SECTIONS, RopeBand(pairs=1, rule="none")), "the bands have 65 pairs, a head of 128 has 64"),
        (("ntk",), "rope type bands needs bands, a list of pairs and rule"),
    ],
)
def test_bands_that_are_not_the_head_are_refused(bands: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RopeScaling(type="bands", factor=4, bands=bands, **BASE)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pairs": 0, "rule": "none"}, "pairs is 0, expected a whole number from 1 to 2,048"),
        ({"pairs": True, "rule": "none"}, "pairs is True, expected a whole number from 1 to 2,048"),
        ({"pairs": 4, "rule": "half"}, "rule is 'half', expected one of none, linear, ntk, mix"),
        ({"pairs": 4, "rule": "mix"}, "ntk_share is None, rule mix needs a number from 0 (linear) to 1 (ntk)"),
        ({"pairs": 4, "rule": "mix", "ntk_share": 1.5}, "ntk_share is 1.5, rule mix needs a number from 0 (linear) to 1 (ntk)"),
        (
            {"pairs": 4, "rule": "mix", "ntk_share": float("nan")},
            "ntk_share is nan, rule mix needs a number from 0 (linear) to 1 (ntk)",
        ),
        ({"pairs": 4, "rule": "ntk", "ntk_share": 0.5}, "ntk_share is given, but rule ntk does not use it"),
        ({"pairs": 4}, "a band is {'pairs': 4}, expected pairs, rule and, for mix, ntk_share"),
        ({"pairs": 4, "rule": "none", "x": 1}, "a band is {'pairs': 4, 'rule': 'none', 'x': 1}, expected pairs, rule and, for mix, ntk_share"),
        (4, "a band is 4, expected pairs, rule and, for mix, ntk_share"),
    ],
)  # fmt: skip
def test_a_band_that_makes_no_sense_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RopeBand.from_dict(values)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("long_factor", "message"),
    [
        (None, "rope type longrope needs long_factor, a list of one number for each pair"),
        ([1.0] * 63, "long_factor has 63 numbers, a head of 128 has 64 pairs"),
        ([1.0] * 63 + [0.0], "long_factor of pair 63 is 0.0, expected a number above 0 and up to 1,000,000"),
        ([1.0] * 63 + [True], "long_factor of pair 63 is True, expected a number above 0 and up to 1,000,000"),
        ([float("nan")] * 64, "long_factor of pair 0 is nan, expected a number above 0 and up to 1,000,000"),
    ],
)
def test_a_list_that_is_not_one_number_for_each_pair_is_refused(long_factor: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RopeScaling(type="longrope", long_factor=long_factor, **BASE)
    assert str(caught.value) == message


def longrope(**changed: Any) -> dict[str, Any]:
    settings = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.5],
        "long_factor": [1.0, 1.5],
        "attention_factor": 1.0,
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        **changed,
    }
    settings = {key: value for key, value in settings.items() if value is not ...}
    return {"head_dim": 4, "max_position_embeddings": 8192, "rope_theta": 1e4, "rope_scaling": settings}


@pytest.mark.parametrize(
    "changed", [{}, {"factor": ...}, {"original_max_position_embeddings": ...}, {"short_mscale": 1, "long_mscale": 1.0}]
)
def test_a_longrope_of_one_list_is_read(changed: dict[str, Any]) -> None:
    rope = read_hf_rope(longrope(**changed))
    assert rope == RopeScaling(type="longrope", head_dim=4, rope_theta=1e4, max_position_embeddings=8192, long_factor=(1.0, 1.5))
    assert rope.frequencies()[0].tolist() == [1.0, 0.01 / 1.5]


TWO_TABLES = (
    "rope_scaling: rope type longrope switches between two frequency tables by sequence length; no one table can be trained;"
    " start from a model with plain, linear, llama3 or yarn rope"
)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (longrope(short_factor=[1.0, 1.25]), TWO_TABLES),
        (longrope(short_factor=[1.0]), TWO_TABLES),
        (longrope(rope_type="su"), TWO_TABLES.replace("longrope", "su")),
        (
            longrope(attention_factor=...),
            "rope_scaling.attention_factor is missing (rope type longrope); write it down: other programs guess it or stop",
        ),
        (
            longrope(attention_factor=1.19),
            "rope_scaling.attention_factor is 1.19: a longrope that multiplies cos and sin is not supported;"
            " start from a model with plain, linear, llama3 or yarn rope",
        ),
        (
            longrope(long_mscale=1.2),
            "rope_scaling.long_mscale is 1.2: a longrope that multiplies cos and sin is not supported;"
            " start from a model with plain, linear, llama3 or yarn rope",
        ),
        (longrope(long_factor=2), "rope_scaling.long_factor is 2, expected a list of numbers"),
        (longrope(long_factor=[1.0, "2"]), "rope_scaling.long_factor[1] is '2', expected a number"),
        (longrope(long_factor=[1.0] * 3, short_factor=[1.0] * 3), "rope: long_factor has 3 numbers, a head of 4 has 2 pairs"),
        (longrope(long_factor=[1, 0], short_factor=[1, 0]), "rope: long_factor of pair 1 is 0.0, expected a number above 0 and up to 1,000,000"),
    ],
)  # fmt: skip
def test_any_other_longrope_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hf_rope(config, where="here")
    assert str(caught.value) == f"here: {message}"


def test_spellings_with_other_lists_are_refused_without_printing_them_whole() -> None:
    written = json.loads(json.dumps(write_hf_rope(GIRAFFE)))
    written["rope_parameters"]["long_factor"][63] = 5.0
    written["rope_parameters"]["short_factor"][63] = 5.0
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters disagree: short_factor is") as caught:
        read_hf_rope({"head_dim": 128, **written})
    assert len(str(caught.value)) < 300


def test_transformers_computes_the_same_from_the_export_at_every_length(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    config = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128, "num_hidden_layers": 1, "vocab_size": 8}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**config, **json.loads(json.dumps(write_hf_rope(GIRAFFE)))))
    assert not [record for record in caplog.records if record.levelname == "WARNING"], caplog.text
    assert float(rotary.attention_scaling) == 1.0
    exact = the_papers_rule(128, 1e6, 4.0, (16, 24, 24), 0.3)
    for last in (100, 40_000, 131_071, 131_072, 200_000, 100):  # beyond the end it switches lists, and back
        cos, sin = rotary(torch.zeros(1), torch.tensor([[last]]))
        np.testing.assert_allclose(rotary.inv_freq.double().numpy(), exact, rtol=1e-6)
        assert float((cos**2 + sin**2 - 1).abs().max()) < 1e-6, "nothing multiplies cos and sin"


def test_the_export_leaves_servers_no_temperature_to_derive() -> None:
    settings = write_hf_rope(GIRAFFE)["rope_scaling"]
    assert settings["original_max_position_embeddings"] == write_hf_rope(GIRAFFE)["max_position_embeddings"] == 131072
    assert (settings["factor"], settings["attention_factor"]) == (1.0, 1.0)
    assert settings["short_factor"] == settings["long_factor"] == list(GIRAFFE.divisors())
    assert not {"short_mscale", "long_mscale"} & set(settings)  # transformers warns about keys that it does not know
