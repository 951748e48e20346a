"""The CPU redirect, random states and quiet imports."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from megatron.core import tensor_parallel

from mcore_longctx.megatron_compat import device_context, layer_offset, num_layers_to_build, seed_rng, training_device
from mcore_longctx.model import destroy_process_groups, init_process_groups, transformer_config
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import PLAIN_ROPE, SHAPE

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the redirect does nothing where CUDA is available")
CUDA_CALLS = ("current_device", "synchronize", "current_stream", "get_rng_state", "manual_seed")


@pytest.fixture
def _one_process() -> Iterator[None]:
    init_process_groups(Parallel(), seed=5)
    yield
    destroy_process_groups()


@needs_no_cuda
def test_inside_the_redirect_cuda_tensors_are_cpu_tensors() -> None:
    with device_context():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.empty(2, device=0, pin_memory=True).device.type == "cpu"
        assert torch.ones(2).cuda().to("cuda:0").device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(2).type(torch.float64).dtype is torch.float64
        torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(None)


@needs_no_cuda
def test_the_redirect_may_be_nested_and_leaves_torch_as_it_was_even_after_an_error() -> None:
    before = [getattr(torch.cuda, name) for name in CUDA_CALLS]

    def nest_and_fail() -> None:
        with device_context():
            with device_context():
                assert torch.zeros(1, device="cuda").device.type == "cpu"
            assert torch.zeros(1, device="cuda").device.type == "cpu"
            raise KeyError

    with pytest.raises(KeyError):
        nest_and_fail()
    assert [getattr(torch.cuda, name) for name in CUDA_CALLS] == before
    assert torch.ones(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


@needs_no_cuda
def test_two_threads_can_be_inside_at_once_and_one_may_leave_first() -> None:
    both_in, first_left = threading.Barrier(2), threading.Event()
    found: list[str] = []

    def second() -> None:
        with device_context():
            both_in.wait()
            first_left.wait()
            found.append(torch.zeros(1, device=torch.cuda.current_device()).device.type)

    thread = threading.Thread(target=second)
    thread.start()
    with device_context():
        both_in.wait()
    first_left.set()
    thread.join()
    assert found == ["cpu"]


def test_where_cuda_is_available_nothing_is_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = [getattr(torch.cuda, name) for name in CUDA_CALLS]
    with device_context():
        assert [getattr(torch.cuda, name) for name in CUDA_CALLS] == before
        assert torch.ones(2).type() == "torch.FloatTensor"


@pytest.mark.usefixtures("_one_process")
@needs_no_cuda
def test_a_seed_gives_the_same_numbers_inside_and_outside_of_megatrons_tracker() -> None:
    def draw() -> list[float]:
        seed_rng(7)
        outside = torch.rand(1).item()
        with tensor_parallel.get_cuda_rng_tracker().fork():
            inside = torch.rand(1).item()
        return [outside, inside, torch.rand(1).item()]

    first = draw()
    assert draw() == first
    assert len(set(first)) == 3
    torch.manual_seed(7)
    assert first[::2] == [torch.rand(1).item(), torch.rand(1).item()]  # the fork leaves the outer state alone


@pytest.mark.usefixtures("_one_process")
def test_one_stage_builds_all_layers_from_the_first() -> None:
    config = transformer_config(SHAPE, PLAIN_ROPE, Parallel(), precision="fp32")
    assert (num_layers_to_build(config), layer_offset(config)) == (SHAPE.num_layers, 0)


@needs_no_cuda
def test_the_training_device_is_the_cpu_without_cuda() -> None:
    assert training_device() == torch.device("cpu")


def test_importing_the_model_room_says_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import mcore_longctx.model"], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout == ""
    assert run.stderr == ""
