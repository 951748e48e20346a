"""Run a function in several gloo processes, with a deadline.

    results = run_processes(check_something, 2, "argument")      # one result per rank

The processes are forked from one server that has imported torch and megatron-core once, so a launch costs milliseconds of import
instead of 8 CPU-seconds a rank. They meet through a file, not a port: two test runs at once cannot collide. Whatever happens, none
of them is left alive.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["ProcessFailed", "free_port", "run_processes"]

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["mcore_longctx.megatron_compat"])


class ProcessFailed(AssertionError):
    """A rank raised, died or missed the deadline. The message holds the traceback of the first rank that failed."""


def run_processes(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 240.0,
    environment: Mapping[str, str] | None = None,
    init: bool = True,
) -> list[Any]:
    """Call `function(*args)` in `size` processes and return what each returned, in order of rank.

    `function` must be importable (a module-level function of a test file), arguments and results must pickle. Ranks find
    `torch.distributed` initialised with gloo; with `init=False` they find what torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT) and initialise it themselves.

    Raises:
        ProcessFailed: a rank raised or died, or `timeout` seconds passed; the other ranks are killed.
    """
    payload = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="mcore-longctx-ranks-") as folder:
        shared = dict(environment or {})
        if not init:
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes, pipes = [], []
        try:
            for rank in range(size):
                parent, child = _FORKSERVER.Pipe(duplex=False)
                process = _FORKSERVER.Process(
                    target=_rank_main, args=(rank, size, folder, child, payload, shared, init, timeout), daemon=True
                )
                process.start()
                child.close()
                processes.append(process)
                pipes.append(parent)
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ProcessFailed(f"ranks {sorted(waiting.values())} of {len(pipes)} gave no result in {timeout:g} s")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise ProcessFailed(f"rank {rank} of {len(pipes)} died without a result") from None
            if not ok:
                raise ProcessFailed(f"rank {rank} of {len(pipes)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, size: int, folder: str, pipe: Connection, payload: bytes, environment: dict[str, str], init: bool, timeout: float
) -> None:
    try:
        os.environ.update(environment)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not resolve
        import torch

        torch.set_num_threads(1)
        if init:
            store = torch.distributed.FileStore(str(Path(folder) / "store"), size)
            torch.distributed.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        else:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        function, args = pickle.loads(payload)
        result = pickle.dumps((True, function(*args)))
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(result)
    pipe.close()
    # No tear-down of process groups: a rank that is still in a collective must not be cut off by one that has finished.
    time.sleep(timeout)
