"""Run the commands of docs/plan.md and put what they print below them, and make its tables: `python tools/plan_page.py`.

A test makes the page again and finds no difference (tests/plan/test_docs.py).
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.cli.main import main
from mcore_longctx.plan.advice import describe
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.layouts import search
from mcore_longctx.plan.memory import memory
from mcore_longctx.plan.models import find_model
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.step_time import step_time
from mcore_longctx.plan.tables import gigabytes
from mcore_longctx.recipe import OptimizerSection, Parallel, Stage, TokenCount

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
_EXAMPLE = re.compile(r"```bash\n(mcore-longctx [^\n]*)\n```\n```text\n(.*?)```", re.DOTALL)
_TABLE = re.compile(r"<!-- made: (\w+) -->\n(.*?)<!-- end -->", re.DOTALL)
_M = 1 << 20
_STEPS = 150  # of 8.4M tokens: UltraLong's


@dataclass(frozen=True)
class Row:
    """A row of the table that was worked out before the code: step, tokens/s/GPU, MFU %, GB a GPU."""

    length: int  # in M tokens
    batch: int
    tp: int
    cp: int
    dp: int
    exchange: Any
    policy: Any
    kernel: str
    before: tuple[float, float, float, float]

    def setup(self, **changes: Any) -> Setup:
        """The same as our stages run it."""
        values = {
            "shape": find_model("llama-3.1-8b"),
            "gpu": find_gpu("h100-80gb"),
            "seq_length": self.length * _M,
            "global_batch_size": self.batch,
            "parallel": Parallel(
                tensor_model_parallel_size=self.tp,
                context_parallel_size=self.cp,
                data_parallel_size=self.dp,
                sequence_parallel=self.tp > 1,
                cp_comm_type=self.exchange,
            ),
            "recompute": self.policy,
            "kernel": self.kernel,
        }
        return Setup(**(values | changes))


ROWS = (
    Row(1, 8, 8, 4, 8, "p2p", "full", "cudnn", (90, 365, 32, 25)),
    Row(1, 8, 8, 4, 8, "all_gather", "full", "cudnn", (85, 384, 34, 26)),
    Row(1, 8, 4, 8, 8, "all_gather", "attention_kept", "cudnn", (69, 476, 42, 42)),
    Row(1, 8, 4, 8, 8, "all_gather", "attention_kept", "fa3", (58, 563, 50, 42)),
    Row(2, 4, 8, 16, 2, "p2p", "full", "cudnn", (174, 188, 32, 17)),
    Row(2, 4, 8, 8, 4, "all_gather", "attention_kept", "cudnn", (132, 247, 42, 36)),
    Row(2, 4, 8, 8, 4, "all_gather", "attention_kept", "fa3", (111, 294, 50, 36)),
    Row(4, 2, 8, 16, 2, "p2p", "full", "cudnn", (342, 96, 32, 25)),
    Row(4, 2, 8, 16, 2, "all_gather", "full", "cudnn", (325, 101, 34, 29)),
    Row(4, 2, 8, 16, 2, "all_gather", "attention_kept", "cudnn", (260, 126, 43, 38)),
    Row(4, 2, 8, 16, 2, "all_gather", "attention_kept", "fa3", (217, 151, 51, 38)),
)
# policy, on the host?, step s where the table of before has one
SMALLEST = {
    (1, "h100-80gb"): (8, 16, 32, 64),
    (2, "h100-80gb"): (8, 16, 32, 64, 128),
    (4, "h100-80gb"): (16, 32, 64, 128),
    (1, "h200-141gb"): (8,),
    (2, "h200-141gb"): (8, 16),
    (4, "h200-141gb"): (16, 32),
}


def rendered(text: str) -> str:
    """The page with the present output of its commands, and its tables."""
    text = _EXAMPLE.sub(lambda match: f"```bash\n{match[1]}\n```\n```text\n{output(match[1])}```", text)
    made = {"ultralong": ultralong, "smallest": smallest}
    return _TABLE.sub(lambda match: "\n".join([f"<!-- made: {match[1]} -->", *made[match[1]](), "<!-- end -->"]), text)


def output(command: str) -> str:
    """What one command prints, errors too."""
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen), contextlib.redirect_stderr(seen):
        main(shlex.split(command)[1:])
    return seen.getvalue()


def ultralong() -> Iterator[str]:
    """The layouts of the table of before; its figures in brackets."""
    yield "| tokens | layout | recompute | kernel | step, s | tokens/s/GPU | MFU | GB a GPU | 150 steps, h |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in ROWS:
        time, needed = step_time(row.setup()), memory(row.setup())
        seconds, rate, mfu, there = row.before
        yield (
            f"| {row.length}M | TP {row.tp} CP {row.cp} {row.exchange} DP {row.dp} | {row.policy} | {row.kernel}"
            f" | {time.total:.0f} ({seconds:.0f}) | {time.tokens_per_second_per_gpu:.0f} ({rate:.0f}) | {time.mfu:.0%} ({mfu:.0f} %)"
            f" | {needed.total / 1e9:.0f} ({there:.0f}) | {time.total * _STEPS / 3600:.1f} |"
        )


def stage(length: int) -> Stage:
    """8.4M tokens a step."""
    return Stage(
        name="extend",
        kind="pretrain",
        data="-",
        seq_length=TokenCount(length * _M),
        global_batch_size=8 // length,
        optimizer=OptimizerSection(lr=1e-5),
        train_iters=_STEPS,
    )


def smallest() -> Iterator[str]:
    """The best layout of each number of GPUs, from the smallest that fits."""
    yield "| tokens | GPUs | best layout | step, s | GB a GPU | host GB a node | 150 steps, h |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (length, gpu), counts in SMALLEST.items():
        for gpus in counts:
            best = search(stage(length), find_model("llama-3.1-8b"), find_gpu(gpu), gpus).best
            head = f"| {length}M | {gpus} {gpu.split('-')[0].upper()}"
            if best is None or best.memory is None:
                yield f"{head} | nothing fits | | | | |"
                continue
            cells = (describe(best), f"{best.seconds:,.0f}", gigabytes(best.memory.total), gigabytes(best.memory.host_total))
            yield f"{head} | {' | '.join(cells)} | {best.seconds * _STEPS / 3600:,.1f} |"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
