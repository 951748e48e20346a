"""The chain on disk and in SLURM's queue: `RUN/slurm/`, `RUN/slurm/jobs.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.launch.chain import Chain
from mcore_longctx.manifest import write_atomic
from mcore_longctx.recipe.load import dump_recipe

__all__ = ["submit_chain", "write_chain"]

_OURS = ("recipe.yaml", "run.json", "slurm", "logs", ".lock")


def write_chain(chain: Chain, *, force: bool = False) -> Iterator[str]:
    """Write recipe and scripts. A script that was edited since it was written is kept, unless `force`. Yields a line each.

    Raises:
        ConfigError: the run folder is somebody else's.
    """
    folder = chain.recipe.run_folder
    if folder.is_dir() and not (folder / "run.json").exists() and any(p.name not in _OURS for p in folder.iterdir()):
        raise ConfigError("is already there and is not a run folder (no run.json)", where=folder, fix="choose another output")
    slurm = folder / "slurm"
    slurm.mkdir(parents=True, exist_ok=True)
    book = _read_book(slurm)
    written: dict[str, str] = book.setdefault("scripts", {})
    write_atomic(folder / "recipe.yaml", dump_recipe(chain.recipe))
    yield f"{folder / 'recipe.yaml'}: the recipe as it will run"
    for name, text in chain.scripts.items():
        path = slurm / name
        if path.exists() and _digest(path.read_text(encoding="utf-8")) not in (written.get(name), _digest(text)) and not force:
            yield f"{path}: edited since it was written, kept (--force writes it anew)"
            continue
        write_atomic(path, text)
        if path.suffix == ".sh":
            path.chmod(path.stat().st_mode | 0o111 & ~_umask())
        written[name] = _digest(text)
        yield f"{path}"
    write_atomic(slurm / "jobs.json", json.dumps(book, indent=1) + "\n")


def submit_chain(chain: Chain) -> list[tuple[str, str]]:
    """Submit the scripts as they lie in the run folder, each after the one before. Returns (name, job id).

    Raises:
        ConfigError: no sbatch here, jobs of this chain still in the queue, or sbatch refused a script (then none is left).
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on PATH: nothing was submitted", fix="submit on a login node of the cluster")
    slurm = chain.recipe.run_folder / "slurm"
    book = _read_book(slurm)
    _refuse_twice(book, slurm)
    submitted: list[tuple[str, str]] = []
    for job in chain.jobs:
        after = [f"--dependency=afterok:{submitted[-1][1]}"] if submitted else []
        command = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", *after, str(slurm / f"{job.name}.sbatch")]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
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


def _refuse_twice(book: dict[str, Any], slurm: Path) -> None:
    ids = {str(job["id"]): str(job["name"]) for job in book.get("jobs", [])}
    if not ids:
        return
    asked = subprocess.run(
        ["squeue", "--noheader", "--format=%A %T", f"--jobs={','.join(ids)}"], capture_output=True, text=True, check=False
    )
    rows = [line.split() for line in asked.stdout.splitlines()]
    alive = [f"{ids[row[0]]} (job {row[0]}, {row[1].lower()})" for row in rows if len(row) == 2 and row[0] in ids]
    if alive:
        raise ConfigError(
            f"the chain is already submitted: {', '.join(alive)}",
            where=slurm,
            fix="wait for it, or scancel " + " ".join(ids),
        )


def _read_book(slurm: Path) -> dict[str, Any]:
    path = slurm / "jobs.json"
    if not path.is_file():
        return {"format": 1}
    try:
        book: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise LongctxError("damaged", where=path, fix="remove it; scripts that you have edited are kept") from None
    return book


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _umask() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
