"""What the published methods ask of a stage and other programs do not do is refused by name, never dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.args.refusals import refuse_methods
from mcore_longctx.launch.doctor import _ropes
from mcore_longctx.recipe import TokenCount
from mcore_longctx.recipe.load import open_recipe
from mcore_longctx.recipe.resolve import resolve
from mcore_longctx.recipe.stage import MergeSection, PositionsSection, SparsitySection
from tests.launch.args_recipes import MAKERS, PLAIN, run_of

ASKED: dict[str, tuple[dict[str, Any], str, str]] = {
    "cross_document_mask": ({"cross_document_mask": True}, "documents of a sample would see each other", "false"),
    "positions": (
        {"positions": PositionsSection(type="rpes", target=TokenCount(4 << 20))},
        "positions would be 0, 1, 2, ...: Megatron's rotary embedding ignores the positions of a batch",
        "null",
    ),
    "loss_reduction": ({"kind": "sft", "loss_reduction": "sequence_mean"}, "every token would weigh the same", "token_mean"),
    "optimizer_from": ({"optimizer_from": "previous"}, "moments would begin at 0", "none"),
    "merge": ({"merge": MergeSection(other="base")}, "weights are merged by `mcore-longctx run` after its own training", "null"),
    "sparsity": ({"sparsity": SparsitySection(sparsity=0.5, dense_from=2)}, "all weights would train", "null"),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("key", ASKED)
def test_a_method_that_no_flag_says_is_refused_by_every_program(maker: str, key: str) -> None:
    fields, what, value = ASKED[key]
    run = run_of("ultralong-8b-4m", "extend", *PLAIN)
    with pytest.raises(ConfigError) as caught:
        MAKERS[maker](replace(run, stage=replace(run.stage, **fields)))
    assert caught.value.what.startswith(what)
    assert str(caught.value.where).endswith(f"stages.extend.{key}")
    assert caught.value.fix == f"use mcore-longctx train, or stages.extend.{key}={value} if that is what you want"


def test_an_order_by_cost_is_refused_even_where_the_mask_would_be_allowed() -> None:
    run = run_of("ultralong-8b-4m", "extend")
    stage = replace(run.stage, cross_document_mask=True, balance="sum_sq")
    object.__setattr__(stage, "cross_document_mask", False)  # a stage itself refuses the pair
    with pytest.raises(ConfigError, match=r"stages.extend.balance: samples would come in another order"):
        refuse_methods(replace(run, stage=stage))


def test_doctor_says_whose_rope_it_looked_at_where_stages_have_several() -> None:
    second = open_recipe("ultralong-8b-4m").recipe.stages[1].name
    file = open_recipe("ultralong-8b-4m", [f"stages.{second}.rope={{type: abf, rope_theta: 8e8, max_position_embeddings: 4M}}"])
    resolved = resolve(file, need_model=False)
    both = {name: {"error": "no megatron"} for name in ("extend", second)}
    texts = [finding.text for finding in _ropes(both, file.recipe, resolved)]
    assert texts == [f"stage {name}: the model cannot be built: no megatron" for name in both]
    (alone,) = _ropes({"extend": {"error": "no megatron"}}, file.recipe, resolved)
    assert alone.text == "the model cannot be built: no megatron"
