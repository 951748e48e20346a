"""Writing one rank's share of a checkpoint: here and now, or in a process beside the training.

This is megatron-core's `torch_dist` strategy: its plan, its file format, its `.metadata`, its asynchronous request. What runs the request
is ours, because three things of Megatron's do not survive a SLURM job: its manager process beside each rank dies of the stop signal that
SLURM sends to every process of a step, both the manager and (0.16) the processes that write go on when their rank is killed, and
`AsyncCallsQueue` asks whether all have finished by an all-reduce in the group that trains.
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX

from mcore_longctx.manifest import sha256_file
from mcore_longctx.train.signals import HANDLED

__all__ = ["BesideTraining", "SaveStrategy", "Share", "WriteFailed"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before any fork


class WriteFailed(Exception):
    """This rank's share could not be written; the message says why."""


@dataclass(frozen=True)
class Share:
    """What one rank has written: torch's records of where each tensor lies, and the sha256 of each file by its name."""

    records: list[Any]
    sha256: dict[str, str]


class RankWriter(FileSystemWriterAsync):
    """Megatron's writer with one file a rank, which starts no process and needs no queue of a manager."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, thread_count=1)
        self.outcome: Share | Exception | None = None

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Take the data of this rank's part of the plan; what lies on a GPU is copied to host memory."""
        self._file_name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        # pageable memory: pinned memory belongs to CUDA, which does not survive a fork
        self._data = [(item, _on_host(planner.resolve_data(item))) for item in plan.items]

    def write(self) -> Share:
        """Write, fsync and hash this rank's file, if it has one.

        Raises:
            WriteFailed: with the cause in its first line.
        """
        if not self._data:
            return Share([], {})
        path = Path(self.checkpoint_dir) / self._file_name
        tensors = [(item, _alone(data)) for item, data in self._data if isinstance(data, torch.Tensor)]
        packed = [(item, data) for item, data in self._data if not isinstance(data, torch.Tensor)]
        results: queue.Queue[tuple[int, Any]] = queue.Queue()
        begun: queue.Queue[int] = queue.Queue()
        begun.put(0)
        self.write_preloaded_data(
            [self.transforms], 0, (path, self._file_name, (packed, tensors)), results, begun, use_fsync=True
        )
        _, answer = results.get_nowait()
        if isinstance(answer, Exception):
            raise WriteFailed(_cause(answer)) from answer
        return Share(answer, {self._file_name: sha256_file(path)})

    def write_here(self) -> None:
        """`write` in this process; `outcome` has the result or the error."""
        self.outcome = _result_of(self.write)

    def retrieve_write_results(self) -> Any:
        """The records, or the error in torch's wrapping: every rank is told of it."""
        if isinstance(self.outcome, Share):
            return self.outcome.records
        return _wrap_exception(self.outcome or WriteFailed("nothing was written"))


class SaveStrategy(TorchDistSaveShardedStrategy):
    """`torch_dist` with a `RankWriter`, which `writer` keeps. Its request is a plain call: run it here, or let `BesideTraining` run it."""

    writer: RankWriter

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "mcore") -> AsyncRequest:
        """Plan the save, on all ranks together, and take the data. `async_strategy` (0.19) changes nothing: there is one way here."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        self.writer = RankWriter(str(checkpoint_dir))
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False), self.writer, planner=MCoreSavePlanner(flatten_state_dict=False)
        )
        return AsyncRequest(self.writer.write_here, (), [lambda: save_state_dict_async_finalize(*planned)])


class BesideTraining:
    """A function that runs in a process forked from this one.

    The fork is also what takes the copy of tensors in host memory: pages are shared until the training changes them. The process
    ignores the signals that ask a job to stop, and the kernel ends it with the thread that started it.

    Args:
        function: gives a picklable result. It must not use CUDA or any process group.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._receiver, sender = Pipe(duplex=False)
        self._answer: Any = None
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(function, sender, parent)
        sender.close()  # the end of the process is the end of the pipe

    @property
    def is_busy(self) -> bool:
        """Whether the function is still running. Never waits."""
        if self._answer is None and self._receiver.poll():
            self._receive()
        return self._answer is None

    def wait(self) -> Any:
        """The function's result, or the exception that it raised, when it is there."""
        if self._answer is None:
            self._receive()
        return self._answer

    def kill(self) -> None:
        """End the process at once."""
        if self._answer is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def _receive(self) -> None:
        try:
            self._answer = self._receiver.recv()
        except (EOFError, OSError):
            self._answer = None
        self._receiver.close()
        _, status = os.waitpid(self.pid, 0)
        if self._answer is None:
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            self._answer = WriteFailed(f"the writing process ended with {how}")


def _run_and_exit(function: Callable[[], Any], sender: Connection, parent: int) -> None:
    """The life of the forked process. Never returns: what the parent has buffered or registered for its end must not happen twice."""
    try:
        for number in (*HANDLED, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _die_with(parent)
        gc.disable()  # a collection might free what belongs to CUDA in the parent
        torch.set_num_threads(1)  # threads are not forked, and OpenMP would wait for its own
        sender.send(_result_of(function))
    finally:
        os._exit(0)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends: orphans would hold the ranks' connections and the job step open."""
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
        os._exit(1)


def _result_of(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # told to all ranks by whoever asks for the result
        return error if isinstance(error, WriteFailed) else WriteFailed(_cause(error))


def _on_host(data: Any) -> Any:
    return data.detach().to("cpu") if isinstance(data, torch.Tensor) else data


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is all of its storage: torch.save writes whole storages."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize else tensor.clone()


def _cause(error: BaseException) -> str:
    """What went wrong, in one line. torch speaks of positions in its archive where the system has said `No space left on device`."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    lines = str(found or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
