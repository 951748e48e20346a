"""What travels with the weights: sizes and rope, and a fingerprint that notices a rope edited by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.errors import CheckpointError
from mcore_longctx.recipe import CARD, CheckpointCard, ModelShape, read_card, write_card
from mcore_longctx.rope import RopeBand, RopeScaling

SHAPE = ModelShape(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=16, vocab_size=262
)
BANDS = (RopeBand(pairs=2, rule="none"), RopeBand(pairs=3, rule="mix", ntk_share=0.5), RopeBand(pairs=3, rule="ntk"))
ROPE = RopeScaling(type="llama3", head_dim=16, rope_theta=10000.0, factor=8, original_max_position_embeddings=512)


def card_in(folder: Path) -> dict[str, Any]:
    write_card(folder, CheckpointCard(shape=SHAPE, rope=ROPE, stage="extend", iteration=7))
    found: dict[str, Any] = json.loads((folder / CARD).read_text())
    return found


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card_in(tmp_path)
    assert read_card(tmp_path) == CheckpointCard(shape=SHAPE, rope=ROPE, stage="extend", iteration=7)


@pytest.mark.parametrize(
    "rope",
    [
        RopeScaling(type="bands", head_dim=16, rope_theta=1e4, factor=8, original_max_position_embeddings=512, bands=BANDS),
        RopeScaling(type="longrope", head_dim=16, rope_theta=1e4, max_position_embeddings=4096, long_factor=(1.0, 1.1) * 4),
    ],
    ids=["bands", "longrope"],
)
def test_a_rope_with_a_list_is_read_as_it_was_written(tmp_path: Path, rope: RopeScaling) -> None:
    card = CheckpointCard(shape=SHAPE, rope=rope)
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card
    text = json.loads((tmp_path / CARD).read_text())
    edited = text["rope"]["bands"][1] if rope.bands else text["rope"]["long_factor"]
    edited["ntk_share" if rope.bands else 3] = 0.75
    (tmp_path / CARD).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="the rope in this file does not give the rope fingerprint stored beside it"):
        read_card(tmp_path)
    edited["ntk_share" if rope.bands else 3] = "x"
    (tmp_path / CARD).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"damaged or of another version"):
        read_card(tmp_path)


def test_a_rope_edited_by_hand_is_refused(tmp_path: Path) -> None:
    text = card_in(tmp_path)
    text["rope"]["factor"] = 16.0
    (tmp_path / CARD).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="the rope in this file does not give the rope fingerprint stored beside it"):
        read_card(tmp_path)


def test_a_card_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no mcore_longctx\.json here: not a checkpoint of mcore-longctx; make one with"):
        read_card(tmp_path)
    text = card_in(tmp_path)
    del text["shape"]["num_layers"]
    (tmp_path / CARD).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"mcore_longctx\.json: damaged or of another version"):
        read_card(tmp_path)


def test_another_model_or_rope_is_refused_with_both_values(tmp_path: Path) -> None:
    card = CheckpointCard(shape=SHAPE, rope=ROPE)
    card.check(shape=SHAPE, rope=ROPE, where="here")
    with pytest.raises(CheckpointError, match=r"^here: vocabulary has 262 entries, the recipe's model 264;"):
        card.check(shape=replace(SHAPE, vocab_size=264), rope=ROPE, where="here")
    with pytest.raises(CheckpointError, match=r"^here: num_layers is 2, the recipe's model has 4"):
        card.check(shape=replace(SHAPE, num_layers=4), rope=ROPE, where="here")
    with pytest.raises(
        CheckpointError, match=r"^here: rope differs: the checkpoint has llama3 factor 8 .*, expected llama3 factor 16 "
    ):
        card.check(shape=SHAPE, rope=replace(ROPE, factor=16), where="here")


def test_a_card_says_which_family_the_model_is_of(tmp_path: Path) -> None:
    shape = replace(SHAPE, family="qwen3", qk_layernorm=True)
    write_card(tmp_path, CheckpointCard(shape=shape, rope=ROPE))
    assert json.loads((tmp_path / CARD).read_text())["family"] == "qwen3"
    assert read_card(tmp_path).shape == shape


def test_a_card_of_before_there_were_families_is_a_llama(tmp_path: Path) -> None:
    text = card_in(tmp_path)
    for name in ("family", "add_qkv_bias", "add_bias_linear", "qk_layernorm"):
        del text["shape"][name]
    (tmp_path / CARD).write_text(json.dumps(text))
    assert read_card(tmp_path).shape == SHAPE


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", "2"), ("num_layers", True), ("hidden_size", 0), ("qk_layernorm", 1), ("a_new_field", 1)]
)
def test_a_card_with_an_impossible_shape_is_damaged(tmp_path: Path, name: str, value: Any) -> None:
    text = card_in(tmp_path)
    text["shape"][name] = value
    (tmp_path / CARD).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match=r"mcore_longctx\.json: damaged or of another version"):
        read_card(tmp_path)


def test_a_card_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    text = card_in(tmp_path)
    text["shape"]["family"] = "gemma"
    (tmp_path / CARD).write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="the model is of family 'gemma'; known are llama, mistral, qwen2, qwen3, skywork"):
        read_card(tmp_path)
