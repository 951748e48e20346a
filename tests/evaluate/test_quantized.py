"""Folders of modelopt: transformers loads them with wrong weights and without an error, so nothing here may take one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mcore_longctx.cli.main import main

from . import tiny_checkpoint as tiny

RECIPE = """\
name: quantised
output: {folder}/run
model: {{path: {folder}/{model}}}
rope: {{type: llama3, factor: 8, original_max_position_embeddings: 128}}
data:
  books: {{sources: [{{name: books, path: {folder}/held-out.txt}}]}}
stages:
  - {{name: extend, kind: pretrain, data: books, seq_length: 256, train_iters: 1, global_batch_size: 1, optimizer: {{lr: 1e-4}}}}
evaluate:
  needle: {{haystack: {folder}/held-out.txt, lengths: [128], depths: 2, samples: 1, digits: 3}}
  precision: fp32
"""
REASON = "transformers would take the raw fp8 numbers for weights"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/hf and FOLDER/base, and what modelopt makes of hf: FOLDER/modelopt, and FOLDER/older, as before config.json said it."""
    made = tiny.make(tmp_path_factory.mktemp("quantised"))
    shutil.copytree(made / "hf", made / "older")
    weights = load_file(made / "hf" / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = scale
    save_file(weights, made / "older" / "model.safetensors", {"format": "pt"})
    settings = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    (made / "older" / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    shutil.copytree(made / "older", made / "modelopt")
    config = json.loads((made / "modelopt" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    (made / "modelopt" / "config.json").write_text(json.dumps(config))
    return made


def test_transformers_really_loads_wrong_weights_without_an_error(folder):
    model = AutoModelForCausalLM.from_pretrained(str(folder / "modelopt"), dtype=torch.float32)
    assert float(model.model.layers[0].self_attn.q_proj.weight.detach().float().abs().max()) == 448.0


@pytest.mark.parametrize("model", ["modelopt", "older"])
def test_verify_with_logits_refuses_it(folder, capsys, model):
    from mcore_longctx.evaluate import compare_logits

    with pytest.raises(Exception, match=REASON) as caught:
        compare_logits(folder / "base", folder / model)
    assert caught.value.exit_code == 2
    assert main(["convert", "verify", str(folder / "base"), str(folder / model), "--logits"]) == 2
    error = capsys.readouterr().err
    assert str(folder / model) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("model", "reason"), [("modelopt", REASON), ("older", "weight_scale")])
def test_import_refuses_it(folder, tmp_path, capsys, model, reason):
    assert main(["convert", "import", str(folder / model), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(folder / model) in error
    assert reason in error
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses_a_recipe_whose_model_it_is(folder, capsys):
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, model="modelopt"))
    assert main(["evaluate", str(recipe), "--checkpoint", "base", "--rope", "own", "--column", "before"]) == 2
    assert REASON in capsys.readouterr().err
    assert not (folder / "run").exists()
