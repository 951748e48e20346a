"""Bytes of tensors that are alive, and the most there were: what `torch.cuda.max_memory_allocated` is on a GPU, for the CPU.

    with LiveBytes(model.parameters()) as live:
        loss = step()
    live.at_start, live.now, live.peak

Every operator's results are looked at as they are made. What counts is a storage, once, however many views it has, from the first
time an operator returns it until it is freed. Limits:

- memory that an operator allocates and frees inside itself (a kernel's scratch) is not seen: the growth of the process's resident
  memory, which `harness.measure` reports beside it, holds that too;
- tensors made before the block count from the moment an operator returns them, unless they are named at the start;
- a storage that is resized in place keeps the size it had when it was first seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Counts while its block is open; `states` (weights, gradients, inputs) are counted from the start."""

    def __init__(self, states: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in states:
            self._see(tensor)
        self.at_start = self.peak = self.now

    @property
    def peak_above_start(self) -> int:
        """Bytes beyond the states: activations, kept tensors and temporaries at their largest."""
        return self.peak - self.at_start

    def restart_peak(self) -> None:
        """Forget the largest value so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator, then look at its results."""
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return results

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or tensor.device.type == "meta":
            return

        def freed(_: Any, key: int = key, size: int = size) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        # torch keeps one Python object a storage, alive as long as the storage is
        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
