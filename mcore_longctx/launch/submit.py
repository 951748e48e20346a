"""The chain on disk and in SLURM's queue: `RUN/slurm/`, `RUN/slurm/jobs.json`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.launch.chain import Chain
from mcore_longctx.launch.partition import check_partition
from mcore_longctx.manifest import write_atomic
from mcore_longctx.recipe.load import dump_recipe

__all__ = ["check_submit", "submit_chain", "write_chain"]

_OURS = ("recipe.yaml", "run.json", "slurm", "logs", ".lock")


def write_chain(chain: Chain, *, force: bool = False) -> list[str]:
    """Write recipe and scripts. A script that was edited since it was written is kept, unless `force`.

    Returns:
        A line for each file.

    Raises:
        ConfigError: the run folder is somebody else's, or jobs in the queue would read another recipe than they were submitted with.
    """
    folder = chain.recipe.run_folder
    if folder.is_dir() and not (folder / "run.json").exists() and any(p.name not in _OURS for p in folder.iterdir()):
        raise ConfigError("is already there and is not a run folder (no run.json)", where=folder, fix="choose another output")
    slurm, recipe, text = folder / "slurm", folder / "recipe.yaml", dump_recipe(chain.recipe)
    book = _read_book(slurm)
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != text:
        _refuse_while_queued(book, slurm, "jobs of this chain would read a changed recipe")
    slurm.mkdir(parents=True, exist_ok=True)
    write_atomic(recipe, text)
    written: dict[str, str] = book.setdefault("scripts", {})
    said = [f"{recipe}: the recipe as it will run"]
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
    write_atomic(slurm / "jobs.json", json.dumps(book, indent=1) + "\n")
    return said


def submit_chain(chain: Chain, environment: Mapping[str, str] = os.environ) -> list[tuple[str, str]]:
    """Submit the scripts as they lie in the run folder, each after the one before. Returns (name, job id).

    sbatch hands the environment of the caller on: that is how secrets, of which scripts hold the names, get into the jobs.

    Raises:
        ConfigError: no sbatch here, a secret that is not set, jobs of this chain still in the queue, a script that asks for more
            than its partition gives, or sbatch refused a script (then none is left).
    """
    check_submit(chain, environment)
    slurm = chain.recipe.run_folder / "slurm"
    for job in chain.jobs:
        check_partition(slurm / f"{job.name}.sbatch", environment)
    book = _read_book(slurm)
    submitted: list[tuple[str, str]] = []
    for job in chain.jobs:
        after = [f"--dependency=afterok:{submitted[-1][1]}"] if submitted else []
        command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *after, str(slurm / f"{job.name}.sbatch")]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
        if answer.returncode != 0:
            ids = [job_id for _, job_id in submitted]
            if ids:
                subprocess.run(["scancel", *ids], check=False)
            what = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
            raise ConfigError(
                f"sbatch: {what}", where=slurm / f"{job.name}.sbatch", fix="nothing of the chain is left in the queue"
            )
        submitted.append((job.name, answer.stdout.strip().partition(";")[0]))
    book["jobs"] = [{"name": name, "id": job_id} for name, job_id in submitted]
    write_atomic(slurm / "jobs.json", json.dumps(book, indent=1) + "\n")
    return submitted


def check_submit(chain: Chain, environment: Mapping[str, str] = os.environ) -> None:
    """What would stop a submission, before anything is written.

    Raises:
        ConfigError: no sbatch here, a secret that is not set, or jobs of this chain still in the queue.
    """
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        raise ConfigError("sbatch is not on PATH: nothing was submitted", fix="submit on a login node of the cluster")
    missing = [name for name in chain.recipe.cluster.secrets if not environment.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set, nothing was submitted", where="cluster.secrets", fix="export it first")
    slurm = chain.recipe.run_folder / "slurm"
    _refuse_while_queued(_read_book(slurm), slurm, "the chain is already submitted")


def _refuse_while_queued(book: dict[str, Any], slurm: Path, what: str) -> None:
    ids = {str(job["id"]): str(job["name"]) for job in book.get("jobs", [])}
    if not ids or shutil.which("squeue") is None:
        return
    # of this user's jobs: squeue forgets a job that has ended, and complains when it is asked for one
    asked = subprocess.run(["squeue", "--noheader", "--me", "--format=%A %T"], capture_output=True, text=True, check=False)
    rows = [line.split() for line in asked.stdout.splitlines()]
    alive = [(row[0], f"{ids[row[0]]} (job {row[0]}, {row[1].lower()})") for row in rows if len(row) == 2 and row[0] in ids]
    if alive:
        names, numbers = ", ".join(name for _, name in alive), " ".join(number for number, _ in alive)
        raise ConfigError(f"{what}: {names}", where=slurm, fix=f"wait for them, or scancel {numbers}")


def _read_book(slurm: Path) -> dict[str, Any]:
    path = slurm / "jobs.json"
    if not path.is_file():
        return {"format": 1}
    try:
        book: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise LongctxError("damaged", where=path, fix="remove it; scripts that you have edited are kept") from None
    return book


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
