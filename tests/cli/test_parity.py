"""`mcore-longctx parity`: the documented example is equal under context parallelism, a wrong model is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# each rank attends to its own tokens alone: what happens when an exchange is switched off without a word
WRONG = """
from mcore_longctx.model import LongContextAttention, longctx_layer_spec
import torch.distributed as dist

class NoExchange(LongContextAttention):
    def __init__(self, config, *args, pg_collection, **kwargs):
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
        pg_collection = type(pg_collection)(tp=pg_collection.tp, cp=alone)
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)

def spec(config):
    layer = longctx_layer_spec()
    layer.submodules.self_attention.submodules.core_attention = NoExchange
    return layer
"""


def parity(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mcore_longctx", "parity", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, cwd=cwd)


@pytest.mark.multiproc
def test_the_example_is_equal_under_context_parallelism() -> None:
    done = parity("examples/own_model_spec.py:build_model", "--cp-comm-type", "all_gather")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("TP 1 x PP 1 x CP 2 all_gather x DP 1 = 2 ranks: equal to one rank"), done.stdout
    assert len(lines) > 10
    assert all(line.startswith("ok ") for line in lines[:-1])


@pytest.mark.multiproc
def test_a_layer_that_forgets_the_exchange_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    done = parity(f"{tmp_path / 'wrong.py'}:spec", "--json")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "mcore-longctx: loss or gradients differ from one rank"
    found = json.loads(done.stdout)
    assert not found["equal"]
    assert max(one["relative"] for one in found["differences"]) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_model_spec"], "target 'own_model_spec'; expected path/to/file.py:NAME or package.module:NAME"),
        (["x.py:f"], "x.py: no such file"),
        (["x.py:f", "--cp", "1"], "--cp is 1; 2 or more: with one rank there is nothing to compare"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = parity(*arguments)
    assert done.returncode == 2
    assert done.stderr.strip().startswith(f"mcore-longctx: {message}"), done.stderr
