"""The work of `data build` as steps of datatrove's executors. Importing this needs the extra `datatrove`; `data/engines/scale_out.py` does so lazily.

Only datatrove's way of starting ranks is used. What is done is asked of our shards: its own markers, a file for every rank that ended
well, would hold after a shard is lost, and would skip work after a start with another number of ranks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats

from mcore_longctx.data.build import build
from mcore_longctx.data.tokenizers import Tokenizer, load_tokenizer
from mcore_longctx.data.tokens.job import open_job
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.data.workspace import run_tasks

__all__ = ["FinishBuild", "LocalExecutor", "SlurmExecutor", "TokenizeShards", "keep_tokenizer", "read_job_id"]


_loaded: dict[Path, Tokenizer] = {}  # by file: loading costs a CPU-second, so once a process, for all its ranks


def keep_tokenizer(tokenizer: Tokenizer) -> None:
    """Let the ranks of this process, and of those that it forks, use a tokenizer that is loaded."""
    _loaded[tokenizer.path.absolute()] = tokenizer


class TokenizeShards(PipelineStep):
    """Rank r of n does tasks r, r + n, r + 2n, ... of the job that was prepared in OUT, as far as they are not done.

    Args:
        out: the run folder, on a file system that every rank sees.
        workers: processes of a rank.
        max_bad: records that cannot be read and are left out; one more ends the rank.
        verify_fraction: share of the documents that are encoded again with the reference.
    """

    name = "token shards"
    type = "mcore-longctx"

    def __init__(self, out: Path, *, workers: int = 1, max_bad: int = 0, verify_fraction: float = 0.0) -> None:
        super().__init__()
        self.out, self.workers, self.max_bad, self.verify_fraction = out, workers, max_bad, verify_fraction

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Do the tasks of one rank; `data` is handed on.

        Raises:
            LongctxError: as `run_job`.
        """
        job = open_job(self.out)
        if job.tokenizer not in _loaded:
            keep_tokenizer(load_tokenizer(job.tokenizer))

        def count(input_bytes: int, tokens: int) -> None:
            self.stat_update("input_bytes", value=input_bytes, unit="shard")
            self.stat_update("tokens", value=tokens, unit="shard")

        run_job(
            job,
            _loaded[job.tokenizer],
            workers=self.workers,
            max_bad=self.max_bad,
            verify_fraction=self.verify_fraction,
            tasks=range(rank, len(job.tasks), world_size),
            on_task=count,
        )
        return data

    def ranks_to_do(self, world_size: int) -> list[int]:
        """The ranks whose shards are not all there."""
        job = open_job(self.out)
        return sorted({task % world_size for task in range(len(job.tasks)) if not job.is_done(task)})


class FinishBuild(PipelineStep):
    """What comes after the shards, in one process: manifest, plan, pack. Shards that are missing all the same are made first.

    Args:
        arguments: of `build`.
        workers: processes.
    """

    name = "plan and pack"
    type = "mcore-longctx"

    def __init__(self, arguments: Mapping[str, Any], *, workers: int) -> None:
        super().__init__()
        self.arguments, self.workers = dict(arguments), workers

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        """Build, and print the report into the log of the job."""
        del rank, world_size
        print(build(**self.arguments, workers=self.workers), flush=True)  # into the log of the job
        return data

    def ranks_to_do(self, world_size: int) -> list[int]:
        """The only one: `build` itself knows what is done."""
        return list(range(world_size))


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor with the processes of `run_tasks`.

    Its own pool waits for ever when a worker is killed (out of memory), and its manager process outlives a killed parent.
    """

    def run(self) -> Any:
        """Run the ranks that have something to do; the first error ends it."""
        self.save_executor_as_json()
        ranks = self.pipeline[0].ranks_to_do(self.world_size)
        # a copy each, because a step counts; not local rank 0, which repeats its log on the screen
        stats = run_tasks(lambda rank: copy.deepcopy(self)._run_for_rank(rank, local_rank=1), ranks, self.workers)
        return sum(stats, start=PipelineStats())


class SlurmExecutor(SlurmPipelineExecutor):
    """datatrove's SLURM executor: an array job of the ranks that have something to do."""

    def get_incomplete_ranks(self, ranks: Iterable[int] | None = None, skip_completed: bool | None = None) -> list[int]:
        """The ranks to start."""
        del skip_completed
        to_do: list[int] = self.pipeline[0].ranks_to_do(self.world_size)
        return to_do if ranks is None else [rank for rank in ranks if rank in to_do]

    def launch_merge_stats(self) -> None:
        """Nothing: a third job, for statistics that nobody reads."""


def read_job_id(printed: str) -> str:
    """The number in what sbatch prints, which may go on with the name of a cluster."""
    found = re.search(r"\d+", printed)
    assert found is not None, printed
    return found.group()
