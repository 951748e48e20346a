"""Checkpoints of a training: written whole or not at all, verified before anything is trained on, loadable by everybody.

A folder holds what megatron-core's `dist_checkpointing` writes (`torch_dist`: model, optimizer, schedule, iteration), `common.pt` in
the style of 0.16 also under 0.19, the card, the `hf/` files of the model it came from, and a manifest with a sha256 per file. All
ranks write into one partial folder; rank 0 gives it its name when everything is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from mcore_longctx import checkpoint_folder as store
from mcore_longctx.errors import CheckpointError, TrainingError
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import staged_folder, verify_manifest, write_manifest
from mcore_longctx.recipe import CARD, CheckpointCard, ModelShape, read_card, write_card
from mcore_longctx.rope import RopeScaling
from mcore_longctx.train.control import Control
from mcore_longctx.train.job import TrainJob
from mcore_longctx.train.optimizer import load_optimizer_state, prepare_optimizer_state

__all__ = ["Checkpointer", "verify_checkpoint"]

_HF_FOLDER = "hf"
_COMMON = "common.pt"
_NEEDED = (".metadata", "metadata.json", _COMMON, CARD)
# every parameter of every layout finds its optimizer state: tensors have the shape and name of the model's
_LAYOUT_FREE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def verify_checkpoint(folder: Path, *, shape: ModelShape, rope: RopeScaling) -> Mapping[str, Any]:
    """Check every byte of a checkpoint and that it belongs to this model and rope. Returns its manifest. Runs nothing it reads.

    Raises:
        CheckpointError: nothing there, unfinished, damaged, of another model or rope, or holding a pickle that names something
            which a checkpoint has no use for.
    """
    if not folder.exists():
        raise CheckpointError("no checkpoint here", where=folder, fix="check the path")
    manifest = verify_manifest(folder, "checkpoint")
    for name in _NEEDED:
        if name not in manifest["files"]:
            raise CheckpointError(f"no {name} in the manifest", where=folder, fix="use another copy of the checkpoint")
    read_card(folder).check(shape=shape, rope=rope, where=folder)
    stored = read_torch_dist(folder)
    unlisted = {chunk.file.name for tensor in stored.tensors.values() for chunk in tensor.chunks} - set(manifest["files"])
    if unlisted:
        raise CheckpointError(
            f"{min(unlisted)} is used but not in the manifest", where=folder, fix="use another copy of the checkpoint"
        )
    return manifest


class Checkpointer:
    """Saves and loads the state of one training. Every method is collective.

    Args:
        job: the job.
        settings: what decides its losses, stored in every checkpoint.
        source: the checkpoint that training starts from, or goes on from; its `hf/` folder is carried on.
        wrapped: the model in DistributedDataParallel.
        optimizer: from `build_optimizer`.
        schedule: from `build_schedule`.
        control: agreement among the ranks.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        settings: Mapping[str, Any],
        source: Path,
        wrapped: Any,
        optimizer: Any,
        schedule: Any,
        control: Control,
    ) -> None:
        self.job, self.settings, self.source = job, settings, source
        self.wrapped, self.optimizer, self.schedule, self.control = wrapped, optimizer, schedule, control
        self._replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._bytes = self._estimate_bytes()

    def check_free_space(self) -> None:
        """Raise TrainingError unless one more checkpoint fits."""
        self.control.on_rank0(lambda: store.check_free_space(self.job.checkpoints, self._bytes, 4 * self.control.world_size + 64))

    def save(self, iteration: int) -> Path:
        """Write the state after `iteration` steps, then remove what is no longer kept.

        Raises:
            TrainingError: no room, or writing failed. The checkpoints that were there are untouched.
        """
        self.check_free_space()
        final = store.iteration_folder(self.job.checkpoints, iteration)
        with ExitStack() as staging:  # rank 0 holds the partial folder open; an error on any rank removes it
            partial = Path(self.control.on_rank0(lambda: str(self._stage(staging, final))))
            self._write_tensors(partial, iteration, final)
            self.control.on_rank0(lambda: self._describe(partial, iteration, final))
            self.control.on_rank0(lambda: self._publish(staging, final, iteration))
        return final

    def load(self, folder: Path) -> int:
        """Fill optimizer and schedule from a verified checkpoint of this stage, at any layout. Returns its iteration.

        The model's own weights must have been loaded before it was wrapped (`load_model_weights`).
        """
        prepare_optimizer_state(self.optimizer)
        model = self.wrapped.module.sharded_state_dict(metadata=self._metadata())
        wanted = {"optimizer": self.optimizer.sharded_state_dict(model, is_loading=True, metadata=self._metadata())}
        try:
            loaded, _, absent = dist_checkpointing.load(wanted, str(folder), strict="return_all")
        except (RuntimeError, OSError, EOFError, ValueError, CheckpointingException, CheckpointException) as error:
            raise CheckpointError(
                f"cannot be read: {_first_line(error)}", where=folder, fix="use another copy of the checkpoint"
            ) from error
        if absent:
            raise CheckpointError(f"holds no {min(absent)}", where=folder, fix="use a checkpoint of this model")
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        self.schedule.load_state_dict(loaded["opt_param_scheduler"])
        iteration = int(loaded["iteration"])
        if iteration != store.iteration_of(folder):
            raise CheckpointError(f"holds iteration {iteration:,}", where=folder, fix="give the folder its own name back")
        return iteration

    # ------------------------------------------------------------------ writing

    def _stage(self, staging: ExitStack, final: Path) -> Path:
        store.remove_leftovers(self.job.checkpoints)
        return staging.enter_context(staged_folder(final))

    def _write_tensors(self, partial: Path, iteration: int, final: Path) -> None:
        try:
            model = self.wrapped.module.sharded_state_dict(metadata=self._metadata())
            state = {
                "model": model,
                "optimizer": self.optimizer.sharded_state_dict(model, is_loading=False, metadata=self._metadata()),
                "opt_param_scheduler": self.schedule.state_dict(),
                "iteration": iteration,
                "checkpoint_version": 3.0,
            }
            strategy = FullyParallelSaveStrategyWrapper(_InThisProcess("torch_dist", 1), self._replicas)
            dist_checkpointing.save(state, str(partial), strategy, content_metadata=dict(_LAYOUT_FREE))
        except CheckpointException as error:  # raised on every rank: torch's writer tells the others
            failure = self._save_failed(error, final)
            failure.agreed = True
            raise failure from None
        except OSError as error:
            raise self._save_failed(error, final) from error

    def _describe(self, partial: Path, iteration: int, final: Path) -> None:
        try:
            if not (
                partial / _COMMON
            ).exists():  # megatron-core 0.19 keeps this inside the .distcp files, where 0.16 cannot find it
                torch.save(dist_checkpointing.load_common_state_dict(str(partial)), partial / _COMMON)
            if (self.source / _HF_FOLDER).is_dir():
                shutil.copytree(self.source / _HF_FOLDER, partial / _HF_FOLDER)
            stage = self.job.stage
            card = CheckpointCard(
                shape=self.job.shape,
                rope=self.job.rope,
                tokenizer_sha256=self.job.tokenizer_sha256,
                stage=stage.name,
                iteration=iteration,
            )
            write_card(partial, card)
            write_manifest(
                partial,
                "checkpoint",
                stage=stage.name,
                iteration=iteration,
                consumed_samples=iteration * stage.global_batch_size,
                rope_fingerprint=self.job.rope.fingerprint(),
                layout=stage.parallel.describe(),
                settings=dict(self.settings),
            )
        except OSError as error:
            raise self._save_failed(error, final) from error

    def _publish(self, staging: ExitStack, final: Path, iteration: int) -> None:
        try:
            staging.close()
        except OSError as error:
            raise self._save_failed(error, final) from error
        verify_manifest(final, "checkpoint", hashes=False)  # nothing is removed before its successor is known to be there
        store.write_tracker(self.job.checkpoints, iteration)
        store.remove_old(self.job.checkpoints, self.job.stage.keep_checkpoints, self.job.stage.name)

    def _save_failed(self, error: BaseException, final: Path) -> TrainingError:
        newest = store.latest_checkpoint(self.job.checkpoints)
        kept = f"{newest.name} is untouched" if newest is not None else "no earlier checkpoint of this stage exists"
        return TrainingError(f"the checkpoint could not be written: {_first_line(error)}", where=final, fix=kept)

    def _metadata(self) -> dict[str, Any]:
        return {**_LAYOUT_FREE, "dp_cp_group": self._replicas}

    def _estimate_bytes(self) -> int:
        """Weights, and fp32 copies of them and of both moments; `hf/` besides."""
        mine = 0.0
        if self._replicas.rank() == 0:
            mine = float(sum(p.numel() * (p.element_size() + 12) for p in self.wrapped.parameters()))
        tensors = int(self.control.gather([mine]).sum())
        files = [path for path in (self.source / _HF_FOLDER).rglob("*") if path.is_file()]
        return tensors + sum(path.stat().st_size for path in files)


class _InThisProcess(TorchDistSaveShardedStrategy):
    """Saves with torch's own writer, in the rank's own process.

    Megatron's writer forks processes and keeps a manager process beside each rank: SLURM sends a stop signal to every process of a
    step, which kills the manager, and the next save, the one that the signal asked for, fails.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save_state_dict(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=FileSystemWriter(str(checkpoint_dir)),
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_first_line(cause)}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
