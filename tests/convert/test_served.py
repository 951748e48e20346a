"""`convert check`: what servers will make of a folder, and how to start them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_longctx.convert import export_hf, import_hf
from mcore_longctx.convert.checks.commands import GPU_BYTES, kv_bytes, serve_commands, smallest_layout
from mcore_longctx.convert.checks.served import check_folder, served_lengths
from mcore_longctx.errors import CheckpointError
from mcore_longctx.families import ModelShape
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, write_folder

LLAMA_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)
LLAMA_70B = ModelShape(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)
WEIGHTS = {"8B": (LLAMA_8B, 16.1e9, 9.1e9), "70B": (LLAMA_70B, 141e9, 72.7e9)}
M = 1 << 20
# smallest tensor parallel sizes worked out apart from this code: bf16 all / bf16 weights, fp8 KV / fp8 all
SIZES = {
    ("8B", M): ("4/2/2", "2/1/1", "1/1/1"),
    ("8B", 2 * M): ("8/4/4", "4/2/2", "2/1/1"),
    ("8B", 4 * M): ("16/8/8", "8/4/4", "4/2/2"),
    ("70B", M): ("8/8/4", "4/4/2", "4/2/2"),
    ("70B", 2 * M): ("16/8/8", "8/4/4", "8/4/4"),
    ("70B", 4 * M): ("32/16/16", "16/8/8", "16/8/8"),
}


@pytest.mark.parametrize(("model", "length"), SIZES)
def test_the_smallest_number_of_gpus(model: str, length: int) -> None:
    shape, bf16, fp8 = WEIGHTS[model]
    kinds: list[tuple[float, Any]] = [(bf16, "bf16"), (bf16, "fp8"), (fp8, "fp8")]
    for (name, size), expected in zip(GPU_BYTES.items(), SIZES[model, length], strict=True):
        found = [smallest_layout(shape, length, weight_bytes=int(weights), kv=kv, gpu_bytes=size) for weights, kv in kinds]
        assert "/".join(str(layout.tp) for layout in found if layout) == expected, name


def test_keys_and_values_by_hand() -> None:
    assert kv_bytes(LLAMA_8B, 1, "bf16") == 131_072
    assert kv_bytes(LLAMA_70B, 1, "fp8") == 163_840


def test_commands_are_exact_and_say_what_they_are() -> None:
    lines = serve_commands(LLAMA_8B, 4 * M, weight_bytes=int(16.1e9), path="my model")
    assert "none run" in lines[0]
    assert lines[2:4] == [
        "# smallest number of GPUs, KV bf16: H100 16, H200 8, B200 4",
        "# smallest number of GPUs, KV fp8: H100 8, H200 4, B200 2",
    ]
    assert lines[4:] == [
        "vllm serve 'my model' --max-model-len 4194304 --tensor-parallel-size 16 --decode-context-parallel-size 2"
        " --max-num-seqs 1 --max-num-batched-tokens 8192",
        "vllm serve 'my model' --max-model-len 4194304 --tensor-parallel-size 8 --max-num-seqs 1 --max-num-batched-tokens 8192"
        " --kv-cache-dtype fp8",
        "python -m sglang.launch_server --model-path 'my model' --context-length 4194304 --tp-size 8 --kv-cache-dtype fp8_e4m3"
        " --chunked-prefill-size 8192",
    ]
    one_million = serve_commands(LLAMA_8B, M, weight_bytes=int(16.1e9))
    assert "--tensor-parallel-size 4 --max-num-seqs 2 --max-num-batched-tokens 16384" in one_million[4]


def test_decode_context_parallelism_obeys_the_heads() -> None:
    """TP above the key/value heads, at most TP / heads, a divisor of the query heads of each: else not a layout."""
    for shape in (LLAMA_8B, LLAMA_70B, replace(LLAMA_8B, num_attention_heads=36, num_query_groups=36)):
        for length in (M, 4 * M, 16 * M):
            layout = smallest_layout(shape, length, weight_bytes=10**10, kv="bf16", gpu_bytes=80e9)
            if layout is not None:
                assert shape.num_attention_heads % layout.tp == 0
                assert layout.dcp == 1 or layout.tp == layout.dcp * shape.num_query_groups
                assert (shape.num_attention_heads // shape.num_query_groups) % layout.dcp == 0
    assert smallest_layout(LLAMA_8B, 64 * M, weight_bytes=10**10, kv="bf16", gpu_bytes=80e9) is None
    assert "more than 64" in "\n".join(serve_commands(LLAMA_8B, 64 * M, weight_bytes=10**10))


def yarn(factor: float, **settings: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, **settings}


@pytest.mark.parametrize(
    ("rope", "length", "vllm", "sglang"),  # what the servers' own functions answer
    [
        (yarn(128.0, original_max_position_embeddings=8192), M, M, M),
        (yarn(8.0), M, M, 8 * M),
        ({"rope_type": "llama3", "factor": 512.0, "original_max_position_embeddings": 8192}, 4 * M, 4 * M, 4 * M),
        ({"rope_type": "llama3", "factor": 8.0}, 131072, 131072, 131072),  # read in SGLang's function, not run
        ({"rope_type": "linear", "factor": 8.0}, 131072, M, M),
        ({"rope_type": "dynamic", "factor": 8.0}, 131072, M, M),
        ({"rope_type": "linear", "factor": 8.0}, M, 8 * M, 8 * M),
        ({"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": 131072}, 131072, M, 131072),
        (yarn(128.0, original_max_position_embeddings=8192), 131072, 131072, 131072),
        (None, 4 * M, 4 * M, 4 * M),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_lengths_as_servers_derive_them(rope: Any, length: int, vllm: int, sglang: int, spelling: str) -> None:
    assert served_lengths({spelling: rope, "max_position_embeddings": length}) == {"vllm": vllm, "sglang": sglang}


def test_stale_keys_change_the_length() -> None:
    config = {"max_position_embeddings": M}
    assert served_lengths({**config, "model_max_length": 8192}) == {"vllm": 8192, "sglang": 8192}
    assert served_lengths({**config, "seq_length": 4 * M, "max_seq_len": 2 * M}) == {"vllm": M, "sglang": 4 * M}
    assert served_lengths({}) == {"vllm": 0, "sglang": 0}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    hf = write_folder(
        root / "hf", llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536), shards=2, dtype="bfloat16"
    )
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 125], "max_length": 512}))
    import_hf(hf, root / "megatron")
    export_hf(root / "megatron", root / "out", shard_bytes=20_000)
    export_hf(root / "megatron", root / "fp8", quantize="fp8")
    return root


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit(path: Path, *drop: str, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in drop}))


def test_what_export_writes_is_good(exported: Path) -> None:
    report = check_folder(exported / "out")
    assert report.good
    assert report.findings == ()
    assert report.length == report.served["vllm"] == report.served["sglang"] == 65536
    assert f"vllm serve {exported / 'out'} --max-model-len 65536" in report.text()
    assert report.text().count("tokens") >= 3
    assert json.loads(json.dumps(report.as_dict()))["good"] is True


def test_what_export_quantises_is_good(exported: Path) -> None:
    report = check_folder(exported / "fp8")
    assert report.findings == ()
    assert report.good


def drop_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    save_file({"model.layers.0.adapter.weight": torch.ones(2)}, folder / "more.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {**weight_map, "model.layers.0.adapter.weight": "more.safetensors"}})
    )


CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
DEFECTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "stale length": (lambda f: edit(f / CONFIG, max_position_embeddings=8192), "error", "max_position_embeddings 8,192 is less than factor x"),
    "not the length that was trained": (lambda f: edit(f / CONFIG, max_position_embeddings=131072), "error", "reaches 131,072 tokens, 65,536 were trained"),
    "another rope": (
        lambda f: edit(f / CONFIG, rope_theta=1e6, rope_scaling=None, rope_parameters=None),
        "error",
        "is not the one that was trained",
    ),
    "stale length of SGLang": (lambda f: edit(f / CONFIG, seq_length=8192), "error", "SGLang would take 8,192 tokens"),
    "stale key": (lambda f: edit(f / CONFIG, model_max_length=65536), "error", "model_max_length is there"),
    "spellings differ": (lambda f: edit(f / CONFIG, rope_theta=1e6), "error", "rope_theta is 1,000,000 and"),
    "only the new spelling": (lambda f: edit(f / CONFIG, "rope_scaling"), "warning", "transformers 4 takes no scaling"),
    "no architectures": (lambda f: edit(f / CONFIG, "architectures"), "error", "architectures is missing"),
    "no head_dim": (lambda f: edit(f / CONFIG, hidden_size=64, head_dim=None), "warning", "head_dim is missing"),
    "no dtype": (lambda f: edit(f / CONFIG, "dtype"), "warning", "dtype is missing"),
    "two dtypes": (lambda f: edit(f / CONFIG, dtype="float32"), "error", "torch_dtype is 'bfloat16' and dtype 'float32'"),
    "wrong dtype": (lambda f: edit(f / CONFIG, dtype="float16", torch_dtype="float16"), "warning", "the weights are bfloat16"),
    "remote code": (lambda f: edit(f / CONFIG, auto_map={"AutoModel": "x.Y"}), "warning", "auto_map asks"),
    "a window": (lambda f: edit(f / CONFIG, sliding_window=4096), "error", "sliding_window is 4096"),
    "quantised in name only": (lambda f: edit(f / CONFIG, quantization_config={"quant_method": "fp8"}), "error", "no tensor is quantised"),
    "max_length": (lambda f: edit(f / GENERATION, max_length=512), "warning", "max_length is 512"),
    "no EOS": (lambda f: edit(f / GENERATION, "eos_token_id"), "error", "no eos_token_id"),
    "EOS beyond": (lambda f: edit(f / GENERATION, eos_token_id=126), "error", "eos_token_id 126 is not in the vocabulary of 126"),
    "EOS lost": (lambda f: edit(f / CONFIG, eos_token_id=7), "warning", "eos_token_id lacks 7"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "error", "none here"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text(""), "error", "empty"),
    "huge tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 2 << 30), "error", "2,147,483,648 bytes, larger than any tokenizer"),
    "tokenizer in LFS": (lambda f: (f / "tokenizer.json").write_text("version https://git-lfs"), "error", "a Git LFS pointer"),
    "dtype is a list": (lambda f: edit(f / CONFIG, dtype=[]), "warning", "dtype is [], the weights are bfloat16"),
    "no tokenizer settings": (lambda f: (f / TOKENIZER).unlink(), "warning", "missing or empty"),
    "tokenizer length": (lambda f: edit(f / TOKENIZER, model_max_length=512), "warning", "model_max_length is 512, not 65,536"),
    "tokenizer code": (lambda f: edit(f / TOKENIZER, tokenizer_class="SkyworkTokenizer"), "error", "asks for Python code"),
    "two BOS": (
        lambda f: edit(f / TOKENIZER, add_bos_token=True, chat_template="{{ bos_token }}{{ messages }}"),
        "warning",
        "two",
    ),
    "index lacks one": (drop_tensor, "error", "does not place here"),
    "one too many": (add_tensor, "error", "vLLM stops at it"),
    "shape": (lambda f: edit(f / CONFIG, vocab_size=127), "error", "implies [127, 32]"),
    "a layer more": (lambda f: edit(f / CONFIG, num_hidden_layers=3), "error", "missing"),
    "cut": (lambda f: os.truncate(next(f.glob("model-00001-*")), 2000), "error", "shorter than its header says"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found(exported: Path, tmp_path: Path, name: str) -> None:
    break_it, level, words = DEFECTS[name]
    folder = copy_of(exported / "out", tmp_path)
    break_it(folder)
    report = check_folder(folder)
    matching = [finding for finding in report.findings if words in finding.what]
    assert matching, report.text()
    assert {finding.level for finding in matching} == {level}
    assert report.good == all(finding.level == "warning" for finding in report.findings)
    assert all(finding.describe() in report.text() for finding in report.findings)


QUANTISED = "model.layers.1.mlp.down_proj.weight"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_scale(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUANTISED + "_scale"][-1, 0] = value

    return change


SCALE_DEFECTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(QUANTISED + "_scale"), "missing: its weight is FP8"),
    "zero": (set_scale(0.0), "holds 0,"),
    "negative": (set_scale(-1.0), "holds -1,"),
    "NaN": (set_scale(float("nan")), "holds nan,"),
    "infinite": (set_scale(float("inf")), "holds inf,"),
    "bf16": (lambda t: t.update({QUANTISED + "_scale": t[QUANTISED + "_scale"].bfloat16()}), "bfloat16, expected float32"),
    "flat": (lambda t: t.update({QUANTISED + "_scale": t[QUANTISED + "_scale"][:, 0].contiguous()}), "shape [32], expected [32, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALE_DEFECTS)
def test_a_defect_of_a_scale_is_found(exported: Path, tmp_path: Path, name: str) -> None:
    change, words = SCALE_DEFECTS[name]
    folder = copy_of(exported / "fp8", tmp_path)
    rewrite(folder, change)
    (finding,) = check_folder(folder).findings
    assert (finding.level, finding.where) == ("error", QUANTISED + "_scale")
    assert words in finding.what


def test_quantised_weights_without_a_word_about_it_are_found(exported: Path, tmp_path: Path) -> None:
    folder = copy_of(exported / "fp8", tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    edit(folder / CONFIG, "quantization_config")
    assert any("no quantization_config" in finding.what for finding in check_folder(folder).findings)
    edit(folder / CONFIG, quantization_config={**config["quantization_config"], "ignore": []})
    assert any("ignore lacks lm_head" in finding.what for finding in check_folder(folder).findings)
    edit(folder / CONFIG, quantization_config={"quant_method": "awq"})
    assert any("'awq' is not known" in finding.what for finding in check_folder(folder).findings)


def modelopt_folder(exported: Path, tmp_path: Path, **quantization: Any) -> Path:
    """As modelopt's FP8_DEFAULT_CFG with an FP8 KV cache writes it: scalars, and a second file of settings."""
    folder = copy_of(exported / "fp8", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_scale")]:
            tensors[name] = tensors[name].amax().reshape(())
            tensors[name.replace("weight_scale", "input_scale")] = torch.tensor(0.5)
            for part in "kv":
                if f".{part}_proj." in name:
                    tensors[name.replace("weight_scale", f"{part}_scale")] = torch.tensor(1.0)

    rewrite(folder, change)
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    edit(folder / CONFIG, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme})
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", **quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return folder


def test_a_modelopt_folder_is_good_but_not_for_transformers(exported: Path, tmp_path: Path) -> None:
    report = check_folder(modelopt_folder(exported, tmp_path))
    assert report.good, report.text()
    (finding,) = report.findings
    assert "transformers loads a modelopt folder without its scales: silently wrong weights" in finding.what


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', config.json says 'FP8'"),
        ({"kv_cache_quant_algo": None}, "disagree on whether the KV cache is quantised"),
    ],
)
def test_the_two_files_of_a_modelopt_folder_must_agree(exported: Path, tmp_path: Path, quantization: Any, words: str) -> None:
    report = check_folder(modelopt_folder(exported, tmp_path, **quantization))
    assert not report.good
    assert words in report.text()


def test_a_missing_kv_scale_is_found(exported: Path, tmp_path: Path) -> None:
    folder = modelopt_folder(exported, tmp_path)
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.self_attn.v_proj.v_scale"))
    (finding,) = [finding for finding in check_folder(folder).findings if finding.level == "error"]
    assert finding.describe() == "error: model.layers.0.self_attn.v_proj.v_scale: missing: its weight is FP8"


def test_what_is_no_hugging_face_folder_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="use `convert export` first"):
        check_folder(exported / "megatron")
    with pytest.raises(CheckpointError, match="no such folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no such file"):
        check_folder(tmp_path)
