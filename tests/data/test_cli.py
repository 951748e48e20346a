"""`mcore-longctx data`: from a recipe to a folder, and words about it, without torch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

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
    out = str(tmp_path / "out")
    assert main(["data", "build", str(recipe), "--stage", "extend", "--out", out, "seed=3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"3 documents, [\d,]+ tokens in {out}/tokens \((gigatoken|tokenizers) .*\)", printed[0])
    assert "books: 7 samples of 256 tokens (6 needed; one more, because Megatron's own GPTDataset loses the last)" in printed
    assert printed[-1] == f"7 samples of 256 tokens, 1,792 tokens: {out}/books.bin .idx .runs"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 3
    assert main(["data", "build", str(recipe), "--stage", "extend", "--all", "--json", "--out", str(tmp_path / "all")]) == 0
    assert json.loads(capsys.readouterr().out)["pack"]["samples"] > 7
    assert main(["data", "build", str(recipe), "--stage", "instruct", "--out", str(tmp_path / "chats")]) == 0
    assert "chats: 1 sample of 128 tokens" in capsys.readouterr().out


def test_step_by_step_gives_what_build_gives(recipe: Path, built: Path, tmp_path: Path) -> None:
    folder, out = recipe.parent, str(tmp_path / "out")
    steps = [
        ["tokenize", out, "--tokenizer", f"{folder}/model", "--vocab-size", "512", "--workers", "2", f"books={folder}/books"],
        ["plan", out, "--seq-length", "256", "--tokens", "1792"],
        ["pack", out, "--name", "books"],
    ]
    for step in steps:
        assert main(["data", *step]) == 0
        assert main(["data", *step]) == 0  # again: nothing changes
    for name in ("books.bin", "books.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (built / name).read_bytes()


def test_a_dry_run_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = recipe.parent, tmp_path / "out"
    arguments = ["--tokenizer", f"{folder}/model", f"books={folder}/books", "--dry-run"]
    assert main(["data", "tokenize", str(out), *arguments]) == 0
    assert capsys.readouterr().out.startswith("3 files in 1 tasks, about ")
    assert main(["data", "tokenize", str(out), *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"][0]["name"] == "books"
    assert main(["data", "build", str(recipe), "--stage", "extend", "--dry-run", "--out", str(out)]) == 0
    assert "the stage needs 6 samples of 256 tokens: 1,536 tokens" in capsys.readouterr().out
    assert not out.exists()


def test_show_stats_verify_and_merge(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(built)]) == 0
    assert "sequences" in capsys.readouterr().out
    assert main(["data", "stats", str(built / "books.idx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"][0]["max"] == 256
    assert main(["data", "show", str(built), "--sample", "0"]) == 0
    first = (built.parents[2] / "books" / "0.txt").read_text()
    printed = capsys.readouterr().out
    assert "books / " in printed
    assert any(
        repr(text[:8])[1:-1] in printed
        for text in (first, *((built.parents[2] / "books" / f"{i}.txt").read_text() for i in (1, 2)))
    )
    assert main(["data", "show", str(built), "--sample", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 256
    assert main(["data", "verify", str(built)]) == 0
    shards, samples, compared = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{built}/tokens: 1 shards, [\d,]+ tokens: whole", shards)
    assert samples == f"{built}/books: whole; 7 sequences, 7 documents, 1,792 tokens (uint16)"
    assert compared.startswith("  compared: ")
    assert main(["data", "verify", str(built), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []
    assert main(["data", "merge", str(tmp_path / "all"), str(built / "books"), str(built / "books")]) == 0
    capsys.readouterr()
    assert main(["data", "verify", str(tmp_path / "all")]) == 0
    assert "14 sequences, 14 documents, 3,584 tokens" in capsys.readouterr().out


def test_verify_of_a_damaged_file_is_exit_code_1(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in built.glob("books.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "books.bin").read_bytes())
    raw[1000] ^= 4
    (tmp_path / "books.bin").write_bytes(raw)
    assert main(["data", "verify", str(tmp_path / "books"), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 1
    assert main(["data", "verify", str(tmp_path / "books")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "sample 1" in said or "sequence 1" in said


def test_verify_misses_the_index_of_finished_data(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    (out / "books.idx").unlink()
    assert main(["data", "verify", str(out)]) == 2
    printed = capsys.readouterr()
    assert "not packed" not in printed.out
    assert (
        printed.err
        == f"mcore-longctx: {out}/books.idx: no such file; give a folder or the path of .bin and .idx without suffix\n"
    )
    (out / "manifest.json").unlink()  # as while it is packed
    assert main(["data", "verify", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"{out}: not packed yet\n")


def test_verify_prints_json_of_damaged_shards_too(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    raw = bytearray((out / "tokens" / "000000.tokens").read_bytes())
    raw[0] ^= 1
    (out / "tokens" / "000000.tokens").write_bytes(raw)
    for packed in (True, False):
        assert main(["data", "verify", str(out), "--json"]) == 1
        printed = capsys.readouterr()
        facts = json.loads(printed.out)
        assert facts["tokens_folder"]["fault_count"] == 2  # against its table, and against the manifest
        assert "000000.tokens: its checksum differs" in facts["tokens_folder"]["faults"][0]
        assert facts.get("faults") == ([] if packed else None)
        assert "000000.tokens: its checksum differs" in printed.err
        for path in (out / "manifest.json", *out.glob("books.*")):
            path.unlink(missing_ok=True)


def test_pack_prints_json(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "pack", str(built), "--name", "books", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["was_done"]) == (7, True)
    assert facts["folder"] == str(built)


def test_pack_leaves_a_folder_that_is_not_ours_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    assert main(["data", "pack", str(tmp_path)]) == 2
    assert "nothing was tokenized here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


class Bar:
    """What is told to a bar of tqdm."""

    made: ClassVar[list["Bar"]] = []
    format_dict: ClassVar[dict[str, float]] = {"elapsed": 1.0}

    def __init__(self, desc: str, total: int | None, unit: str, **_: bool) -> None:
        self.desc, self.total, self.unit, self.sum = desc, total, unit, 0
        self.made.append(self)

    def update(self, count: int) -> None:
        self.sum += count

    def set_postfix_str(self, text: str, **_: bool) -> None:
        assert text.endswith("Mtok/s")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("verb", ["build", "tokenize"])
def test_the_bar_ends_at_its_total_from_the_start_and_on_a_restart(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Sources that are folders count, and what was done before does not."""
    folder, out = recipe.parent, tmp_path / "out"
    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True, write=lambda text: None, flush=lambda: None))
    monkeypatch.setattr("mcore_longctx.data.tokens.job.RANGE_BYTES", 1000)  # a task for each file
    command = ["data", "build", str(recipe), "--stage", "extend", "--out", str(out)]
    if verb == "tokenize":
        command = ["data", "tokenize", str(out), "--tokenizer", f"{folder}/model", "--range", "1000", f"books={folder}/books"]
    sizes = [(folder / "books" / f"{i}.txt").stat().st_size for i in range(3)]
    for expected in (sum(sizes), sizes[2]):
        Bar.made.clear()
        assert main(command) == 0
        bar = Bar.made[0]
        assert (bar.desc, bar.unit, bar.total, bar.sum) == ("tokenize", "B", expected, expected)
        (out / "tokens" / "000002.docs").unlink()
        (out / "tokens" / "manifest.json").unlink()


def chats(folder: Path, out: Path) -> list[str]:
    assert main(["data", "tokenize", str(out), "--tokenizer", f"{folder}/model", "--chats", f"c={folder}/chats.jsonl"]) == 0
    return ["data", "plan", str(out), "--seq-length", "128"]


@pytest.mark.parametrize(
    "option",
    [
        ["--mode", "fu"],
        ["--share", "c=1"],
        ["--chunks", "c=64"],
        ["--short-below", "5"],
        ["--keep", "0.5"],
        ["--long-above", "100000"],
        ["--repeat", "2"],
        ["--min-length", "3"],
        ["--max-length", "70"],
        ["--tokens", "1B"],
        ["--repeat-to-fill"],
        ["--separator", "x"],
        ["--separator-kind", "none"],
        ["--no-separator-loss"],
        ["--packing", "intact"],
    ],
    ids=lambda option: option[0],
)
def test_an_option_that_means_nothing_for_chats_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    command = chats(recipe.parent, tmp_path / "out")
    capsys.readouterr()
    assert main([*command, *option]) == 2
    said = capsys.readouterr().err
    assert said == f"mcore-longctx: {option[0]} has no meaning for chats, which are taken whole; remove it\n"
    assert not (tmp_path / "out" / "plan").exists()
    assert main([*command, "--seed", "5"]) == 0


def test_chats_are_not_encoded_again(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = recipe.parent, str(tmp_path / "out")
    for command in (
        ["tokenize", out, "--tokenizer", f"{folder}/model", "--chats", f"c={folder}/chats.jsonl"],
        ["build", str(recipe), "--stage", "instruct", "--out", out],
    ):
        assert main(["data", *command, "--verify-fraction", "0.5"]) == 2
        assert "--verify-fraction has no meaning for chats; remove it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SLURM = ["--engine", "slurm", "--ranks", "2", "--partition", "cpu", "--time", "1"]
BAD = [
    (["build", "{recipe}", "--stage", "extent"], "no stage 'extent'; there are extend, instruct"),
    (["build", "{recipe}", "--stage", "extend", "stages.extend.seq_length=100k"], "102,400 tokens, but the rope reaches 4,096"),
    (
        ["build", "{recipe}", "--stage", "extend", "data.books.sources.books.path=nowhere", "--out", "{folder}/new"],
        "nowhere: no such file or folder",
    ),
    (["build", "{recipe}", "--stage", "extend", "data.books.mode=longest"], "data.books.mode"),
    (["stats", "{folder}"], "0 .idx files in this folder, expected one; give a prefix"),
    (["stats", "{folder}/x"], "x.idx: no such file; give the path of .bin and .idx without suffix"),
    (["show", "{built}", "--sample", "7"], "7"),
    (["verify", "{folder}"], "0 .idx files in this folder"),
    (["tokenize", "{folder}/t", "books", "--tokenizer", "{folder}/model"], "'books' is not NAME=PATH"),
    (["tokenize", "{folder}/t", "--tokenizer", "{folder}/model"], "sources is empty"),
    (["tokenize", "{folder}/t", "--tokenizer", "{folder}/books", "b={folder}/books"], "tokenizer.json"),
    (
        ["tokenize", "{folder}/t", "--tokenizer", "{folder}/model", "b={folder}/books", "--folders", "c"],
        "--folders c: no such source",
    ),
    (
        ["tokenize", "{folder}/t", "--tokenizer", "{folder}/model", "b={folder}/books", "--range", "x"],
        "--range: 'x' is not a token count",
    ),
    (
        ["tokenize", "{folder}/t", "--tokenizer", "{folder}/model", "b={folder}/books", "--workers", "0"],
        "--workers 0: expected 1 or more",
    ),
    (["tokenize", "{folder}/books", "--tokenizer", "{folder}/model", "b={folder}/books"], "the folder is not empty"),
    (["plan", "{folder}/t", "--seq-length", "4k"], "nothing was tokenized here; run `data tokenize` first"),
    (
        ["plan", "{built}", "--seq-length", "4k", "--share", "films=1"],
        "--share films=1: expected NAME=VALUE of a source; sources: books",
    ),
    (["plan", "{built}", "--seq-length", "4k", "--share", "books=x"], "--share books: 'x' is not a number"),
    (["plan", "{built}", "--seq-length", "4k", "--keep", "2"], "keep_probability is 2.0, expected 0 to 1"),
    (
        ["plan", "{built}", "--seq-length", "4k", "--separator-kind", "token", "--separator", "<x>"],
        "'<x>' is no token of its own",
    ),
    (["pack", "{folder}/nothing"], "no such folder"),
    (["merge", "{folder}/m", "{folder}/x"], "x.idx: no such file"),
    (["plan", "{built}", "--seq-length", "0"], "seq_length is 0, expected 1 to 2,147,483,647"),
    (["plan", "{built}", "--seq-length", "2G"], "seq_length is 2,147,483,648, expected 1 to 2,147,483,647"),
    (["plan", "{built}", "--seq-length", "512"], "holds packed data 'books', made by a plan with other settings"),
    *((["plan", "{built}", "--seq-length", "4k", "--share", f"books={x}"], "positive share") for x in ("nan", "inf", "0", "-1")),
    *((["plan", "{built}", "--seq-length", "4k", "--repeat", x], "repetition is") for x in ("nan", "inf", "1e10", "3e9", "0.5")),
    (["plan", "{built}", "--seq-length", "4k", "--share", "books=1", "--share", "books=2"], "--share books is given twice"),
    (
        ["plan", "{built}", "--seq-length", "4k", "--mode", "prolong", "--chunks", "books=64", "--chunks", "books=64"],
        "two chunks have the same length",
    ),
    (
        ["plan", "{built}", "--seq-length", "4k", "--separator-kind", "none", "--separator", "x"],
        "--separator has no meaning with --separator-kind none; remove it",
    ),
    (
        ["plan", "{built}", "--seq-length", "4k", "--separator-kind", "bos_eos", "--separator", "<s>"],
        "--separator has no meaning with --separator-kind bos_eos; remove it",
    ),
    (["plan", "{built}", "--seq-length", "4k", "--separator", ""], "--separator is empty; say --separator-kind none"),
    (
        ["tokenize", "{folder}/t", "--tokenizer", "{folder}/model", "b={folder}/books", "--max-bad", "-1"],
        "--max-bad -1: expected 0 or more",
    ),
    *(
        (
            ["tokenize", "{folder}/t", "--tokenizer", "{folder}/model", f"{name}={{folder}}/books"],
            "cannot be the name of a source",
        )
        for name in ("b\udcff", "b\n", " \t")
    ),
    *(
        (
            ["tokenize", "{folder}/t", "--tokenizer", "{folder}/model", "b={folder}/books", "--verify-fraction", x],
            "expected 0 to 1",
        )
        for x in ("nan", "inf", "-0.1", "1.5")
    ),
    (["build", "{recipe}", "--stage", "extend", "--verify-fraction", "2"], "--verify-fraction 2.0: expected 0 to 1"),
    *(
        (["build", "{recipe}", "--stage", "extend", *SLURM, *options], message)
        for options, message in (
            (["--sbatch", "cpus-per-task=abc"], "--sbatch cpus-per-task=abc: expected a whole number, 1 or more"),
            (["--sbatch", "cpus-per-task"], "--sbatch cpus-per-task=: expected a whole number, 1 or more"),
            (["--finish-sbatch=--cpus-per-task=0"], "--finish-sbatch cpus-per-task=0: expected a whole number, 1 or more"),
            (["--sbatch", "=x"], "--sbatch '=x': expected KEY=VALUE, or KEY for a flag"),
            (["--sbatch", ""], "--sbatch '': expected KEY=VALUE, or KEY for a flag"),
            (["--sbatch", "a b=x"], "--sbatch 'a b=x': expected KEY=VALUE, or KEY for a flag"),
            (["--sbatch", "comment=a\nb"], "expected KEY=VALUE, or KEY for a flag"),
            (["--cpus-per-task", "0"], "--cpus-per-task 0: expected 1 or more"),
            (["--mem-per-cpu", "-1"], "--mem-per-cpu -1: expected 1 or more"),
        )
    ),
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


def test_an_output_that_cannot_be_made_is_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("years of work")
    out = str(tmp_path / "file" / "out")
    common = ["--tokenizer", str(recipe.parent / "model"), f"books={recipe.parent / 'books'}"]
    for arguments in (["tokenize", out, *common], ["build", str(recipe), "--stage", "extend", "--out", out]):
        assert main(["data", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "cannot be written (Not a directory); choose another output folder" in said
    assert (tmp_path / "file").read_text() == "years of work"
