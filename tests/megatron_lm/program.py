"""Runs of Megatron-LM's training program in forked processes, on our own data and the tiny model's weights."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.megatron_compat import MEGATRON_VERSION
from tests.multiproc import run_processes

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny-llama"
HAS_PROGRAM = tuple(int(part) for part in MEGATRON_VERSION.split(".")[:2]) >= (0, 19)
needs_program = pytest.mark.skipif(not HAS_PROGRAM, reason="megatron-core has the training program since 0.19")

SEQ_LENGTH = 128
# the tiny model's sizes, and what every run has in common
MODEL = [
    *("--num-layers", "4", "--hidden-size", "128", "--ffn-hidden-size", "352", "--num-attention-heads", "4"),
    *("--group-query-attention", "--num-query-groups", "2", "--kv-channels", "32", "--normalization", "RMSNorm"),
    *("--norm-epsilon", "1e-5", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--seq-length", str(SEQ_LENGTH), "--max-position-embeddings", str(SEQ_LENGTH)),
]
PLAIN_ROPE = ["--position-embedding-type", "rope", "--rotary-base", "10000"]
TRAINING = [
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-3", "--min-lr", "1e-3", "--lr-decay-style", "constant"),
    *("--clip-grad", "1.0", "--seed", "1234", "--eval-iters", "0", "--eval-interval", "1000", "--log-interval", "1"),
    *("--calculate-per-token-loss", "--use-distributed-optimizer", "--tokenizer-type", "NullTokenizer", "--vocab-size", "262"),
    *("--distributed-timeout-minutes", "3"),
]


def losses(printed: str) -> dict[int, float]:
    """Logged losses by iteration, without the second one of a run: Megatron-LM logs the mean of the first two there."""
    found = re.findall(r"iteration +(\d+)/ .*lm loss: (\S+) ", printed)
    return {int(step): float(loss) for n, (step, loss) in enumerate(found) if n != 1}


def run(argv: Sequence[str], ranks: int = 1, *, before: Any = None) -> str:
    """What the program prints; `before` is called in each rank before it. A run that does not end well is an AssertionError."""
    results = run_processes(_rank, ranks, list(argv), before, init=False, timeout=240)
    printed = "".join(text for _, text in results)
    assert [code for code, _ in results] == [0] * ranks, printed
    return printed


def _rank(argv: list[str], before: Any) -> tuple[int, str]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # Megatron-LM forks writers
    if before is not None:
        before()
    from mcore_longctx.megatron_lm.launcher import main

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(argv)
    finally:
        for child in multiprocessing.active_children():  # the manager beside its writers, which nobody ends
            child.kill()
    return code, printed.getvalue()
