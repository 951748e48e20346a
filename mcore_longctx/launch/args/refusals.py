"""What no program but `mcore-longctx train` does, so that no flag can say it: refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.args.source import StageRun

__all__ = ["refuse_methods"]


def refuse_methods(run: StageRun) -> None:
    """Raise ConfigError for a stage that asks for what Megatron's loop, batches or checkpoints do not do.

    Raises:
        ConfigError: documents that must not see each other, positions with jumps, weights of conversations, an order of samples by
            cost, an optimizer that is carried over, a merge, weights that are held at 0.
    """
    for key, value, what in _asked_for(run):
        name = f"stages.{run.stage.name}.{key.removeprefix('stage.')}"
        fix = f"use mcore-longctx train, or {name}={value} if that is what you want"
        raise ConfigError(what, where=run.where(key), fix=fix)


def _asked_for(run: StageRun) -> Iterator[tuple[str, str, str]]:
    """Key, the value that could be said, and what would be lost."""
    stage = run.stage
    if stage.cross_document_mask:
        yield (
            "stage.cross_document_mask",
            "false",
            "documents of a sample would see each other: Megatron's batches know no documents inside a sample of our files, and"
            " --dataloader-inter-document-masking under context parallelism gives wrong losses without an error",
        )
    if stage.positions is not None:
        what = "positions would be 0, 1, 2, ...: Megatron's rotary embedding ignores the positions of a batch"
        yield "stage.positions", "null", what
    if stage.loss_reduction != "token_mean":
        what = "every token would weigh the same: Megatron's loss divides by the number of tokens"
        yield "stage.loss_reduction", "token_mean", what
    if stage.balance != "none":
        yield "stage.balance", "none", "samples would come in another order: the program knows the order of balance none"
    if stage.optimizer_from != "none":
        what = "moments would begin at 0: Megatron reads an optimizer only together with its schedule and its iteration"
        yield "stage.optimizer_from", "none", what
    if stage.merge is not None:
        what = "weights are merged by `mcore-longctx run` after its own training, and Megatron's checkpoints carry no card"
        yield "stage.merge", "null", what
    if stage.sparsity is not None:
        yield "stage.sparsity", "null", "all weights would train: Megatron holds none at 0"
