"""Checkpoints of a training: written whole or not at all, verified before anything is trained on, loadable by everybody.

A folder holds what megatron-core's `dist_checkpointing` writes (`torch_dist`: model, optimizer, schedule, iteration), `common.pt` in
the style of 0.16 also under 0.19, the card, the `hf/` files of the model it came from, and a manifest with a sha256 per file. All
ranks write into one partial folder; rank 0 gives it its name when everything is there.

A save has three parts, and is the same whether the training waits for it or goes on:

    begin     all ranks plan who writes what and take their data
    write     each rank writes, fsyncs and hashes its file: here, or in a process beside the training
    seal      all ranks tell that they have written; rank 0 adds the rest and the manifest, renames, removes what is no longer kept:
              here, or in a thread beside the training
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException

from mcore_longctx import checkpoint_folder as store
from mcore_longctx.errors import CheckpointError, TrainingError
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.manifest import verify_manifest, write_manifest
from mcore_longctx.recipe import CARD, CheckpointCard, ModelShape, read_card, write_card
from mcore_longctx.rope import RopeScaling
from mcore_longctx.train.control import Control
from mcore_longctx.train.job import TrainJob
from mcore_longctx.train.optimizer import keep_settings, load_optimizer_state, prepare_optimizer_state
from mcore_longctx.train.own_shards import own_shards
from mcore_longctx.train.writing import BesideTraining, SaveStrategy, Share

__all__ = ["Checkpointer", "check_moments", "verify_checkpoint"]

logger = logging.getLogger(__name__)

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


def verify_checkpoint(folder: Path, *, shape: ModelShape, rope: RopeScaling, hashes: bool = True) -> Mapping[str, Any]:
    """Check every byte of a checkpoint and that it belongs to this model and rope. Returns its manifest. Runs nothing it reads.

    Args:
        folder: the checkpoint.
        shape: of the model.
        rope: of the model.
        hashes: False: the bytes have been compared with the manifest before (`verify_manifest`, each rank its share).

    Raises:
        CheckpointError: nothing there, unfinished, damaged, of another model or rope, or holding a pickle that names something
            which a checkpoint has no use for.
    """
    if not folder.exists():
        raise CheckpointError("no checkpoint here", where=folder, fix="check the path")
    manifest = verify_manifest(folder, "checkpoint", hashes=hashes)
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


def check_moments(folder: Path, stage: str) -> None:
    """Raise CheckpointError unless a checkpoint, which has been verified, holds the state of an optimizer. Reads no tensor."""
    if not any(name.startswith("optimizer.state.exp_avg.") for name in read_torch_dist(folder).tensors):
        raise CheckpointError(
            f"holds no optimizer state, and stage {stage} has optimizer_from: previous",
            where=folder,
            fix="train the stage before it again, or begin with moments of 0: optimizer_from: none",
        )


@dataclass
class _Save:
    """One checkpoint on its way to the disk, as one rank sees it."""

    iteration: int
    partial: Path
    final: Path
    began: float  # time.perf_counter()
    strategy: SaveStrategy
    request: Any  # megatron-core's AsyncRequest
    writing: BesideTraining | None = None
    sealing: Thread | None = None  # rank 0
    is_written: bool = False  # all ranks have told so
    seal_error: BaseException | None = None
    waited: float = 0.0  # seconds that the training stood still for it


class Checkpointer:
    """Saves and loads the state of one training. Every method is collective, unless it says that it is not.

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
        self._under_way: _Save | None = None

    def check_free_space(self, *, saves: int = 1) -> None:
        """Raise TrainingError unless the checkpoints fit that will be there at once, when `saves` more are made."""
        folder, files = self.job.checkpoints, 2 * self.control.world_size + 64

        def check() -> None:
            count = store.checkpoints_to_come(folder, self.job.stage.keep_checkpoints, saves)
            store.check_free_space(folder, self._bytes, files, count=count)

        self.control.on_rank0(check)

    def save(self, iteration: int) -> Path:
        """Write the state after `iteration` steps, then remove what is no longer kept.

        Raises:
            TrainingError: no room, or writing failed. The checkpoints that were there are untouched.
        """
        self.begin(iteration, beside=False)
        self.finish()
        return store.iteration_folder(self.job.checkpoints, iteration)

    def begin(self, iteration: int, *, beside: bool) -> None:
        """Begin to save the state after `iteration` steps; a save that is under way is waited for.

        Args:
            iteration: steps.
            beside: let a process write while the training goes on; `advance` and `finish` do the rest. Otherwise the share of this
                rank is written when this returns.

        Raises:
            TrainingError: no room, or this save or the one before it failed.
        """
        self.finish()
        began = time.perf_counter()
        self.check_free_space()
        final = store.iteration_folder(self.job.checkpoints, iteration)
        partial = Path(self.control.on_rank0(lambda: self._begin_folder(final)))
        strategy = SaveStrategy("torch_dist", 1)
        try:
            request = dist_checkpointing.save(
                self._state(iteration),
                str(partial),
                FullyParallelSaveStrategyWrapper(strategy, self._replicas),
                async_sharded_save=True,
                content_metadata=dict(_LAYOUT_FREE),
            )
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failed(error, final) from error
        self._under_way = save = _Save(iteration, partial, final, began, strategy, request)
        if beside:
            save.writing = BesideTraining(strategy.writer.write)
        else:
            request.async_fn()
        save.waited = time.perf_counter() - began

    @property
    def is_under_way(self) -> bool:
        """Whether a save has begun and not ended. The same on all ranks; asks nobody."""
        return self._under_way is not None

    @property
    def is_busy(self) -> bool:
        """Whether this rank still writes or seals. Asks nobody and never waits."""
        save = self._under_way
        if save is None:
            return False
        if save.is_written:
            return save.sealing is not None and save.sealing.is_alive()
        return save.writing is not None and save.writing.is_busy

    def advance(self) -> None:
        """Take the save that is under way one part further. Call it when no rank is busy.

        Raises:
            TrainingError: a rank could not write, or rank 0 could not finish the folder. It is removed, the others are untouched.
        """
        save = self._under_way
        if save is None:
            return
        began = time.perf_counter()
        try:
            if save.is_written:
                self.control.on_rank0(lambda: self._raise_of_sealing(save))
                self._under_way = None
            else:
                sha256 = self._all_have_written(save)
                if save.writing is None:
                    self.control.on_rank0(lambda: self._seal(save, sha256))
                    self._under_way = None
                elif self.control.rank == 0:
                    save.sealing = Thread(target=self._seal_beside, args=(save, sha256), name="seal", daemon=True)
                    save.sealing.start()
        except BaseException:
            self.abandon()
            raise
        now = time.perf_counter()
        save.waited += now - began
        if self._under_way is None:
            beside = f", training waited {save.waited:.1f} s" if save.writing is not None else ""
            logger.info("saved %s in %.1f s%s", save.final.name, now - save.began, beside)

    def finish(self) -> None:
        """Wait until nothing is under way.

        Raises:
            TrainingError: as `advance`.
        """
        while self._under_way is not None:
            save, began = self._under_way, time.perf_counter()
            if save.sealing is not None:
                save.sealing.join()
            elif save.writing is not None:
                save.writing.wait()
            save.waited += time.perf_counter() - began
            self.advance()

    def abandon(self) -> None:
        """Drop what is under way, when the ranks may no longer be able to talk: each drops its own. Asks nobody."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        if save.writing is not None:
            save.writing.kill()
        if save.sealing is not None:
            save.sealing.join()  # what is whole gets its name
        if self.control.rank == 0:
            shutil.rmtree(save.partial, ignore_errors=True)

    def load(self, folder: Path) -> int:
        """Fill optimizer and schedule from a verified checkpoint of this stage, at any layout. Returns its iteration.

        The model's own weights must have been loaded before it was wrapped (`load_model_weights`).
        """
        loaded = self._read(folder)
        load_optimizer_state(self.optimizer, loaded["optimizer"])
        self.schedule.load_state_dict(loaded["opt_param_scheduler"])
        iteration = int(loaded["iteration"])
        if iteration != store.iteration_of(folder):
            raise CheckpointError(f"holds iteration {iteration:,}", where=folder, fix="give the folder its own name back")
        return iteration

    def load_moments(self, folder: Path) -> None:
        """Fill the optimizer from a verified checkpoint of the stage before, at any layout: main weights, moments, Adam's step count.

        Learning rate, weight decay and betas stay this stage's, and so does the schedule.
        """
        keep_settings(self.optimizer, state := self._read(folder)["optimizer"])
        load_optimizer_state(self.optimizer, state)

    def _read(self, folder: Path) -> dict[str, Any]:
        """What a checkpoint holds besides the model's own weights, for this layout."""
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
        return dict(loaded)

    # ------------------------------------------------------------------ the parts of a save

    def _state(self, iteration: int) -> dict[str, Any]:
        model = self.wrapped.module.sharded_state_dict(metadata=self._metadata())
        return {
            "model": model,
            "optimizer": own_shards(self.optimizer, model),
            "opt_param_scheduler": self.schedule.state_dict(),
            "iteration": iteration,
            "checkpoint_version": 3.0,
        }

    def _all_have_written(self, save: _Save) -> dict[str, str]:
        """Exchange what each rank has written; rank 0 writes `.metadata` and `metadata.json`. Returns the sha256 of all files."""
        writer = save.strategy.writer
        if save.writing is not None:
            writer.outcome = save.writing.wait()
        try:
            for finalize in save.request.finalize_fns:
                finalize()
        except CheckpointException as error:  # on every rank: megatron-core tells the others
            failure = self._failed(error, save.final)
            failure.agreed = True
            raise failure from None
        except OSError as error:
            raise self._failed(error, save.final) from error
        save.is_written = True
        mine = writer.outcome.sha256 if isinstance(writer.outcome, Share) else {}
        return {name: digest for rank in self.control.gather_objects(mine) for name, digest in rank.items()}

    def _seal(self, save: _Save, sha256: Mapping[str, str]) -> None:
        """Add what makes the folder a checkpoint, give it its name, remove what is no longer kept. Rank 0 only."""
        try:
            self._describe(save.partial, save.iteration, sha256)
            store.publish(save.partial, save.final)
            store.write_tracker(self.job.checkpoints, save.iteration)
            store.remove_old(self.job.checkpoints, self.job.stage.keep_checkpoints, self.job.stage.name)
        except OSError as error:
            raise self._failed(error, save.final) from error

    def _seal_beside(self, save: _Save, sha256: Mapping[str, str]) -> None:
        try:
            self._seal(save, sha256)
        except BaseException as error:  # raised on all ranks when they ask
            save.seal_error = error

    @staticmethod
    def _raise_of_sealing(save: _Save) -> None:
        if save.seal_error is not None:
            raise save.seal_error

    def _describe(self, partial: Path, iteration: int, sha256: Mapping[str, str]) -> None:
        # megatron-core 0.19 keeps this inside the .distcp files, where 0.16 cannot find it
        if not (partial / _COMMON).exists():
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
            sha256=sha256,
            stage=stage.name,
            iteration=iteration,
            consumed_samples=iteration * stage.global_batch_size,
            rope_fingerprint=self.job.rope.fingerprint(),
            layout=stage.parallel.describe(),
            settings=dict(self.settings),
        )

    def _begin_folder(self, final: Path) -> str:
        try:
            return str(store.begin_checkpoint(final))
        except OSError as error:
            raise self._failed(error, final) from error

    def _failed(self, error: BaseException, final: Path) -> TrainingError:
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


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {_first_line(cause)}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
