"""Megatron-LM's program with our parts, against the same program with Megatron's own layers, rotary embedding and loss."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mcore_longctx.data import IndexedWriter
from tests.megatron_lm.program import MODEL, PLAIN_ROPE, SEQ_LENGTH, TINY, TRAINING, losses, needs_program, run

pytestmark = [needs_program, pytest.mark.multiproc]

STEPS = 5
END = 261  # what NullTokenizer takes for the end of a document: the last of 262
LLAMA3 = [*PLAIN_ROPE, "--use-rope-scaling"]
YARN = [
    *("--position-embedding-type", "yarn", "--rotary-base", "10000", "--rotary-scaling-factor", "4", "--yarn-beta-fast", "8"),
    *("--yarn-original-max-position-embeddings", "64", "--yarn-correction-range-round-to-int"),
]
STRETCHED = [*PLAIN_ROPE, "--rotary-seq-len-interpolation-factor", "2"]


def command(data: list[str], *flags: str, rope: list[str] = PLAIN_ROPE, steps: int = STEPS) -> list[str]:
    return [*MODEL, *TRAINING, *data, *rope, "--train-iters", str(steps), *flags]


@pytest.fixture(scope="module")
def one_process(data: list[str]) -> dict[int, float]:
    return losses(run(command(data)))


def megatrons_own_model() -> None:
    """The oracle: the model as pretrain_gpt.py asks for it, nothing of ours in it."""
    from mcore_longctx.megatron_lm import model

    def stock_config(args: Any, rope: Any) -> Any:
        from megatron.training.argument_utils import gpt_config_from_args

        config = gpt_config_from_args(args)
        assert config.transformer_layer_spec is None
        assert not config.pre_wrap_hooks
        return config

    model.model_config = stock_config


def same(found: dict[int, float], wanted: dict[int, float], tolerance: float = 1e-5) -> bool:
    assert found.keys() == wanted.keys()
    assert len(found) > 1
    return max(abs(found[step] - wanted[step]) for step in wanted) <= tolerance


@pytest.mark.parametrize("rope", [PLAIN_ROPE, LLAMA3, YARN, STRETCHED], ids=["plain", "llama3", "yarn", "stretched"])
def test_losses_are_those_of_megatrons_own_layers_and_rope(data: list[str], rope: list[str]) -> None:
    ours = losses(run(command(data, rope=rope, steps=3)))
    stock = losses(run(command(data, rope=rope, steps=3), before=megatrons_own_model))
    assert same(ours, stock)


@pytest.mark.parametrize("flags", [["--qk-layernorm"], ["--add-qkv-bias"], ["biases"]], ids=lambda flags: flags[0].strip("-"))
def test_biases_and_norms_of_heads_are_trained_as_megatrons_own_layers_train_them(flags: list[str]) -> None:
    line = command(["--mock-data"], *(flags if flags != ["biases"] else []), steps=4)
    if flags == ["biases"]:
        line.remove("--disable-bias-linear")
    ours = losses(run([*line, "--longctx-recompute", "attention_kept", "--longctx-mlp-tile", "48"]))
    assert same(ours, losses(run(line, before=megatrons_own_model)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_loss_is_that_of_transformers(data: list[str], tmp_path: Path, ranks: int) -> None:
    # every sample is this row, wherever GPTDataset starts to count; its first half has nearly all tokens without loss
    row = np.random.default_rng(3).integers(0, 256, SEQ_LENGTH)
    row[8:56:2] = row[100] = END
    with IndexedWriter(tmp_path / "rows", "uint16") as writer:
        for _ in range(40):
            writer.add(row.astype(np.uint16))
    start = data[data.index("--load") :]
    samples = ["--data-path", str(tmp_path / "rows"), "--split", "100,0,0", "--data-cache-path", str(tmp_path / "cache")]
    flags = ["--eod-mask-loss", "--context-parallel-size", str(ranks)]
    found = losses(run(command([*samples, *start], *flags, steps=1), ranks))
    model = LlamaForCausalLM.from_pretrained(TINY)
    with torch.no_grad():
        logits = model(torch.from_numpy(row).unsqueeze(0)).logits[0]
    logits = F.pad(logits, (0, 384 - 262))  # rows of zeros fill the vocabulary up, and Megatron's softmax is over all of them
    wanted = F.cross_entropy(logits, torch.from_numpy(np.roll(row, -1)), reduction="none")[torch.from_numpy(row != END)].mean()
    assert found[1] == pytest.approx(wanted.item(), abs=1e-5)


def test_initial_weights_do_not_depend_on_the_context_parallel_size() -> None:
    mock = ["--mock-data", "--eval-iters", "0"]
    one = losses(run(command(mock, steps=1)))
    assert one[1] > 5.0
    assert losses(run(command(mock, "--context-parallel-size", "2", steps=1), ranks=2))[1] == pytest.approx(one[1], abs=1e-5)


def test_training_learns_from_the_weights_it_was_given(one_process: dict[int, float]) -> None:
    assert list(one_process) == [1, 3, 4, 5]
    assert one_process[1] < 2.0  # random weights: ln 262 = 5.6
    assert one_process[5] != one_process[1]


def test_a_small_chunk_of_the_loss_changes_nothing_but_memory(data: list[str], one_process: dict[int, float]) -> None:
    printed = run(command(data, "--longctx-loss-chunk", "50", steps=3))
    assert "at most 50 rows of 384 logits at a time" in printed
    assert same(losses(printed), {step: one_process[step] for step in (1, 3)})


def count_attentions() -> None:
    """At the end of the run, say how often a layer has computed attention."""
    from megatron.training import training

    from mcore_longctx.model import LongContextAttention

    pretrain = training.pretrain

    def then_print(*args: Any, **kwargs: Any) -> None:
        pretrain(*args, **kwargs)
        calls = [one.forward_calls for one in gc.get_objects() if isinstance(one, LongContextAttention)]
        print("attentions", *calls)  # noqa: T201

    training.pretrain = then_print


@pytest.mark.parametrize(("policy", "calls"), [("full", 2), ("attention_kept", 1)])
def test_recompute_and_tiles_change_memory_and_no_loss(
    data: list[str], one_process: dict[int, float], policy: str, calls: int
) -> None:
    flags = ["--longctx-recompute", policy, "--longctx-mlp-tile", "48", "--context-parallel-size", "2"]
    printed = run(command(data, *flags, steps=3), ranks=2, before=count_attentions)
    assert same(losses(printed), {step: one_process[step] for step in (1, 3)})
    # 3 steps of 2 micro-batches, forward and perhaps once more in the backward pass
    assert printed.count(f"attentions {' '.join([str(3 * 2 * calls)] * 4)}") == 2


@pytest.mark.parametrize("how", ["p2p", "all_gather", "a2a"])
def test_two_context_parallel_ranks_have_the_losses_of_one_process(
    data: list[str], one_process: dict[int, float], how: str
) -> None:
    printed = run(command(data, "--context-parallel-size", "2", "--cp-comm-type", how), ranks=2)
    assert f"long-context attention: {how} over 2 ranks" in printed
    assert same(losses(printed), one_process)


def test_tensor_and_pipeline_parallel_ranks_have_the_losses_of_one_process(
    data: list[str], one_process: dict[int, float]
) -> None:
    assert same(losses(run(command(data, "--pipeline-model-parallel-size", "2"), ranks=2)), one_process)
    # 384 rows of vocabulary on one rank and on two: the padding takes part in Megatron's softmax
    split = command(data, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--make-vocab-size-divisible-by", "192")
    assert same(losses(run(split, ranks=2)), one_process)


def stopped_at(step: int, saved: Path) -> list[str]:
    """Flags that go on from a checkpoint of `saved`, as if the run had ended there."""
    folder = saved.with_name(f"{saved.name}-stopped")
    folder.mkdir()
    shutil.copytree(saved / f"iter_{step:07d}", folder / f"iter_{step:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    return ["--load", str(folder)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_has_the_losses_of_one_that_never_stopped(
    data: list[str], one_process: dict[int, float], tmp_path: Path, ranks: int
) -> None:
    sharding = ["--dist-ckpt-optim-fully-reshardable"] * (ranks - 1)
    printed = run(command(data, "--save", str(tmp_path / "run"), "--save-interval", "2", *sharding))
    assert same(losses(printed), one_process, tolerance=0)
    samples = data[: data.index("--load")]
    layout = ["--context-parallel-size", str(ranks)]
    resumed = run(command(samples, *stopped_at(2, tmp_path / "run"), *layout, *sharding), ranks)
    assert same(losses(resumed), {step: one_process[step] for step in (3, 5)})  # 4 is the second one after the start


def test_a_resumed_run_without_the_distributed_optimizer(data: list[str], one_process: dict[int, float], tmp_path: Path) -> None:
    def plain(data: list[str], *flags: str) -> str:
        return run([text for text in command(data, *flags) if text != "--use-distributed-optimizer"])

    plain(data, "--save", str(tmp_path / "run"), "--save-interval", "2")
    resumed = plain(data[: data.index("--load")], *stopped_at(2, tmp_path / "run"))
    assert same(losses(resumed), {step: one_process[step] for step in (3, 5)})


def test_bf16_trains_with_losses_near_those_of_fp32(data: list[str], one_process: dict[int, float]) -> None:
    assert same(losses(run(command(data, "--bf16"))), one_process, tolerance=5e-3)


def show_the_frequencies() -> None:
    from mcore_longctx.megatron_lm import model

    install = model._Surgery.__call__

    def also_print(self: Any, stages: list[Any]) -> list[Any]:
        changed = install(self, stages)
        print("frequencies", *changed[0].rotary_pos_emb.inv_freq.tolist())  # noqa: T201
        return changed

    model._Surgery.__call__ = also_print  # type: ignore[method-assign]


def test_the_factor_of_the_rope_scaling_reaches_the_model(data: list[str]) -> None:
    flags = command(data, "--rope-scaling-factor", "512", rope=LLAMA3, steps=1)
    printed = run(flags, before=show_the_frequencies)
    found = next(line.split()[1:] for line in printed.splitlines() if line.startswith("frequencies"))
    settings = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 512.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    config = LlamaConfig(head_dim=32, hidden_size=128, num_attention_heads=4, rope_parameters=settings)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    np.testing.assert_array_equal(np.array(found, np.float32), wanted.numpy())


def test_the_rope_of_a_hugging_face_folder_is_trained_with(data: list[str], one_process: dict[int, float]) -> None:
    printed = run(command(data, rope=["--longctx-rope", str(TINY)]))
    assert "rope: none: no scaling, base 10,000" in printed
    assert same(losses(printed), one_process, tolerance=0)


@pytest.mark.parametrize(
    "spec",
    [
        ["mcore_longctx.model.spec", "llama"],
        ["mcore_longctx.model.spec", "llama_block"],
        ["tests.megatron_lm.specs", "layer_function"],
    ],
    ids=["ready spec", "function for a block", "function of the user's for a layer"],
)
def test_every_form_of_spec_that_megatron_takes_trains_alike(
    data: list[str], one_process: dict[int, float], spec: list[str]
) -> None:
    printed = run(command(data, "--spec", *spec, steps=3))
    assert "long-context attention: p2p over 1 ranks" in printed
    assert same(losses(printed), {step: one_process[step] for step in (1, 3)}, tolerance=0)
