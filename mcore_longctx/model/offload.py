"""Kept activations on the host: copied out while the next layers run, and back while the layers above are in backward.

What `LongContextLayer` keeps for a layer is put into page-locked host memory on a stream of its own. In the backward pass the layer
that is fetched starts the fetch of the one below it, so that the copy overlaps with a whole layer of computation. Attention at 1M
tokens needs 1 GB/s per GPU for this to be hidden, PCIe 5 gives 55: what ends first is host memory (2 h + 2 q d + 4 q bytes per token and
layer in bf16; 554 GB for one sequence of 1M tokens of an 8B Llama, over all nodes).

`fraction` is the share of layers whose kept tensors go to the host. The first layers go: theirs wait longest for their backward.
On the CPU nothing is copied, and results are the same.

The CUDA part has not run yet: `tests/gpu` has its tests. The order of copies is tested on the CPU with a device that records.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError

__all__ = ["ActivationOffload", "Copier", "CudaCopier", "Offloaded"]

_COPIES_IN_FLIGHT = 2  # layers whose device memory is still held because its copy may not have finished


class Copier(Protocol):
    """Copies between a device and page-locked host memory, on a stream beside the computation."""

    def allocate_host(self, like: Tensor) -> Tensor:
        """Page-locked host memory of the shape, strides and dtype of `like`."""

    def to_host(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Any:
        """Start copying once the computation so far is done. Returns an event."""

    def to_device(self, buffers: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start copying into new device memory. Returns the tensors and an event."""

    def wait(self, event: Any) -> None:
        """Let the computation wait for an event (the host does not wait)."""


class CudaCopier:
    """Copies on one CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def allocate_host(self, like: Tensor) -> Tensor:
        """See `Copier`."""
        return _page_locked(like, self.device)

    def to_host(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Any:
        """See `Copier`."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for tensor, buffer in zip(tensors, buffers, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            return self.stream.record_event()

    def to_device(self, buffers: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """See `Copier`."""
        # allocated on the computation's stream, which uses and frees them: no record_stream, which would delay their reuse
        tensors = [torch.empty_like(buffer, device=self.device) for buffer in buffers]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for tensor, buffer in zip(tensors, buffers, strict=True):
                tensor.copy_(buffer, non_blocking=True)
            return tensors, self.stream.record_event()

    def wait(self, event: Any) -> None:
        """See `Copier`."""
        torch.cuda.current_stream(self.device).wait_event(event)


@dataclass(eq=False)
class Offloaded:
    """The kept tensors of one layer and one micro-batch: on the host, and for a while still on the device."""

    buffers: list[Tensor]
    leaving: Sequence[Tensor] | None  # on the device until `left`; None: on the host alone
    left: Any
    below: Offloaded | None  # the layer whose backward comes next
    coming: list[Tensor] | None = None  # on their way back, there at `arrived`
    arrived: Any = None


class ActivationOffload:
    """Offload for the layers of one pipeline stage: all of them share one object.

    Args:
        fraction: share of the layers that are offloaded, 0 to 1; rounded to whole layers.
        num_layers: layers of this stage.
        first_layer: number of its first layer, from 1 as Megatron counts.
        copier: how to copy; None: a `CudaCopier` at first use with a CUDA tensor, nothing for a CPU tensor.

    Raises:
        ConfigError: fraction is not 0 to 1.
    """

    def __init__(self, fraction: float, num_layers: int, first_layer: int = 1, copier: Copier | None = None) -> None:
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"offload_fraction is {fraction}, expected 0 to 1")
        self.first_layer, self.layers = first_layer, round(fraction * num_layers)
        self._copier = copier
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self._leaving: list[Offloaded] = []
        self._last: Offloaded | None = None

    def put(self, layer_number: int, tensors: Sequence[Tensor]) -> Offloaded | None:
        """Start to copy the kept tensors of a layer to the host. None: they stay where they are."""
        if layer_number == self.first_layer:
            self._last = None  # a new micro-batch: nothing lies below its first layer
        if layer_number - self.first_layer >= self.layers or (self._copier is None and not tensors[0].is_cuda):
            return None
        copier = self._copier = self._copier or CudaCopier(tensors[0].device)
        buffers = [free.pop() if (free := self._free[_kind(tensor)]) else copier.allocate_host(tensor) for tensor in tensors]
        self._last = Offloaded(buffers, leaving=tensors, left=copier.to_host(tensors, buffers), below=self._last)
        self._leaving.append(self._last)
        while len(self._leaving) > _COPIES_IN_FLIGHT:
            self._release(copier, self._leaving[0])
        return self._last

    def get(self, offloaded: Offloaded) -> Sequence[Tensor]:
        """The tensors on the device; the layer below is fetched meanwhile. Its host memory is free for the next one."""
        copier, below = self._copier, offloaded.below
        assert copier is not None
        if offloaded.leaving is not None:  # its backward comes so soon that it is still there
            tensors = offloaded.leaving
            self._release(copier, offloaded)
        else:
            self._fetch(copier, offloaded)
            assert offloaded.coming is not None
            tensors = offloaded.coming
            copier.wait(offloaded.arrived)
        for buffer in offloaded.buffers:
            self._free[_kind(buffer)].append(buffer)
        offloaded.buffers, offloaded.coming, offloaded.below = [], None, None
        if below is not None and below.leaving is None:
            self._fetch(copier, below)
        return tensors

    def _release(self, copier: Copier, offloaded: Offloaded) -> None:
        """Let go of the device memory, which the computation may reuse: it must know that the copy is done."""
        copier.wait(offloaded.left)
        offloaded.leaving = None
        self._leaving.remove(offloaded)

    def _fetch(self, copier: Copier, offloaded: Offloaded) -> None:
        if offloaded.coming is None:
            offloaded.coming, offloaded.arrived = copier.to_device(offloaded.buffers)


def _page_locked(like: Tensor, device: torch.device) -> Tensor:
    """Page-locked host memory of the shape, dense strides and dtype of `like`, which is unlocked when the tensor goes.

    Memory is registered by itself: torch's own pinned allocator rounds each block up to a power of two.

    Raises:
        ConfigError: the host refuses to lock it.
    """
    # CUDA locks whole pages: no other tensor may lie on them, or theirs cannot be locked
    size = max(1, -(-like.nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
    memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    address = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    first = address - memory.data_ptr()
    strides = torch.empty_like(like, device="meta").stride()  # a copy that changes strides is not asynchronous
    buffer = memory[first : first + size].view(like.dtype).as_strided(like.shape, strides)
    status = torch.cuda.cudart().cudaHostRegister(address, size, 0)
    if int(status) != 0:
        raise ConfigError(
            f"the host refused {size:,} bytes of page-locked memory (cudaHostRegister: {status})",
            where="activations.offload_fraction",
            fix="lower offload_fraction, or raise the memory lock limit (ulimit -l)",
        )
    # the driver's table outlives the memory: whoever is given these addresses next could not lock them, or copies would go astray
    weakref.finalize(buffer, _unlock, address, device).atexit = False
    return buffer


def _unlock(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(address)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
