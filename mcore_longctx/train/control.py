"""Small facts that all ranks must agree on: verdicts of rank 0, sums of a step, whether to stop.

They travel over CPU tensors in a gloo group, beside the groups that train: asking costs no synchronisation of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx import errors
from mcore_longctx.errors import LongctxError

__all__ = ["Control", "PeerFailed"]

T = TypeVar("T")


class PeerFailed(Exception):
    """Another rank failed and says why; this one only leaves."""


class Control:
    """Agreement among all ranks. Every method is collective.

    Args:
        timeout: how long a rank waits for the others, where this makes a group of its own.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        is_gloo = dist.get_backend() == "gloo"
        self._group = dist.group.WORLD if is_gloo else dist.new_group(backend="gloo", timeout=timeout)

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Run `function` on rank 0 while the others wait; every rank gets its result, or raises its error.

        The result must be plain data. A LongctxError is raised on every rank alike (`agreed` is set on it).
        """
        failure: Exception | None = None
        answer: tuple[Any, ...] = ()
        if self.rank == 0:
            try:
                answer = ("done", function())
            except LongctxError as error:
                answer, failure = ("refused", *_pack(error)), error
            except Exception as error:
                answer, failure = ("failed",), error
        box: list[Any] = [answer]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        if box[0][0] == "done":
            return box[0][1]
        if failure is not None and not isinstance(failure, LongctxError):
            raise failure
        if box[0][0] == "failed":
            raise PeerFailed
        raise _unpack(box[0][1:]) from failure

    def raise_first(self, error: Exception | None) -> None:
        """Raise on every rank when any rank brings an error: that of the lowest rank, if it is a LongctxError."""
        found: list[Any] = [None] * self.world_size
        mine = None if error is None else ("refused", *_pack(error)) if isinstance(error, LongctxError) else ("failed",)
        dist.all_gather_object(found, mine, group=self._group)
        first = next((answer for answer in found if answer is not None), None)
        if first is None:
            return
        if error is not None and not isinstance(error, LongctxError):
            raise error
        if first[0] == "failed":
            raise PeerFailed
        raise _unpack(first[1:]) from error

    def gather(self, values: Sequence[float]) -> Tensor:
        """The values of every rank, float64 [world, n], in order of rank: sums over them do not depend on a reduction order."""
        mine = torch.tensor(values, dtype=torch.float64, device="cpu")
        out = torch.empty(self.world_size * len(values), dtype=torch.float64, device="cpu")
        dist.all_gather_into_tensor(out, mine, group=self._group)
        return out.view(self.world_size, len(values))

    def gather_objects(self, value: T) -> list[T]:
        """Plain data of every rank, in order of rank."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def largest(self, *values: int) -> list[int]:
        """The largest over the ranks of each of some numbers."""
        box = torch.tensor(values, dtype=torch.int64, device="cpu")
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._group)
        numbers: list[int] = box.tolist()
        return numbers


def _pack(error: LongctxError) -> tuple[str, str, str | None, str]:
    return type(error).__name__, error.what, None if error.where is None else str(error.where), error.fix


def _unpack(packed: tuple[str, str, str | None, str]) -> LongctxError:
    name, what, where, fix = packed
    error: LongctxError = getattr(errors, name)(what, where=where, fix=fix)
    error.agreed = True
    return error
