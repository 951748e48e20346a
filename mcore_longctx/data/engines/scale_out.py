"""`data build` beyond one process tree, under datatrove's executors: ranks make the token shards, one job after them plans and packs.

    local   datatrove's local executor on this machine
    slurm   an array job of ranks, and a job that starts when all of them have ended well

Nothing is scheduled here. Tasks publish by rename and are done once (`data/tokens/tokenize.py`), so a rank may be killed, requeued or started
twice at any time; the same command again submits what is missing. OUT/jobs holds the scripts and logs.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mcore_longctx.data.build import BuildReport, build, check_output
from mcore_longctx.data.pack import check_name
from mcore_longctx.data.planning.separator import make_separator
from mcore_longctx.data.tokenizers import Tokenizer, load_tokenizer
from mcore_longctx.data.tokens.job import TokenJob, prepare_job
from mcore_longctx.data.workspace import lock_folder
from mcore_longctx.errors import ConfigError, InUseError

if TYPE_CHECKING:
    from mcore_longctx.data.engines.datatrove_steps import SlurmExecutor, TokenizeShards

__all__ = ["MAX_RANKS", "SlurmOptions", "Submitted", "launch"]

# SLURM's default MaxArraySize is 1001. datatrove would cut more ranks into several arrays, each waiting for the one before; a rank does
# any number of tasks, so nobody needs them (huggingface/datatrove#238)
MAX_RANKS = 1000
_OURS = ("array", "dependency", "job-name", "output", "error")  # sbatch options that belong to the engine


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What sbatch is told."""

    partition: str
    time: str  # limit of every job, as sbatch takes it
    cpus_per_task: int = 1  # of a rank, which has as many processes
    mem_per_cpu_gb: int = 2
    sbatch: Mapping[str, str] = field(default_factory=dict)  # more options, of all jobs
    finish_sbatch: Mapping[str, str] = field(default_factory=dict)  # of the job that plans and packs; they win


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Jobs that wait or run. `str(submitted)` is the text for the screen."""

    job_name: str
    ranks: int  # that have something to do
    tasks: int
    tasks_done_before: int
    array_job: str | None  # None: every shard is there
    finish_job: str
    logs: Path

    def as_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return asdict(self) | {"logs": str(self.logs)}

    def __str__(self) -> str:
        left = self.tasks - self.tasks_done_before
        lines = [f"job {self.finish_job} plans and packs; all {self.tasks:,} token shards are there"]
        if self.array_job is not None:
            lines = [
                f"array job {self.array_job}: {left:,} of {self.tasks:,} token shards in {self.ranks:,} ranks",
                f"job {self.finish_job}: plans and packs, when all of them have ended well (else it is cancelled)",
            ]
        return "\n".join(
            [
                *lines,
                f"  look: squeue --name {self.job_name}; logs: {self.logs}",
                "  the same command again does what is missing, if a job is killed",
            ]
        )


def launch(
    arguments: Mapping[str, Any],
    engine: Literal["local", "slurm"],
    *,
    ranks: int,
    workers: int = 1,
    slurm: SlurmOptions | None = None,
) -> BuildReport | Submitted:
    """Start `build(**arguments)` under an engine.

    Args:
        arguments: of `data.build.build`, without workers and progress. `out` is on a file system that every rank sees.
        engine: local runs everything and returns the report; slurm submits two jobs and returns.
        ranks: processes of the engine, each with its part of the tasks. The result is the same for any number.
        workers: of engine local: ranks at a time.
        slurm: of engine slurm.

    Raises:
        ConfigError: datatrove or SLURM is missing, sbatch refuses, or an option cannot be used.
        InUseError: another process, or a job that was submitted before, works on `out`.
        LongctxError: as `build`.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise ConfigError(f"{ranks} ranks: expected 1 to {MAX_RANKS:,}", fix="a rank does any number of tasks")
    out = Path(arguments["out"]).absolute()
    arguments = dict(arguments) | {"out": out}
    with _datatrove():
        if engine == "local":
            _tokenize_locally(arguments, ranks, workers)
            return build(**arguments, workers=workers)  # looks at every shard itself
        if slurm is None:
            raise ConfigError("engine slurm needs its options")
        _check_slurm(out, slurm)
        return _submit(arguments, ranks, slurm)


@contextmanager
def _datatrove() -> Iterator[None]:
    """The extra is there, and its log does not go to our screen."""
    try:
        from loguru import logger

        importlib.import_module("mcore_longctx.data.engines.datatrove_steps")
    except ModuleNotFoundError as error:
        if error.name not in ("loguru", "datatrove"):
            raise
        raise ConfigError("--engine: datatrove is not installed", fix="pip install 'mcore-longctx[datatrove]'") from None
    logger.disable("datatrove")
    try:
        yield
    finally:
        logger.enable("datatrove")


@contextmanager
def _prepared(arguments: Mapping[str, Any]) -> Iterator[tuple[TokenJob, Tokenizer]]:
    """OUT with the settings of its job, locked. What `build` would refuse at the end is refused here."""
    section, out, chats = arguments["section"], arguments["out"], arguments["chats"]
    check_name(arguments["name"])
    check_output(out)
    tokenizer = load_tokenizer(arguments["tokenizer"])
    with lock_folder(out):
        job = prepare_job(
            out,
            section.sources,
            tokenizer,
            vocab_size=arguments["model_vocab_size"],
            chats=chats,
            prompt_loss_from=section.prompt_loss_tokens,
            sentences=section.sentences,
            seed=arguments["seed"],
        )
        if not chats:
            make_separator(section, job)
        yield job, tokenizer


def _step(arguments: Mapping[str, Any], workers: int) -> TokenizeShards:
    from mcore_longctx.data.engines.datatrove_steps import TokenizeShards

    return TokenizeShards(
        arguments["out"],
        workers=workers,
        max_bad=arguments["section"].max_bad,
        verify_fraction=arguments.get("verify_fraction", 0.0),
    )


def _jobs_folder(job: TokenJob, engine: str, ranks: int) -> Path:
    """Scripts and logs of one number of ranks and one set of settings: datatrove keeps state in it."""
    settings = hashlib.sha256((job.folder / "settings.json").read_bytes()).hexdigest()[:8]
    return job.folder.parent / "jobs" / f"{engine}-{ranks}-{settings}"


def _tokenize_locally(arguments: Mapping[str, Any], ranks: int, workers: int) -> None:
    from mcore_longctx.data.engines.datatrove_steps import LocalExecutor, keep_tokenizer

    with _prepared(arguments) as (job, tokenizer):
        keep_tokenizer(tokenizer)
        LocalExecutor(
            pipeline=[_step(arguments, workers=1)],
            tasks=ranks,
            workers=workers,
            logging_dir=str(_jobs_folder(job, "local", ranks)),
            skip_completed=False,
        ).run()


# ------------------------------------------------------------------ SLURM
def _check_slurm(out: Path, options: SlurmOptions) -> None:
    for command in ("sbatch", "squeue"):
        if shutil.which(command) is None:
            raise ConfigError(f"--engine slurm: no command {command}", fix="run it where jobs are submitted")
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ConfigError("--engine slurm: this is a task of an array job itself", fix="run it where jobs are submitted")
    if shutil.which("launch_pickled_pipeline", path=_programs()) is None:
        raise ConfigError(
            f"--engine slurm: no command launch_pickled_pipeline in {_programs()}", fix="install datatrove beside mcore-longctx"
        )
    if re.search(r"\s", str(out)):
        raise ConfigError(
            "--engine slurm: the path has blanks, which the job script cannot hold", where=out, fix="use another output"
        )
    for name in (*options.sbatch, *options.finish_sbatch):
        if name in _OURS:
            raise ConfigError(f"--sbatch {name}: it is set by the engine", fix="remove it")


def _submit(arguments: Mapping[str, Any], ranks: int, options: SlurmOptions) -> Submitted:
    from mcore_longctx.data.engines.datatrove_steps import FinishBuild

    with _prepared(arguments) as (job, _):
        name = _job_name(arguments["out"])
        _refuse_second(name, arguments["out"])
        for leftover in job.folder.glob("*.partial-*"):  # of ranks that were killed: none of them runs any more
            leftover.unlink(missing_ok=True)
        done = sum(job.is_done(task) for task in range(len(job.tasks)))
        folder = _jobs_folder(job, "slurm", ranks)
        sbatch = {"cpus-per-task": str(options.cpus_per_task), **options.sbatch}
        finish_sbatch = {**sbatch, **options.finish_sbatch}
        step = _step(arguments, workers=int(sbatch["cpus-per-task"]))
        last_step = FinishBuild(arguments, workers=int(finish_sbatch["cpus-per-task"]))
        array = _executor(step, ranks, name, folder, options, sbatch)
        finish = _executor(last_step, 1, name, folder / "finish", options, finish_sbatch, array)
        try:
            finish.run()  # submits the array first
        except subprocess.CalledProcessError:
            fix = f"; job {array.job_id} is submitted and does no harm" if array.job_id not in (None, -1) else ""
            raise ConfigError("sbatch refuses (it says why above)", fix="change the options" + fix) from None
        return Submitted(
            job_name=name,
            ranks=len(step.ranks_to_do(ranks)),
            tasks=len(job.tasks),
            tasks_done_before=done,
            array_job=None if array.job_id == -1 else str(array.job_id),
            finish_job=str(finish.job_id),
            logs=folder,
        )


def _executor(
    step: Any,
    tasks: int,
    name: str,
    folder: Path,
    options: SlurmOptions,
    sbatch: Mapping[str, str],
    depends: SlurmExecutor | None = None,
) -> SlurmExecutor:
    from mcore_longctx.data.engines.datatrove_steps import SlurmExecutor, read_job_id

    return SlurmExecutor(
        pipeline=[step],
        tasks=tasks,
        time=options.time,
        partition=options.partition,
        mem_per_cpu_gb=options.mem_per_cpu_gb,
        job_name=name,
        qos="",  # datatrove's default would ask for `normal`, which not every site has
        # the interpreter's folder, because the script calls datatrove's program by its name
        env_command=f"export PATH={shlex.quote(_programs())}:$PATH",
        # a job that waits for one that has failed would wait for ever
        sbatch_args={"kill-on-invalid-dep": "yes", **sbatch},
        # since SLURM 22.05 srun does not take it from sbatch
        srun_args={"cpus-per-task": sbatch["cpus-per-task"]},
        depends=depends,
        logging_dir=str(folder),
        skip_completed=False,
        job_id_retriever=read_job_id,
    )


def _programs() -> str:
    return str(Path(sys.executable).parent)


def _job_name(out: Path) -> str:
    """The same for every submission on one folder, and only for those."""
    return f"data-{re.sub(r'[^A-Za-z0-9._-]', '_', out.name)}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"


def _refuse_second(name: str, out: Path) -> None:
    command = ["squeue", "--noheader", "--name", name, "--format", "%F"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ConfigError(f"squeue failed: {found.stderr.strip()}", fix="is SLURM up?")
    jobs = sorted(set(found.stdout.split()))
    if jobs:
        raise InUseError(
            f"jobs that were submitted before work on this folder ({', '.join(jobs)})",
            where=out,
            fix=f"wait for them, or end them: scancel --name {name}",
        )
