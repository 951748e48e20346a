"""The context-parallel part of a layout: exchanges, hierarchical sizes, heads; refused before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.recipe.load import dump_recipe, load_recipe, open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.recipe.schema import Parallel

RECIPE = """\
name: small
model:
  path: nowhere
  num_layers: 4
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 8
  num_query_groups: 2
  kv_channels: 8
  vocab_size: 264
rope: {type: llama3, factor: 8, original_max_position_embeddings: 8192, rope_theta: 1e4}
data: {long: {sources: [{name: books, path: books}]}}
stages:
  - name: extend
    kind: pretrain
    data: long
    seq_length: 4k
    train_iters: 2
    global_batch_size: 1
    parallel: PARALLEL
    optimizer: {lr: 1e-4}
"""


def read(folder: Path, parallel: str) -> Parallel:
    path = folder / "run.yaml"
    path.write_text(RECIPE.replace("PARALLEL", parallel))
    resolve(open_recipe(path), need_model=False)
    recipe = load_recipe(path)
    (folder / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(folder / "again.yaml") == recipe
    return recipe.stages[0].parallel


def test_one_exchange_or_one_for_each_layer_is_read(tmp_path: Path) -> None:
    one = read(tmp_path, "{context_parallel_size: 4, cp_comm_type: a2a}")
    assert (one.cp_comm_type, one.cp_comm_types, one.attention_neighbours) == ("a2a", ("a2a",), 4)
    assert one.describe() == "TP 1 x PP 1 x CP 4 a2a x DP 1 = 4 ranks"
    each = read(
        tmp_path,
        "{context_parallel_size: 4, cp_comm_type: [a2a, p2p, a2a+p2p, a2a], hierarchical_context_parallel_sizes: [2, 2]}",
    )
    assert each.cp_comm_types == ("a2a", "p2p", "a2a+p2p", "a2a")
    assert each.attention_neighbours == 1
    assert each.describe() == "TP 1 x PP 1 x CP 4 a2a/a2a+p2p/p2p (2 x 2) x DP 1 = 4 ranks"


def test_neighbours_are_those_that_share_heads_in_every_layer() -> None:
    def neighbours(*kinds: Any) -> int:
        return Parallel(
            context_parallel_size=8,
            cp_comm_type=kinds,
            hierarchical_context_parallel_sizes=(2, 4) if "a2a+p2p" in kinds else None,
        ).attention_neighbours

    assert [neighbours("p2p"), neighbours("all_gather"), neighbours("a2a"), neighbours("a2a+p2p")] == [1, 1, 8, 2]
    assert [neighbours("a2a", "a2a+p2p"), neighbours("a2a", "all_gather")] == [2, 1]


HERE = "run.yaml:20: stages.extend.parallel"


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            "{context_parallel_size: 4, cp_comm_type: ring}",
            f"{HERE}.cp_comm_type: 'ring' is not one of p2p, all_gather, a2a, a2a+p2p; valid: a2a, a2a+p2p, all_gather, p2p",
        ),
        (
            "{context_parallel_size: 4, cp_comm_type: a2a+p2p}",
            f"{HERE}: cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes: [ranks of the a2a, ranks of the ring]",
        ),
        (
            "{context_parallel_size: 4, cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 4]}",
            f"{HERE}: hierarchical_context_parallel_sizes are [2, 4], expected two sizes whose product is context_parallel_size 4",
        ),
        (
            "{context_parallel_size: 4, cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [4]}",
            f"{HERE}: hierarchical_context_parallel_sizes are [4], expected two sizes whose product is context_parallel_size 4",
        ),
        (
            "{context_parallel_size: 4, hierarchical_context_parallel_sizes: [2, 2]}",
            f"{HERE}: hierarchical_context_parallel_sizes are given, but cp_comm_type is not a2a+p2p",
        ),
        (
            "{context_parallel_size: 4, cp_comm_type: [p2p, p2p]}",
            f"{HERE}: cp_comm_type lists 2 exchanges, the model has 4 layers",
        ),
        (
            "{context_parallel_size: 16, cp_comm_type: a2a}",
            f"{HERE}: a2a over 16 ranks cannot divide 8 query heads and 2 key heads (of one tensor-parallel rank);"
            " use a2a over 1, 2, 4, 8 ranks, and p2p for the rest (a2a+p2p)",
        ),
        (
            "{tensor_model_parallel_size: 2, context_parallel_size: 16, cp_comm_type: a2a+p2p,"
            " hierarchical_context_parallel_sizes: [8, 2]}",
            f"{HERE}: a2a over 8 ranks cannot divide 4 query heads and 1 key heads (of one tensor-parallel rank);"
            " use a2a over 1, 2, 4 ranks, and p2p for the rest (a2a+p2p)",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_started(tmp_path: Path, parallel: str, message: str) -> None:
    with pytest.raises((ConfigError, LayoutError)) as caught:
        read(tmp_path, parallel)
    assert str(caught.value).replace(f"{tmp_path}/", "") == message


def test_a_name_that_python_code_gives_is_checked_too() -> None:
    with pytest.raises(
        ValueError, match="cp_comm_type is 'ring', expected p2p, all_gather, a2a, a2a\\+p2p, or one for each layer"
    ):
        Parallel(cp_comm_type="ring")  # type: ignore[arg-type]
