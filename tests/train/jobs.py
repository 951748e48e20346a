"""Tiny training jobs for tests: a random Llama, packed samples, and ranks that can be watched and killed."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.convert import Execution, import_hf
from mcore_longctx.data import IndexedWriter
from mcore_longctx.families import ModelShape, read_shape
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe import OptimizerSection, Parallel, Stage, TokenCount, read_card
from mcore_longctx.rope import RopeScaling
from mcore_longctx.train import TrainJob
from tests.convert.hf_folders import llama_config, random_weights, write_folder
from tests.multiproc import _FORKSERVER
from tests.sidecars import write_runs

SEQ_LENGTH, SAMPLES = 64, 20
# 126 entries: padded to 128 with TP 1 and to 256 with TP 2
CONFIG = llama_config(hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=32, rope_theta=10000.0)
ROPE = RopeScaling(type="llama3", head_dim=16, rope_theta=10000.0, factor=2, original_max_position_embeddings=32)


def make_world(folder: Path) -> Path:
    """FOLDER/base, a torch_dist checkpoint with the model's own rope, and FOLDER/data/set, packed samples."""
    weights = {name: tensor * 0.05 if tensor.dim() > 1 else tensor * 0 + 1 for name, tensor in random_weights(CONFIG).items()}
    import_hf(write_folder(folder / "hf", CONFIG, weights), folder / "base", how=Execution(checksum=True))
    write_data(folder / "data")
    return folder


def write_data(folder: Path, *, top: int = 126, all_masked: bool = False) -> Path:
    """Samples of repeating patterns, with loss on uneven parts, and their manifest. Returns the prefix."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    period = rng.integers(3, 9, SAMPLES)
    rows = np.stack([np.resize(rng.integers(0, top, n), SEQ_LENGTH) for n in period]).astype(np.uint16)
    rows[:, -1] = top - 1  # the largest id occurs in every sample
    cuts = np.concatenate([[i * SEQ_LENGTH, i * SEQ_LENGTH + 8 + 2 * i] for i in range(SAMPLES)] + [[SAMPLES * SEQ_LENGTH]])
    count = len(cuts) - 1
    with IndexedWriter(folder / "set", "uint16") as writer:
        for row in rows:
            writer.add(row)
    write_runs(
        folder / "set",
        seq_length=SEQ_LENGTH,
        documents=[("patterns", "a")],
        first_run=np.arange(SAMPLES + 1) * 2,
        document=np.zeros(count),
        start=np.zeros(count),
        length=np.diff(cuts),
        loss=(np.arange(count) % 2 == 1) & (not all_masked),
    )
    write_manifest(folder, "data", name="set", samples=SAMPLES)
    return folder / "set"


def make_job(world: Path, run: str, **changes: Any) -> TrainJob:
    """A job into WORLD/RUN. `changes` are fields of the job, of its stage, of its optimizer or of its layout."""
    card, out = read_card(world / "base"), world / run
    optimizer = _take(changes, OptimizerSection(lr=3e-3, min_lr=1e-4, lr_warmup_iters=2, weight_decay=0.1, clip_grad=1.0))
    parallel = _take(changes, Parallel())
    fields: dict[str, Any] = {
        "name": "extend",
        "kind": "pretrain",
        "data": "set",
        "seq_length": TokenCount(SEQ_LENGTH),
        "global_batch_size": 4,
        "train_iters": 8,
        "save_interval": 2,
        "keep_checkpoints": 2,
        "precision": "fp32",
    }
    fields |= {name: changes.pop(name) for name in list(changes) if name in Stage.__dataclass_fields__}
    job = TrainJob(
        shape=card.shape,
        rope=ROPE,
        start_rope=card.rope,
        stage=Stage(optimizer=optimizer, parallel=parallel, **fields),
        data_prefix=world / "data" / "set",
        start_checkpoint=world / "base",
        checkpoints=out / "checkpoints" / "extend",
        metrics_path=out / "metrics" / "extend.jsonl",
        tensorboard=out / "tensorboard" / "extend",
        log_folder=out / "logs" / "extend",
        seed=7,
    )
    return replace(job, **changes)


def _take(changes: dict[str, Any], section: Any) -> Any:
    return replace(section, **{name: changes.pop(name) for name in list(changes) if name in type(section).__dataclass_fields__})


def shape() -> ModelShape:
    return read_shape(CONFIG)


class Ranks:
    """The ranks of one job, each in its own process; what they print is kept.

    Args:
        job: the job.
        before: an importable function that each rank calls first, to arrange for an accident.
        deadline: seconds after which the ranks are killed and the test fails.
        size: ranks, if not those of the layout.
        folder: where what they print is kept; in the log folder if None.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        before: Callable[..., None] | None = None,
        args: tuple[Any, ...] = (),
        deadline: float = 240,
        size: int = 0,
        folder: Path | None = None,
    ):
        self.job, self.size, self.deadline = job, size or job.stage.parallel.world_size, time.monotonic() + deadline
        job.log_folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder or job.log_folder / "ranks"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.processes = [
            _FORKSERVER.Process(target=_rank_main, args=(rank, self.size, self.folder, job, before, args), daemon=True)
            for rank in range(self.size)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """Exit code of every rank (negative: the signal that killed it)."""
        for process in self.processes:
            process.join(max(0.0, self.deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if late:
            self.kill()
            raise AssertionError(f"ranks {late} did not end; rank 0 said:\n{self.output(0)[-2000:]}")
        return [int(process.exitcode) for process in self.processes]

    def wait_for(self, text: str) -> None:
        """Until rank 0 has printed `text`."""
        while text not in self.output(0):
            if time.monotonic() > self.deadline or not self.processes[0].is_alive():
                self.kill()
                raise AssertionError(f"no {text!r}; rank 0 said:\n{self.output(0)[-2000:]}")
            time.sleep(0.002)

    def send(self, number: int, ranks: range | None = None) -> None:
        for rank in range(self.size) if ranks is None else ranks:
            os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """kill -9, all of them."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self, rank: int, stream: str = "") -> str:
        """What a rank has printed so far: both streams, or `out` or `err`."""
        names = [stream] if stream else ["out", "err"]
        paths = [self.folder / f"{rank}.{name}" for name in names]
        return "".join(path.read_text() for path in paths if path.exists())

    def errors(self) -> list[str]:
        """The lines for the user on stderr of all ranks."""
        return [
            line
            for rank in range(self.size)
            for line in self.output(rank, "err").splitlines()
            if line.startswith("mcore-longctx:")
        ]


def train(job: TrainJob, **options: Any) -> Ranks:
    """Run a job that must end well."""
    ranks = Ranks(job, **options)
    codes = ranks.wait()
    assert codes == [0] * ranks.size, ranks.output(0)[-3000:] + ranks.output(ranks.size - 1, "err")[-3000:]
    return ranks


def refused(job: TrainJob, code: int = 2, **options: Any) -> str:
    """Run a job that must fail with one line, which is returned, and with the same code on every rank."""
    ranks = Ranks(job, **options)
    codes = ranks.wait()
    assert codes == [code] * ranks.size, (codes, ranks.output(0)[-3000:])
    (line,) = ranks.errors()
    return line


def _rank_main(
    rank: int, size: int, folder: Path, job: TrainJob, before: Callable[..., None] | None, args: tuple[Any, ...]
) -> None:
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
    code = 99
    try:
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        import torch

        torch.set_num_threads(1)
        store = torch.distributed.FileStore(str(folder / "store"), size)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        from mcore_longctx.train.loop import train_stage

        if before is not None:
            before(rank, *args)
        code = train_stage(job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def die_in_save(rank: int, module: str, name: str, call: int, after: bool) -> None:
    """kill -9 of the trainer at the `call`-th call of a function that saving uses, before it or after it."""
    owner = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    last = name.rpartition(".")[2]
    original, calls, trainer = getattr(owner, last), [0], os.getpid()

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            os.kill(trainer, signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls[0] == call:
            os.kill(trainer, signal.SIGKILL)
            time.sleep(60)  # in a writer: until it follows
        return result

    setattr(owner, last, deadly)


def rows(job: TrainJob) -> list[dict[str, Any]]:
    """The metric lines, without what depends on the clock or the machine."""
    clock = ("tokens_per_second", "memory_bytes", "seconds")
    lines = [json.loads(line) for line in job.metrics_path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Name and place of every tensor of a checkpoint, optimizer state included, and the sha256 of its bytes."""
    import torch

    found = {}
    for name, tensor in read_torch_dist(folder).tensors.items():
        for chunk in tensor.chunks:
            with chunk.file.open("rb") as file:
                file.seek(chunk.offset)
                values = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
            found[f"{name} {chunk.offsets}"] = hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def start_at(job: TrainJob, source: Path) -> TrainJob:
    """Copy one checkpoint of another run into an empty job's folder, so that it goes on from there."""
    shutil.copytree(source, job.checkpoints / source.name)
    return job
