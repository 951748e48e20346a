"""The chain on disk and in SLURM's queue: `RUN/slurm/`, with what was written (`written.json`) and submitted (`jobs.txt`)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mcore_longctx.data.workspace import lock_folder
from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.launch.chain import Chain
from mcore_longctx.launch.partition import check_partition
from mcore_longctx.manifest import write_atomic
from mcore_longctx.recipe import Recipe
from mcore_longctx.recipe.load import dump_recipe, load_recipe

__all__ = ["check_submit", "hold_chain", "submit_chain", "write_chain"]

_OURS = ("recipe.yaml", "run.json", "slurm", "logs", ".lock")
_WRITTEN = "written.json"  # {"recipe": sha256, "scripts": {name: sha256}}: what was edited since has another one
_JOBS = "jobs.txt"  # a line `id name` for each job, as soon as sbatch has taken it; submit.sh reads and writes the same


@contextmanager
def hold_chain(chain: Chain) -> Iterator[None]:
    """Nobody else writes or submits this chain meanwhile: no other `launch`, no `submit.sh`.

    Raises:
        ConfigError: the run folder is somebody else's: nothing is left in it.
        InUseError: another one is at it.
        DataError: the folder cannot be made, written or locked.
    """
    _refuse_foreign(chain.recipe.run_folder)
    slurm = chain.recipe.run_folder / "slurm"
    with lock_folder(slurm, who="launch"):
        yield


def write_chain(chain: Chain, *, force: bool = False, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Write recipe and scripts. A script that was edited since it was written is kept, unless `force`.

    Returns:
        A line for each file.

    Raises:
        ConfigError: the run folder is somebody else's, its recipe was edited and says something else than this one (unless `force`), or
            jobs in the queue would read another recipe than they were submitted with.
        LongctxError: what was noted of files or jobs cannot be read.
    """
    folder = chain.recipe.run_folder
    _refuse_foreign(folder)
    slurm, recipe, text = folder / "slurm", folder / "recipe.yaml", dump_recipe(chain.recipe)
    book = _read_written(slurm)
    edited = not force and recipe.is_file() and book["recipe"] not in (None, _digest(recipe.read_bytes()))
    keep = edited and _says(recipe, chain.recipe)
    if edited and not keep:
        raise ConfigError(
            "edited since it was written, and says something else than this recipe",
            where=recipe,
            fix=f"launch {recipe} to go by it, or --force writes it anew",
        )
    if recipe.is_file() and not keep and recipe.read_text(encoding="utf-8", errors="replace") != text:
        _refuse_while_queued(slurm, "jobs of this chain would read a changed recipe", environment)
    slurm.mkdir(parents=True, exist_ok=True)
    if not keep:
        write_atomic(recipe, text)
        book["recipe"] = _digest(text.encode())
    written: dict[str, str] = book["scripts"]
    said = [f"{recipe}: " + ("edited since it was written, kept: it says the same" if keep else "the recipe as it will run")]
    for name, script in chain.scripts.items():
        path = slurm / name
        if not force and path.exists() and _digest(path.read_bytes()) not in (written.get(name), _digest(script.encode())):
            said.append(f"{path}: edited since it was written, kept (--force writes it anew)")
            continue
        write_atomic(path, script)
        if path.suffix == ".sh":
            path.chmod(path.stat().st_mode | path.stat().st_mode >> 2 & 0o111)  # who may read it may run it
        written[name] = _digest(script.encode())
        said.append(f"{path}")
    write_atomic(slurm / _WRITTEN, json.dumps(book, indent=1) + "\n")
    return said


def submit_chain(chain: Chain, environment: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Submit the scripts as they lie in the run folder, each after the one before. Returns (name, job id).

    sbatch hands the environment of the caller on: that is how secrets, of which scripts hold the names, get into the jobs. An id is
    written down before the next job is submitted, and whatever ends this early (sbatch refuses, Ctrl-C) cancels what was submitted.

    Raises:
        ConfigError: no sbatch here, a secret that is not set, jobs of this chain still in the queue or a queue that does not answer, a
            script that asks for more than its partition gives, or sbatch refused a script: then none is left, or those that scancel
            did not take are named and stay written down.
    """
    check_submit(chain, environment)
    slurm = chain.recipe.run_folder / "slurm"
    for job in chain.jobs:
        check_partition(slurm / f"{job.name}.sbatch", environment)
    jobs, submitted = slurm / _JOBS, list[tuple[str, str]]()
    jobs.write_text("", encoding="utf-8")  # what stood there has left the queue
    try:
        for job in chain.jobs:
            job_id = _sbatch(slurm / f"{job.name}.sbatch", submitted, environment)
            submitted.append((job.name, job_id))
            with jobs.open("a", encoding="utf-8") as file:
                file.write(f"{job_id} {job.name}\n")
                file.flush()
                os.fsync(file.fileno())
    except BaseException as error:
        left = _cancel(submitted, jobs, environment)
        if isinstance(error, ConfigError):
            raise ConfigError(error.what, where=error.where, fix=left) from None
        raise
    return submitted


def _sbatch(script: Path, before: list[tuple[str, str]], environment: Mapping[str, str]) -> str:
    after = [f"--dependency=afterok:{before[-1][1]}"] if before else []
    command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *after, str(script)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
    job_id = answer.stdout.strip().partition(";")[0]
    if answer.returncode != 0 or not job_id.isdigit():
        what = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}, no job id"])[-1]
        raise ConfigError(f"sbatch: {what}", where=script)
    return job_id


def _cancel(submitted: list[tuple[str, str]], jobs: Path, environment: Mapping[str, str]) -> str:
    """Take back what was submitted. Returns what is left, for people."""
    try:
        command = ["scancel", *(job_id for _, job_id in submitted)]
        answer = (
            subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment)) if submitted else None
        )
    except OSError as error:
        problem = str(error)
    else:
        if answer is None or answer.returncode == 0:
            with suppress(OSError):  # then ids of jobs that are gone stay there: harmless
                jobs.write_text("", encoding="utf-8")
            return "nothing of the chain is left in the queue"
        problem = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
    names = ", ".join(f"{name} (job {job_id})" for name, job_id in submitted)
    with suppress(OSError):  # the last one may not stand there yet
        jobs.write_text("".join(f"{job_id} {name}\n" for name, job_id in submitted), encoding="utf-8")
    return f"scancel failed too ({problem}): still in the queue may be {names}; scancel {' '.join(i for _, i in submitted)}"


def check_submit(chain: Chain, environment: Mapping[str, str] = os.environ) -> None:
    """What would stop a submission, before anything is written.

    Raises:
        ConfigError: no sbatch here, a secret that is not set, jobs of this chain still in the queue, or a queue that does not answer.
    """
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        raise ConfigError("sbatch is not on PATH: nothing was submitted", fix="submit on a login node of the cluster")
    missing = [name for name in chain.recipe.cluster.secrets if not environment.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set, nothing was submitted", where="cluster.secrets", fix="export it first")
    _refuse_while_queued(chain.recipe.run_folder / "slurm", "the chain is already submitted", environment)


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and not (folder / "run.json").exists() and any(p.name not in _OURS for p in folder.iterdir()):
        raise ConfigError("is already there and is not a run folder (no run.json)", where=folder, fix="choose another output")


def _refuse_while_queued(slurm: Path, what: str, environment: Mapping[str, str]) -> None:
    ids = _read_jobs(slurm)
    if not ids:
        return
    # of this user's jobs: squeue forgets a job that has ended, and complains when it is asked for one
    command = ["squeue", "--noheader", "--me", "--format=%A %T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
        problem = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1] if asked.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise ConfigError(
            f"squeue does not answer ({problem}), and the jobs of this chain may be in the queue",
            where=slurm / _JOBS,
            fix="try again on a login node; if none of them is there any more, remove this file",
        )
    rows = [line.split() for line in asked.stdout.splitlines()]
    alive = [(row[0], f"{ids[row[0]]} (job {row[0]}, {row[1].lower()})") for row in rows if len(row) == 2 and row[0] in ids]
    if alive:
        names, numbers = ", ".join(name for _, name in alive), " ".join(number for number, _ in alive)
        raise ConfigError(f"{what}: {names}", where=slurm, fix=f"wait for them, or scancel {numbers}")


def _read_jobs(slurm: Path) -> dict[str, str]:
    """Names by id."""
    path = slurm / _JOBS
    if not path.is_file():
        return {}
    rows = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(len(row) != 2 or not row[0].isdigit() for row in rows):
        raise LongctxError(
            "damaged: expected lines `id name`", where=path, fix="remove it when no job of this chain is in the queue"
        )
    return {row[0]: row[1] for row in rows}


def _read_written(slurm: Path) -> dict[str, Any]:
    path = slurm / _WRITTEN
    if not path.is_file():
        return {"format": 1, "recipe": None, "scripts": {}}
    try:
        book: Any = json.loads(path.read_text(encoding="utf-8"))
        scripts, recipe = book["scripts"], book["recipe"]
        good = isinstance(scripts, dict) and all(isinstance(text, str) for text in (recipe, *scripts.values()))
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise LongctxError("damaged", where=path, fix="remove it; scripts that you have edited are kept")
    return {"format": 1, "recipe": recipe, "scripts": scripts}


def _says(path: Path, recipe: Recipe) -> bool:
    try:
        return load_recipe(path) == recipe
    except LongctxError:
        return False


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
