"""The plan: which documents are taken, how often, and where each stands. Signatures; the code follows within the hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcore_longctx.data.layout import Separator
from mcore_longctx.data.shards import DocumentTable
from mcore_longctx.data.sidecar import Runs
from mcore_longctx.recipe.schema import DataSection

__all__ = ["make_chat_plan", "make_plan", "plan_text", "read_plan"]


def make_plan(
    folder: Path,
    table: DocumentTable,
    section: DataSection,
    *,
    name: str,
    seed: int,
    seq_length: int,
    separator: Separator,
    token_budget: int | None = None,
    max_samples: int | None = None,
) -> dict[str, Any]:
    """Decide and write `folder`/plan.runs, lengths.json, lengths.png and, last, plan.json, whose contents are returned.

    Args:
        folder: OUT/plan; made if missing. A plan that is there is replaced (plan.json goes first).
        table: of the documents.
        section: mode, shares, length sampling, packing.
        name: of the data set, for titles.
        seed: of every decision.
        seq_length: tokens of a sample.
        separator: between or around documents; `single` packing and chunks use none.
        token_budget: tokens to draw, or None: all there is (as far as the shares allow).
        max_samples: samples that are kept at most.

    Raises:
        DataError: a source too small for its share, chunk lengths that do not divide seq_length, or not a single sample.
    """
    raise NotImplementedError


def make_chat_plan(folder: Path, table: DocumentTable, *, name: str, seed: int, seq_length: int) -> dict[str, Any]:
    """Plan of chats: whole, first-fit into samples in an order drawn from `seed`; too long ones are dropped. See `make_plan`."""
    raise NotImplementedError


def read_plan(folder: Path) -> tuple[Runs, dict[str, Any]]:
    """Map plan.runs and read plan.json of OUT/plan. `document` of the runs is a row of the table (LITERAL, PADDING below 0).

    Raises:
        DataError: no plan, not finished, or damaged.
    """
    raise NotImplementedError


def plan_text(facts: dict[str, Any], samples_needed: int | None = None) -> str:
    """The contents of plan.json as a table for the screen. samples_needed: of the stage, said if there are fewer or more."""
    raise NotImplementedError
