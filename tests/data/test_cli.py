"""`mcore-longctx data`: from a recipe to a folder, and words about it, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from tests.data.conftest import make_tokenizer, words

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
RECIPE = """
name: small
model: {{path: {folder}/model}}
rope: {{type: llama3, factor: 8, original_max_position_embeddings: 512}}
data:
  books: {{sources: [{{name: books, path: {folder}/books}}]}}
  chats: {{sources: [{{name: chats, path: {folder}/chats.jsonl}}]}}
stages:
  - {{name: extend, kind: pretrain, data: books, seq_length: 256, train_iters: 3, global_batch_size: 2, optimizer: {{lr: 1.0e-4}}}}
  - {{name: instruct, kind: sft, data: chats, seq_length: 128, train_iters: 3, global_batch_size: 2, optimizer: {{lr: 1.0e-4}}}}
output: {folder}/run
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    make_tokenizer(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "books").mkdir()
    for i in range(3):
        (folder / "books" / f"{i}.txt").write_text(words(i, 500))
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (folder / "chats.jsonl").write_text(json.dumps({"id": "c0", "messages": turn}) + "\n")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return path


@pytest.fixture(scope="module")
def built(recipe: Path) -> Path:
    assert main(["data", "build", str(recipe), "--stage", "extend"]) == 0
    return recipe.parent / "run" / "data" / "extend"


def test_build_takes_one_stage_of_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", str(recipe), "--stage", "extend", "--out", str(tmp_path / "out"), "seed=3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "books: 7 samples of 256 tokens (6 needed; one more, because Megatron's own GPTDataset loses the last)"
    )
    assert printed.endswith(f"written: {tmp_path}/out\n")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 3
    assert main(["data", "build", str(recipe), "--stage", "extend", "--all", "--out", str(tmp_path / "all")]) == 0
    assert int(capsys.readouterr().out.split()[1]) > 7
    assert main(["data", "build", str(recipe), "--stage", "instruct", "--out", str(tmp_path / "chats")]) == 0
    assert "chats: 1 sample of 128 tokens" in capsys.readouterr().out


def test_inspect_says_what_is_there(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(built)]) == 0
    assert "7 sequences in 7 documents, 1,792 tokens (uint16)" in capsys.readouterr().out
    assert main(["data", "inspect", str(built / "books.idx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["longest_sequence"] == 256
    assert main(["data", "inspect", str(built / "books"), "--sample", "0"]) == 0
    assert "learned  books  " in capsys.readouterr().out
    assert main(["data", "inspect", str(built), "--sample", "0", "--json"]) == 0
    assert sum(run["length"] for run in json.loads(capsys.readouterr().out)) == 256


def test_verify_says_whole(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(built)]) == 0
    assert capsys.readouterr().out == f"{built}: 7 samples of 256 tokens, 1,792 tokens: whole\n"
    assert main(["data", "verify", str(built), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "books"


BAD = [
    (["build", "{recipe}", "--stage", "extent"], "no stage 'extent'; there are extend, instruct"),
    (["build", "{recipe}", "--stage", "extend", "stages.extend.seq_length=100k"], "102,400 tokens, but the rope reaches 4,096"),
    (
        ["build", "{recipe}", "--stage", "extend", "data.books.sources.books.path=nowhere", "--out", "{folder}/new"],
        "nowhere: no such file or folder",
    ),
    (["inspect", "{folder}"], "0 .idx files in this folder, expected one; give a prefix"),
    (["inspect", "{folder}/x"], "x.idx: no such file; give the path of .bin and .idx without suffix"),
    (["inspect", "{built}", "--sample", "7"], "no sample 7, there are 7"),
    (["verify", "{folder}"], "no manifest.json: this data was not finished, or not written by mcore-longctx"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    recipe: Path, built: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    capsys.readouterr()
    places = {"recipe": recipe, "built": built, "folder": recipe.parent}
    assert main(["data", *(argument.format(**places) for argument in arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_no_verb_of_data_imports_torch(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mcore_longctx.cli.main import main\n"
        f"assert main(['data', 'build', {str(recipe)!r}, '--stage', 'extend', '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        f"assert main(['data', 'verify', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'megatron', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_reading_samples_needs_numpy_only() -> None:
    code = "import sys, mcore_longctx.data; assert not {'torch', 'tokenizers', 'jinja2', 'matplotlib', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
