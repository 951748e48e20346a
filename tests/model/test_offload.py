"""Offload of kept activations. The order of copies is checked with a device that copies at once and writes down what it is asked."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.model import destroy_process_groups
from mcore_longctx.model.offload import ActivationOffload, CudaCopier
from tests.model.llama import SHAPE
from tests.model.test_recompute import gradients, model_with

LAYERS = SHAPE.num_layers


class RecordingCopier:
    """Stands for a device: a copy is done at once, and an event is the name of the copy."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.allocated = 0

    def allocate_host(self, like: Tensor) -> Tensor:
        self.allocated += 1
        return torch.empty_like(like)

    def to_host(self, tensors: Sequence[Tensor], buffers: Sequence[Tensor]) -> Any:
        for tensor, buffer in zip(tensors, buffers, strict=True):
            assert buffer.stride() == tensor.stride(), "a copy that changes strides is not asynchronous"
            buffer.copy_(tensor)
        self.log.append(f"out {tensors[0].flatten()[0].item():g}")
        return self.log[-1]

    def to_device(self, buffers: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        self.log.append(f"in {buffers[0].flatten()[0].item():g}")
        return [buffer.clone() for buffer in buffers], self.log[-1]

    def wait(self, event: Any) -> None:
        self.log.append(f"wait {event}")


class RecordingDriver:
    """Stands for `torch.cuda.cudart()`: refuses what is locked already, as CUDA does."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.locked = status, {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        pages = set(range(address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE)))
        if any(pages & others for others in self.locked.values()):
            return 712
        self.locked[address] = pages
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> RecordingDriver:
    made = RecordingDriver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


def test_page_locked_memory_shares_no_page_and_is_unlocked_before_it_is_freed(driver: RecordingDriver) -> None:
    copier = CudaCopier(torch.device("cuda", 0))
    like = [
        torch.empty(3, 5, dtype=torch.bfloat16).t(),
        torch.empty(2, 4, 7, 8).permute(1, 2, 0, 3),
        torch.empty(1, dtype=torch.bfloat16),
        torch.empty(513, dtype=torch.float64),
        torch.empty(0, 4),
    ]
    buffers = [copier.allocate_host(tensor) for tensor in like * 3]
    assert len(driver.locked) == len(buffers)
    for buffer, tensor in zip(buffers, like * 3, strict=True):
        assert (buffer.shape, buffer.stride(), buffer.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        if buffer.numel():
            first = buffer.data_ptr() // mmap.PAGESIZE
            last = (buffer.data_ptr() + buffer.nbytes - 1) // mmap.PAGESIZE
            assert driver.locked[buffer.data_ptr()] == set(range(first, last + 1))
        buffer.fill_(1.0)
    del buffers, buffer
    gc.collect()
    assert not driver.locked


def test_memory_that_the_host_does_not_lock_is_one_clear_line(driver: RecordingDriver) -> None:
    driver.status = 2
    with pytest.raises(ConfigError, match="refused 4,096 bytes of page-locked memory"):
        CudaCopier(torch.device("cuda", 0)).allocate_host(torch.empty(8))


def kept(layer: int) -> list[Tensor]:
    return [torch.full((4, 2), float(layer)), torch.full((3, 5), layer + 0.5).t()]


def test_a_layer_is_fetched_while_the_one_above_it_computes() -> None:
    copier = RecordingCopier()
    offload = ActivationOffload(1.0, 5, copier=copier)
    handles = [offload.put(layer, kept(layer)) for layer in range(1, 6)]
    # device memory of a layer is let go two layers later, when the computation knows that its copy is done
    assert copier.log == ["out 1", "out 2", "out 3", "wait out 1", "out 4", "wait out 2", "out 5", "wait out 3"]
    copier.log.clear()
    for layer in range(5, 0, -1):
        handle = handles[layer - 1]
        assert handle is not None
        copier.log.append(f"layer {layer}")
        for found, expected in zip(offload.get(handle), kept(layer), strict=True):
            assert torch.equal(found, expected)
    assert copier.log == [
        *("layer 5", "wait out 5"),  # still on the device, as is layer 4
        *("layer 4", "wait out 4", "in 3"),
        *("layer 3", "wait in 3", "in 2"),
        *("layer 2", "wait in 2", "in 1"),
        *("layer 1", "wait in 1"),
    ]


def test_device_memory_of_all_but_two_layers_is_free_after_the_forward_pass() -> None:
    offload = ActivationOffload(1.0, 5, copier=RecordingCopier())
    on_device, handles = [], []
    for layer in range(1, 6):
        tensors = kept(layer)
        on_device.append(weakref.ref(tensors[0]))
        handles.append(offload.put(layer, tensors))
        del tensors
    gc.collect()
    assert [reference() is not None for reference in on_device] == [False, False, False, True, True]


def test_host_memory_is_used_again_and_micro_batches_in_flight_do_not_mix() -> None:
    copier = RecordingCopier()
    offload = ActivationOffload(1.0, 2, first_layer=3, copier=copier)
    for _ in range(3):  # as 1F1B on an early pipeline stage: two forward passes before the first backward
        flights = [[offload.put(layer, kept(10 * flight + layer)) for layer in (3, 4)] for flight in (1, 2)]
        for flight, handles in enumerate(flights, start=1):
            for layer, handle in ((4, handles[1]), (3, handles[0])):
                assert handle is not None
                assert offload.get(handle)[0][0, 0] == 10 * flight + layer
    assert copier.allocated == 2 * 2 * 2, "two tensors of two layers of two micro-batches"


def test_the_fraction_takes_the_first_layers() -> None:
    offload = ActivationOffload(0.5, 4, copier=RecordingCopier())
    assert [offload.put(layer, kept(layer)) is not None for layer in (1, 2, 3, 4)] == [True, True, False, False]


@pytest.mark.parametrize("policy", ["full", "attention_kept"])
def test_a_model_whose_kept_activations_travel_gives_the_same_gradients_bit_for_bit(policy: Any) -> None:
    model = model_with(policy)
    loss, expected = gradients(model)
    for fraction in (0.5, 1.0):
        copier = RecordingCopier()
        offload = ActivationOffload(fraction, LAYERS, copier=copier)
        for layer in model.decoder.layers:
            layer.offload = offload
        model.zero_grad()
        found_loss, found = gradients(model)
        assert found_loss == loss
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        assert len([line for line in copier.log if line.startswith("out")]) == 4 * round(fraction * LAYERS), "four micro-batches"
    destroy_process_groups()


def test_on_the_cpu_nothing_is_copied() -> None:
    assert ActivationOffload(1.0, 4).put(1, kept(1)) is None


def test_a_fraction_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload_fraction is 1\.5, expected 0 to 1"):
        ActivationOffload(1.5, 4)
