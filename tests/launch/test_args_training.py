"""The flags that `args` prints, trained with on CPU: the losses are those of `mcore-longctx train` of the same recipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.launch.args import as_arrays, as_line, our_command, stock_command
from tests.launch.args_recipes import run_of
from tests.megatron_lm.program import EXAMPLES, TINY, losses, needs_program, run
from tests.megatron_lm.test_training import megatrons_own_model
from tests.multiproc import run_processes

pytestmark = [needs_program, pytest.mark.multiproc]

STEPS = {"extend": 6, "instruct": 4}
STAGES = [
    *("stages.extend.seq_length=512", "stages.extend.train_iters=6", "stages.extend.global_batch_size=2"),
    *("stages.extend.optimizer.lr_warmup_iters=2", "stages.extend.save_interval=3", "stages.extend.activations.mlp_tile=100"),
    *("stages.extend.activations.loss_chunk=100", "stages.instruct.seq_length=256", "stages.instruct.train_iters=4"),
    *("stages.instruct.activations.mlp_tile=null", "stages.instruct.optimizer.weight_decay=0.3"),
]
TOLERANCE = 1e-5  # Megatron-LM logs seven digits


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of tiny-cpu, with its checkpoint and its data built in a run folder of their own."""
    folder = tmp_path_factory.mktemp("args")
    documents = EXAMPLES / "documents"
    overrides = [
        *(f"model.path={TINY}", f"output={folder}", "cluster.gpu=none"),
        *(f"data.long-documents.sources.{name}.path={documents / path}" for name, path in
          {"books": "books", "dictionary": "dictionary.jsonl", "practice": "practice.jsonl"}.items()),
        f"data.chats.sources.chats.path={documents / 'chat.jsonl'}",
        *(f"stages.{stage}.distributed_timeout_minutes=3" for stage in STEPS),
        *STAGES,
    ]  # fmt: skip
    assert main(["convert", "import", str(TINY), str(folder / "checkpoints" / "base"), "--checksum"]) == 0
    for stage in STEPS:
        assert main(["data", "build", "tiny-cpu", *overrides, "--stage", stage, "--out", str(folder / "data" / stage)]) == 0
    # as the comment of what is printed says
    shell = [text.removeprefix("#   ") for text in as_arrays(our_command(run_of("tiny-cpu", "extend", *overrides))).splitlines()]
    prepare = "\n".join(text for text in shell if text.startswith(("mkdir ", "echo ")))
    assert prepare.count("\n") == 1
    subprocess.run(["bash", "-euc", prepare], check=True, timeout=30)
    return overrides


def _train(argv: list[str]) -> int:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    return main(argv)


@pytest.fixture(scope="module")
def wanted(recipe: list[str]) -> dict[str, dict[int, float]]:
    """Losses of `mcore-longctx train`, stage after stage, on two processes."""
    found = {}
    for stage, steps in STEPS.items():
        assert run_processes(_train, 2, ["train", "tiny-cpu", *recipe, "--stage", stage], init=False) == [0, 0]
        file = run_of("tiny-cpu", stage, *recipe).folder / "metrics" / f"{stage}.jsonl"
        rows = [json.loads(text) for text in file.read_text().splitlines()]
        found[stage] = {row["step"]: row["loss"] for row in rows if "loss" in row}
        assert len(found[stage]) == steps
    return found


def flags_of(line: str, program: str) -> list[str]:
    words = shlex.split(line)
    return words[words.index(program) + 1 :]


def printed_by_ours(recipe: list[str], stage: str, *overrides: str) -> list[str]:
    return flags_of(as_line(our_command(run_of("tiny-cpu", stage, *recipe, *overrides))), "mcore_longctx.megatron_lm")


def same(found: dict[int, float], wanted: dict[int, float], tolerance: float = TOLERANCE) -> bool:
    """All steps but the second, for which Megatron-LM logs the mean of the first two."""
    assert len(found) > 2
    assert found.keys() == wanted.keys() - {2}
    return max(abs(found[step] - wanted[step]) for step in found) <= tolerance


def test_two_stages_in_our_program_have_the_losses_of_train(recipe: list[str], wanted: dict[str, dict[int, float]]) -> None:
    for stage in STEPS:  # instruct goes on from the checkpoint that extend has left, and learns answers only
        assert same(losses(run(printed_by_ours(recipe, stage), 2)), wanted[stage])


@pytest.mark.parametrize("layout", ["{tensor_model_parallel_size: 2, sequence_parallel: true}", "{data_parallel_size: 2}"])
def test_another_layout_has_the_same_losses(
    recipe: list[str], wanted: dict[str, dict[int, float]], tmp_path: Path, layout: str
) -> None:
    words = printed_by_ours(recipe, "extend", f"stages.extend.parallel={layout}")
    words = [str(tmp_path / Path(word).name) if word.endswith(("/checkpoints", "/tensorboard")) else word for word in words]
    assert same(losses(run(words, 2)), wanted["extend"])


def test_saves_beside_the_training_need_cuda_and_are_refused_here(recipe: list[str]) -> None:
    """megatron-core 0.19 makes them in a process that divides by the number of GPUs; the ranks would wait for it for ever."""
    words = printed_by_ours(recipe, "extend", "cluster.gpu=h100", "stages.extend.async_save=true")
    assert {"--async-save", "--use-persistent-ckpt-worker"} <= set(words)
    (code, printed), (other, _) = run_processes(_main, 2, words, init=False)
    assert (code, other) == (2, 2)
    assert "--async-save: megatron-core writes in a process of its own that needs CUDA; leave it out" in printed


def _main(words: list[str]) -> tuple[int, str]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from mcore_longctx.megatron_lm.launcher import main as launch

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return launch(words), said.getvalue()


PLAIN = "{type: none, max_position_embeddings: 4096}"
YARN = "{type: yarn, factor: 8, original_max_position_embeddings: 512, attention_factor: 1.1}"


@pytest.mark.parametrize("rope", [PLAIN, YARN], ids=["none", "yarn"])
def test_stock_flags_train_the_same_model_on_the_same_samples(recipe: list[str], tmp_path: Path, rope: str) -> None:
    """Megatron's own layers, rope and loss as the stock flags ask for them, with our samples in place of GPTDataset's order.

    On this machine without TransformerEngine: its local layers, one process.
    """
    overrides = [*recipe, f"rope={rope}", f"output={tmp_path}", "cluster.gpu=h100", "stages.extend.parallel={}"]
    overrides.append("stages.extend.activations={recompute: none, mlp_tile: null}")
    for folder in ("checkpoints", "data", "megatron-lm"):
        (tmp_path / folder).mkdir()
    built = run_of("tiny-cpu", "extend", *recipe).folder
    (tmp_path / "checkpoints" / "base").symlink_to(built / "checkpoints" / "base")
    (tmp_path / "data" / "extend").symlink_to(built / "data" / "extend")
    (tmp_path / "megatron-lm" / "extend").mkdir()
    (tmp_path / "megatron-lm" / "extend" / "start").symlink_to(built / "megatron-lm" / "extend" / "start")
    assert run_processes(_train, 1, ["train", "tiny-cpu", *overrides, "--stage", "extend"], init=False) == [0]
    rows = [json.loads(text) for text in (tmp_path / "metrics" / "extend.jsonl").read_text().splitlines()]
    trained = {row["step"]: row["loss"] for row in rows if "loss" in row}

    stage = run_of("tiny-cpu", "extend", *overrides)
    made = stock_command(stage)
    samples = [word for one in our_command(stage).flags if one.name == "--longctx-data" for word in (one.name, *one.values)]
    words = [word for name, array in made.arrays if name not in ("DISTRIBUTED_ARGS", "DATA_ARGS") for one in array
             for word in (one.name, *one.values)]  # fmt: skip
    tokenizer = [
        word for one in made.flags if one.name.startswith(("--tokenizer", "--padded")) for word in (one.name, *one.values)
    ]
    here = ["--transformer-impl", "local"]
    found = losses(run([*words, *samples, *tokenizer, *here], before=megatrons_own_model))
    assert found[1] == pytest.approx(trained[1], abs=TOLERANCE)
    assert same(found, trained, tolerance=1e-4)  # Adam makes more of the roundings of other kernels with each step
