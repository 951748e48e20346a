"""transformers as the oracle: what it computes from the configs that we write, over a grid of settings.

It works in float32: powers and quotients cost a few units in the last place, and in the ramp the share of a pair is off by about
1e-7 of the whole, which counts up to `factor` times where little of the frequency is kept. Hence the two parts of the tolerance.
"""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mcore_longctx.rope import RopeScaling, read_hf_rope, write_hf_rope
from mcore_longctx.rope.frequencies import plain_frequencies

RELATIVE = 1e-6  # worst seen: 4.6e-7
OF_THE_SHARE = 5e-7  # worst seen: 3.4e-7
READS_NEW_SPELLING = int(transformers.__version__.split(".")[0]) >= 5


def sizes(head_dim: int) -> dict[str, Any]:
    return {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim, "num_hidden_layers": 1, "vocab_size": 8}


def rotary_of(config: dict[str, Any]) -> tuple[np.ndarray[Any, Any], float]:
    embedding = LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(config))))
    return embedding.inv_freq.numpy().astype(np.float64), float(embedding.attention_scaling)


def assert_same_rope(config: dict[str, Any], rope: RopeScaling) -> None:
    theirs, their_attention_factor = rotary_of(config)
    ours, attention_factor = rope.frequencies()
    plain = plain_frequencies(rope.head_dim, rope.rope_theta)
    mixed = np.zeros(len(ours))
    if rope.type in ("llama3", "yarn"):
        share = rope.share_kept()
        mixed = plain * ((share > 0.0) & (share < 1.0))
    assert (np.abs(theirs - ours) <= RELATIVE * ours + OF_THE_SHARE * mixed).all(), rope.describe()
    assert their_attention_factor == pytest.approx(attention_factor, rel=1e-15), rope.describe()


def grid() -> Iterator[RopeScaling]:
    bounds: list[dict[str, Any]] = [
        {"type": "llama3"},
        {"type": "llama3", "low_freq_factor": 2, "high_freq_factor": 16},
        {"type": "yarn"},
        {"type": "yarn", "beta_fast": 4},
        {"type": "yarn", "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.1},
        {"type": "yarn", "truncate": False},
        {"type": "yarn", "beta_fast": 4, "truncate": False, "mscale": 1, "mscale_all_dim": 0.5},
    ]
    for head_dim, base, factor, original, extra in itertools.product(
        (32, 64, 80, 96, 128), (1e4, 5e5, 8e6), (1, 2, 8, 40, 128, 512), (2048, 8192, 131072), bounds
    ):
        yield RopeScaling(head_dim=head_dim, rope_theta=base, factor=factor, original_max_position_embeddings=original, **extra)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Transformers warns about factor 1, where the original length is the whole length."""
    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def test_a_grid_of_llama3_and_yarn_ropes_is_what_transformers_computes() -> None:
    ropes = list(grid())
    assert len(ropes) == 1890
    for rope in ropes:
        assert_same_rope(sizes(rope.head_dim) | write_hf_rope(rope), rope)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("base", [1e4, 5e5, 8e6])
def test_plain_linear_and_changed_bases_are_what_transformers_computes(head_dim: int, base: float) -> None:
    common: dict[str, Any] = {"head_dim": head_dim, "rope_theta": base}
    ropes = [RopeScaling(type=kind, max_position_embeddings=8192, **common) for kind in ("none", "abf")]  # type: ignore[arg-type]
    for factor in (1, 2, 8, 40, 128, 512):
        ropes += [
            RopeScaling(type=kind, factor=factor, original_max_position_embeddings=8192, **common)  # type: ignore[arg-type]
            for kind in ("linear", "ntk")
        ]
    for rope in ropes:
        assert_same_rope(sizes(head_dim) | write_hf_rope(rope), rope)


@pytest.mark.parametrize("seq_length", [100, 2048, 4096, 65536])
def test_dynamic_is_what_transformers_computes_at_each_length(seq_length: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_type": "dynamic", "factor": 4.0}
    config = sizes(64) | {"max_position_embeddings": 2048, "rope_theta": 1e4, "rope_scaling": settings}
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](LlamaConfig(**config), "cpu", seq_len=seq_length)
    ours, _ = read_hf_rope(config).frequencies(seq_length)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=RELATIVE)


@pytest.mark.parametrize(
    "rope",
    [
        RopeScaling(type="yarn", head_dim=32, rope_theta=100.0, factor=4, original_max_position_embeddings=131072),
        RopeScaling(type="yarn", head_dim=32, rope_theta=1e4, factor=4, original_max_position_embeddings=131072),
        RopeScaling(type="yarn", head_dim=32, rope_theta=1e4, factor=4, original_max_position_embeddings=6),
    ],
    ids=["ramp clamped at head_dim - 1", "ramp ends beyond the last pair", "ramp of no width at pair 0"],
)
def test_the_odd_corners_of_the_yarn_ramp_are_those_of_transformers(rope: RopeScaling) -> None:
    assert_same_rope(sizes(rope.head_dim) | write_hf_rope(rope), rope)


EXPORTED = [
    RopeScaling(type="none", head_dim=64, rope_theta=5e5, max_position_embeddings=8192),
    RopeScaling(type="ntk", head_dim=64, rope_theta=5e5, factor=8, original_max_position_embeddings=8192),
    RopeScaling(type="linear", head_dim=64, rope_theta=5e5, factor=8, original_max_position_embeddings=8192),
    RopeScaling(type="llama3", head_dim=64, rope_theta=5e5, factor=512, original_max_position_embeddings=8192),
    RopeScaling(
        type="yarn",
        head_dim=64,
        rope_theta=5e5,
        factor=512,
        original_max_position_embeddings=8192,
        beta_fast=4,
        truncate=False,
        attention_factor=1.25,
    ),
]


@pytest.mark.parametrize("rope", EXPORTED, ids=lambda rope: rope.type)
def test_an_exported_folder_gives_the_same_rope_without_a_warning(
    rope: RopeScaling, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_hf_rope(rope)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes(64), **written}))
    for name in ("transformers", "transformers.modeling_rope_utils"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.addHandler(caplog.handler)
    config = LlamaConfig.from_pretrained(tmp_path)
    embedding = LlamaRotaryEmbedding(config)
    for name in ("transformers", "transformers.modeling_rope_utils"):
        logging.getLogger(name).removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []
    assert config.max_position_embeddings == written["max_position_embeddings"]
    ours, attention_factor = rope.frequencies()
    np.testing.assert_allclose(embedding.inv_freq.numpy(), ours, rtol=3e-5)
    assert embedding.attention_scaling == attention_factor


@pytest.mark.parametrize("rope", EXPORTED, ids=lambda rope: rope.type)
def test_a_config_saved_again_by_transformers_reads_back_as_the_same_rope(rope: RopeScaling, tmp_path: Path) -> None:
    LlamaConfig(**sizes(64), **write_hf_rope(rope)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if READS_NEW_SPELLING:
        assert "rope_scaling" not in saved
    assert read_hf_rope(saved).fingerprint() == rope.fingerprint()


@pytest.mark.parametrize("rope", EXPORTED, ids=lambda rope: rope.type)
def test_the_old_spelling_alone_is_enough_for_every_version(rope: RopeScaling) -> None:
    config = sizes(64) | write_hf_rope(rope)
    del config["rope_parameters"]
    assert_same_rope(config, rope if rope.type != "ntk" else read_hf_rope(config))


def test_writing_only_the_new_spelling_would_lose_the_rope_in_transformers_4() -> None:
    """Why both are written. Where this fails, the reason is gone for that version."""
    config = sizes(64) | write_hf_rope(EXPORTED[3])
    del config["rope_theta"], config["rope_scaling"]
    theirs, _ = rotary_of(config)
    if READS_NEW_SPELLING:
        np.testing.assert_allclose(theirs, EXPORTED[3].frequencies()[0], rtol=3e-5)
    else:
        np.testing.assert_allclose(theirs, plain_frequencies(64, 1e4), rtol=RELATIVE)
