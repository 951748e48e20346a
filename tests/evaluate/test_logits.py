"""The independent reader agrees with what we build, and disagrees when anything about the weights or the rope is wrong."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mcore_longctx.convert import import_hf
from mcore_longctx.errors import CheckpointError, ConfigError, DataError
from mcore_longctx.evaluate import compare_logits
from mcore_longctx.evaluate.model_sources import read_source
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
    lines = report.text().splitlines()
    assert lines[0].startswith(f"{folders[name][0]}: built by megatron-core ")
    assert lines[1].startswith(f"{folders[name][1]}: built by transformers ")
    assert lines[-1] == "equal: logits within 1e-05"


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
    from mcore_longctx.evaluate.logits import _sequences
    from mcore_longctx.evaluate.model_sources import read_source, running

    for folder in folders["llama3"]:
        source = read_source(folder)
        ids, positions, _ = _sequences((source, source), None)[-1]
        other = torch.cat([(ids[:32] + 1) % 256, ids[32:]])
        with running(source, 64) as model:
            assert (model.logits(ids, positions)[32:] - model.logits(other, positions)[32:]).abs().max() > 1e-2


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
    for pair in ((folders["none"][0], tmp_path), (tmp_path, folders["none"][1])):
        with pytest.raises(CheckpointError, match=r"neither config\.json nor \.metadata: not a checkpoint; check the path"):
            compare_logits(*pair)
    foreign = shutil.copytree(folders["none"][0], tmp_path / "foreign")
    (foreign / "mcore_longctx.json").unlink()
    with pytest.raises(CheckpointError, match=r"no mcore_longctx\.json here"):
        compare_logits(foreign, folders["none"][1])
    # Megatron-LM's own: a folder around it, no card, a config that the user gives
    foreign.rename(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    for config in (folders["none"][1], folders["none"][1] / "config.json"):
        report = compare_logits(tmp_path, folders["none"][1], config=config)
        assert report.equal
        assert report.readers[0].endswith(f"from its tensors and {folders['none'][1] / 'config.json'}")


def test_any_pair_of_formats_is_compared_and_said(folders, tmp_path):
    checkpoint, hf = folders["yarn"]
    for pair, programs in (
        ((hf, checkpoint), ("transformers", "megatron-core")),
        ((hf, hf), ("transformers", "transformers")),
        ((checkpoint, checkpoint), ("megatron-core", "megatron-core")),
    ):
        report = compare_logits(*pair)
        assert report.equal
        assert tuple(reader.split()[0] for reader in report.readers) == programs
        assert tuple(report.as_dict()["readers"]) == report.readers
    assert not compare_logits(hf, edited_config(hf, tmp_path, rope_theta=10_100.0)).equal


def test_log_probabilities_of_a_text_are_those_of_transformers(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint, hf = folders["llama3"]
    text = tmp_path / "text.txt"
    text.write_text(tiny.held_out_text(20), encoding="utf-8")
    report = compare_logits(checkpoint, hf, text=text)
    assert report.equal
    model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager", dtype=torch.float32)
    ids = torch.tensor(list(text.read_bytes()))  # the tokenizer's ids are the bytes
    windows = [window for window in ids.split(512) if len(window) > 1]
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.item() * (len(window) - 1) for window in windows]
    count = sum(len(window) - 1 for window in windows)
    assert report.text_difference.tokens == count > 600
    assert report.text_difference.means[1] == pytest.approx(-sum(losses) / count, rel=1e-5)
    assert f"log-probabilities of {count:,} tokens of text" in report.text()
    other = compare_logits(checkpoint, edited_config(hf, tmp_path, rms_norm_eps=0.3), text=text)
    assert not other.text_difference.close
    assert not other.equal


def test_a_text_that_cannot_be_scored_is_one_line(folders, tmp_path):
    checkpoint, hf = folders["none"]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("some text")
    for name, message in (("binary", "cannot be read as UTF-8 text"), ("empty", "holds 0 tokens, expected at least two")):
        with pytest.raises(DataError, match=message):
            compare_logits(checkpoint, hf, text=tmp_path / name)
    without = shutil.copytree(hf, tmp_path / "without")
    (without / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json and no tokenizer\.model for the text"):
        compare_logits(without, without, text=tmp_path / "text")


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folders, monkeypatch):
    import psutil

    checkpoint, hf = folders["none"]
    weights = sum(path.stat().st_size for path in hf.glob("*.safetensors"))  # float32, and a header of a few KB
    source = read_source(hf)
    assert weights - 16_000 < source.float32_bytes < weights
    assert read_source(checkpoint).float32_bytes == source.float32_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=source.float32_bytes - 1))
    with pytest.raises(
        ConfigError, match=r"its logits need 0\.0 GB for the weights in float32, 0\.0 GB of memory are available;"
    ):
        compare_logits(checkpoint, hf)


def test_weights_that_transformers_would_make_up_or_drop_are_named(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folders["none"][1], tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    gone = weights.pop("lm_head.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformers finds 1 missing tensors \(first: lm_head.weight\)"):
        compare_logits(folders["none"][0], copy)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}
    save_file({**weights, "lm_head.weight": gone, **bias}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"finds 1 unexpected tensors \(first: model.layers.0.self_attn.q_proj.bias\)"):
        compare_logits(folders["none"][0], copy)


def test_bin_files_are_read(folders, tmp_path):
    from safetensors.torch import load_file

    copy = Path(shutil.copytree(folders["none"][1], tmp_path / "copy"))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert compare_logits(folders["none"][0], copy).equal


def test_code_beside_the_weights_is_not_loaded(folders, tmp_path):
    """A folder of Skywork's kind: a model type that transformers does not know, and Python files that say what it is."""
    checkpoint, hf = folders["none"]
    copy = Path(shutil.copytree(hf, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    skywork = {"model_type": "skywork", "architectures": ["SkyworkForCausalLM"], "auto_map": code}
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for changes in (skywork, {"auto_map": code}):
        (copy / "config.json").write_text(json.dumps(config | changes))
        assert compare_logits(checkpoint, copy).equal
    assert not (tmp_path / "ran").exists()
