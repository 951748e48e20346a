"""The independent reader agrees with what we build, and disagrees when anything about the weights or the rope is wrong."""

import json
import shutil
import sys

import pytest
import torch

from mcore_longctx.convert import import_hf
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.evaluate import compare_logits
from mcore_longctx.rope import RopeScaling

from . import tiny_checkpoint as tiny

YARN = RopeScaling(type="yarn", head_dim=8, rope_theta=10_000.0, factor=8, original_max_position_embeddings=128)
ROPES = {"none": tiny.OWN, "llama3": tiny.SCALED, "yarn": YARN}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """rope name -> (torch_dist checkpoint, Hugging Face folder) of the same weights."""
    made = {}
    for name, rope in ROPES.items():
        folder = tmp_path_factory.mktemp(name)
        tiny.hf_model(rope).save_pretrained(folder / "hf", safe_serialization=True)
        tiny.write_tokenizer(folder / "hf")
        import_hf(folder / "hf", folder / "checkpoint")
        made[name] = (folder / "checkpoint", folder / "hf")
    return made


@pytest.mark.parametrize("name", ROPES)
def test_checkpoint_and_hf_folder_agree_up_to_the_end_of_the_context(folders, name):
    report = compare_logits(*folders[name])
    assert report.equal, report.text()
    assert report.inverse_frequencies_equal
    length = 128 if name == "none" else 1024
    assert report.differences[-1].positions == f"0..31 and {length - 32:,}..{length - 1:,}"
    assert all(difference.scale > 0.1 for difference in report.differences)
    assert json.loads(json.dumps(report.as_dict()))["equal"] is True
    assert report.text().splitlines()[-1].startswith("equal: logits within 1e-05 of transformers")


def edited_config(hf, folder, **changes):
    copy = folder / "edited"
    shutil.copytree(hf, copy)
    config = json.loads((copy / "config.json").read_text())
    for key, value in changes.items():
        for section in (config, config.get("rope_scaling"), config.get("rope_parameters")):
            if section is not None and (key in section or (key == "attention_factor" and section is not config)):
                section[key] = value
    assert config != json.loads((hf / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("change", [{"rope_theta": 10_100.0}, {"factor": 7.0}, {"high_freq_factor": 5.0}])
def test_another_rope_on_one_side_is_a_difference(folders, tmp_path, change):
    checkpoint, hf = folders["llama3"]
    report = compare_logits(checkpoint, edited_config(hf, tmp_path, **change))
    assert not report.equal
    assert not report.inverse_frequencies_equal
    assert report.differences[-1].relative > 1e-3  # seen in the logits as well, far out
    assert "DIFFERENT" in report.text()


def test_a_lost_attention_factor_is_a_difference(folders, tmp_path):
    checkpoint, hf = folders["yarn"]
    report = compare_logits(checkpoint, edited_config(hf, tmp_path, attention_factor=1.0))
    assert report.inverse_frequencies_equal
    assert not report.equal


@pytest.mark.parametrize(("one", "other"), [("self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")])
def test_swapped_matrices_are_a_difference(folders, tmp_path, one, other):
    from safetensors.torch import load_file, save_file

    checkpoint, hf = folders["none"]
    copy = tmp_path / "swapped"
    shutil.copytree(hf, copy)
    weights = load_file(copy / "model.safetensors")
    names = [f"model.layers.1.{name}.weight" for name in (one, other)]
    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    report = compare_logits(checkpoint, copy)
    assert report.inverse_frequencies_equal
    assert not report.equal


def test_blocks_far_apart_see_each_other(folders):
    """A block that did not see the other would hide every rope error: swapping tokens of the first must change the second."""
    from mcore_longctx.evaluate.logits import _hf_logits, _sequences
    from mcore_longctx.recipe.card import read_card

    checkpoint, hf = folders["llama3"]
    card = read_card(checkpoint)
    ids, positions, words = _sequences(card, None)[-1]
    other = torch.cat([(ids[:32] + 1) % 256, ids[32:]])
    (first, second), _, _ = _hf_logits(hf, card, [(ids, positions, words), (other, positions, words)])
    assert (first[32:] - second[32:]).abs().max() > 1e-2


def test_own_tokens_may_be_given(folders):
    assert compare_logits(*folders["none"], tokens=list(range(256))).equal
    for wrong in (list(range(100)), [258] * 256):
        with pytest.raises(ConfigError, match="at least 256 ids of 0 to 257"):
            compare_logits(*folders["none"], tokens=wrong)


def test_without_transformers_one_line_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs transformers, which is not installed; pip install"):
        compare_logits(*folders["none"])


def test_a_folder_that_is_none_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json: not a Hugging Face folder"):
        compare_logits(folders["none"][0], tmp_path)
    with pytest.raises(CheckpointError, match=r"no mcore_longctx\.json here"):
        compare_logits(tmp_path, folders["none"][1])
