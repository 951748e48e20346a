"""What a wrong converter would do must be seen: each mistake, made on purpose, fails both `verify` and the comparison of logits.

The mistakes are made on the Hugging Face side, so that the converter under test has no part in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_longctx.convert import compare, import_hf
from mcore_longctx.errors import LongctxError
from mcore_longctx.evaluate import compare_logits
from tests.convert.family_models import VOCABULARY, make
from tests.convert.hf_folders import LLAMA3_ROPE

Weights = dict[str, torch.Tensor]
ROPE = LLAMA3_ROPE | {"original_max_position_embeddings": 64}
HEAD = 32  # 16 pairs: some of them lie inside the band that llama3 blends; 8 heads in 2 groups


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with the rope of Llama 3.1 in `hf`, and in `megatron` what the import made of it."""
    folder = tmp_path_factory.mktemp("sound")
    make(folder / "hf", "llama", rope_scaling=ROPE, head_dim=HEAD)
    import_hf(folder / "hf", folder / "megatron")
    return folder


def swap(first: str, second: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        names = [f"model.layers.2.{name}.weight" for name in (first, second)]
        weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]

    return change


def groups_off_by_one(weights: Weights) -> None:
    """The keys of group g with the queries of group g + 1."""
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].roll(HEAD, dims=0)


def one_bit_of_the_last_row(weights: Weights) -> None:
    """The row beside the padding, where an off-by-one would cut: its smallest number, its lowest bit."""
    bits = weights["lm_head.weight"].view(torch.int32)
    bits[VOCABULARY - 1, -1] ^= 1


def one_row_too_far(weights: Weights) -> None:
    """The embedding shifted by one row, as if padding came first."""
    name = "model.embed_tokens.weight"
    weights[name] = weights[name].roll(1, dims=0)


def rotary_rows_permuted(weights: Weights) -> None:
    """The permutation of Meta's own files, which Hugging Face's do not need."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].unflatten(0, (8, HEAD // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


WRONG_WEIGHTS: dict[str, Callable[[Weights], None]] = {
    "keys and values swapped": swap("self_attn.k_proj", "self_attn.v_proj"),
    "gate and up swapped": swap("mlp.gate_proj", "mlp.up_proj"),
    "norms swapped": swap("input_layernorm", "post_attention_layernorm"),
    "groups off by one": groups_off_by_one,
    "rows off by one": one_row_too_far,
    "heads permuted": rotary_rows_permuted,
    "one bit": one_bit_of_the_last_row,
}


def copy_with(sound: Path, folder: Path, weights: Callable[[Weights], None] | None = None, **config: Any) -> Path:
    """The sound Hugging Face folder with something changed in it."""
    copy = Path(shutil.copytree(sound / "hf", folder / "copy"))
    if weights is not None:
        tensors = load_file(copy / "model.safetensors")
        weights(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    settings = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(json.dumps(settings))
    return copy


def test_what_is_sound_passes(sound: Path, tmp_path: Path) -> None:
    copy = copy_with(sound, tmp_path, lambda weights: None)
    assert compare(sound / "megatron", copy).equal
    assert compare_logits(sound / "megatron", copy).equal


@pytest.mark.parametrize("mistake", WRONG_WEIGHTS)
def test_wrong_weights_are_seen(sound: Path, tmp_path: Path, mistake: str) -> None:
    copy = copy_with(sound, tmp_path, WRONG_WEIGHTS[mistake])
    for pair in ((sound / "megatron", copy), (copy, sound / "megatron")):
        report = compare(*pair)
        assert not report.equal
        assert report.differences
    if mistake != "one bit":  # a logit changes by less than rounding: this one is for the comparison of bytes
        logits = compare_logits(sound / "megatron", copy)
        assert not logits.equal
        assert logits.inverse_frequencies_equal
    import_hf(copy, tmp_path / "imported")
    assert not compare(tmp_path / "imported", sound / "hf").equal


def rope_keys(**changes: Any) -> dict[str, Any]:
    """Both spellings, whichever the running transformers reads."""
    settings = {**ROPE, "rope_theta": 500000.0} | changes
    scaling = {key: value for key, value in settings.items() if key != "rope_theta"}
    return {"rope_theta": settings["rope_theta"], "rope_scaling": scaling, "rope_parameters": settings}


WRONG_ROPES = {
    "theta": rope_keys(rope_theta=500001.0),
    "factor": rope_keys(factor=8.5),
    "boundary": rope_keys(high_freq_factor=4.5),
    "original length": rope_keys(original_max_position_embeddings=128),
    "linear in place of llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
        "max_position_embeddings": 64,
    },
    "none in place of llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}


@pytest.mark.parametrize("mistake", WRONG_ROPES)
def test_a_wrong_rope_is_seen(sound: Path, tmp_path: Path, mistake: str) -> None:
    copy = copy_with(sound, tmp_path, **WRONG_ROPES[mistake])
    report = compare(sound / "megatron", copy)
    assert not report.equal
    assert report.rope_differs
    assert not report.differences  # no tensor says so
    logits = compare_logits(sound / "megatron", copy)
    assert not logits.equal
    assert not logits.inverse_frequencies_equal


def test_the_inverted_tied_flag_is_seen(sound: Path, tmp_path: Path) -> None:
    """Untied weights said to be tied: the head is there and is another. Tied ones said to be untied: there is none."""
    with pytest.raises(
        LongctxError, match=r"differs from model\.embed_tokens\.weight, but config\.json says tie_word_embeddings"
    ):
        compare(sound / "megatron", copy_with(sound, tmp_path, tie_word_embeddings=True))
    with pytest.raises(LongctxError):
        import_hf(tmp_path / "copy", tmp_path / "imported")
    tied = tmp_path / "tied"
    make(tied / "hf", "llama, tied")
    import_hf(tied / "hf", tied / "megatron")
    untied = copy_with(tied, tied, tie_word_embeddings=False)
    with pytest.raises(LongctxError, match=r"1 tensor missing \(first: lm_head\.weight\)"):
        compare(tied / "megatron", untied)
    with pytest.raises(LongctxError, match=r"1 missing tensors \(first: lm_head\.weight\)"):
        compare_logits(tied / "megatron", untied)


@pytest.mark.parametrize(("name", "key"), [("qwen2", "q_proj.bias"), ("qwen3", "q_norm.weight"), ("qwen3", "k_norm.weight")])
def test_biases_and_norms_of_heads_count(tmp_path: Path, name: str, key: str) -> None:
    """At zero and one, where they begin, a converter that dropped them would not be seen."""
    make(tmp_path / "hf", name)
    import_hf(tmp_path / "hf", tmp_path / "megatron")

    def change(weights: Weights) -> None:
        tensor = weights[f"model.layers.0.self_attn.{key}"]
        tensor.fill_(0.0 if key.endswith("bias") else 1.0)

    copy = copy_with(tmp_path, tmp_path, change)
    assert not compare(tmp_path / "megatron", copy).equal
    assert compare_logits(tmp_path / "megatron", tmp_path / "hf").equal
    assert not compare_logits(tmp_path / "megatron", copy).equal
