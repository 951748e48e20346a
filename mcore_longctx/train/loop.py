"""The training loop of one stage, on megatron-core's schedules, gradient buffers and distributed optimizer.

Everything that decides the next step is in a checkpoint or a pure function of (seed, step), so a run that is killed and started again
ends with the same weights as one that never stopped; on CPU bit for bit.
"""

from __future__ import annotations

import gc
import logging
import math
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_longctx import checkpoint_folder as store
from mcore_longctx.data import PackedSamples
from mcore_longctx.errors import CheckpointError, StoppedBySignal, TrainingError
from mcore_longctx.layout import PackLayout
from mcore_longctx.manifest import verify_manifest
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
from mcore_longctx.model.packed import PackedBatch, packed_batch
from mcore_longctx.model.process_groups import rank_info
from mcore_longctx.model.te import check_backend
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.recipe import read_card
from mcore_longctx.train.checkpoint import Checkpointer, check_moments, verify_checkpoint
from mcore_longctx.train.control import Control
from mcore_longctx.train.dataset import MicroBatch, StepData
from mcore_longctx.train.heartbeat import Heartbeat, Phase
from mcore_longctx.train.job import TrainJob, data_fingerprint, refuse_changed_settings
from mcore_longctx.train.metrics import MetricsWriter, StepMetrics, sample_digest
from mcore_longctx.train.optimizer import build_optimizer, build_schedule, learning_rate, wrap_model
from mcore_longctx.train.outcome import Outcome, open_log
from mcore_longctx.train.signals import StopRequest
from mcore_longctx.train.sparsity import drop_smallest, hold_zeros
from mcore_longctx.train.telling import announce, own_parameters, report

__all__ = ["train_stage"]

logger = logging.getLogger(__name__)

_MOST_IDS = 16  # named in an error message
_TIMEOUT_MINUTES = (
    60.0  # of the process groups, where neither the recipe nor a plan gives one: Megatron's 10 are less than a step of 4M
)


def train_stage(job: TrainJob) -> int:
    """Train one stage from its start checkpoint, or go on from its newest own checkpoint. Every rank of the job calls it.

    Never raises for a failure of the training: one rank says in one line what happened (stderr, `STATUS`, `rank0.log`).

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input, 75 stopped on a signal with a checkpoint saved. The same on every rank.
    """
    rank = dist.get_rank() if dist.is_initialized() else rank_info().rank
    outcome = Outcome(job.log_folder, rank)
    with open_log(job.log_folder, rank), StopRequest() as stop, ExitStack() as held:
        try:
            with device_context():
                reason = _train(job, outcome, stop, held)
        except BaseException as error:
            return outcome.failed(error)
        return outcome.done(reason)


def _train(job: TrainJob, outcome: Outcome, stop: StopRequest, held: ExitStack) -> str:
    check_backend(job.backend)
    minutes = job.stage.distributed_timeout_minutes or _TIMEOUT_MINUTES
    init_process_groups(job.stage.parallel, seed=job.seed, timeout_minutes=minutes)
    control = Control(timedelta(minutes=minutes))
    control.on_rank0(lambda: _hold_folder(job, outcome, held))
    outcome.started()
    pulse = held.enter_context(Heartbeat(job.log_folder, control.rank, timeout_seconds=60 * minutes, hung=outcome.hung))
    folder = Path(control.on_rank0(lambda: str(store.latest_checkpoint(job.checkpoints) or job.start_checkpoint)))
    control.raise_first(_damage_of_share(folder, control.rank, control.world_size))
    start = control.on_rank0(lambda: _find_start(job))
    job = replace(job, tokenizer_sha256=start.tokenizer_sha256)
    trainer = Trainer(job, start, control, stop, pulse)
    try:
        reason = trainer.run()
    finally:
        trainer.close()
    destroy_process_groups()
    return reason


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a job begins: at another stage's weights, or at its own newest checkpoint."""

    folder: Path
    resumes: bool
    settings: dict[str, Any]
    tokenizer_sha256: str | None


def _hold_folder(job: TrainJob, outcome: Outcome, held: ExitStack) -> None:
    held.enter_context(store.FolderLock(job.checkpoints))
    outcome.write_running()
    store.remove_leftovers(job.checkpoints)


def _damage_of_share(folder: Path, rank: int, ranks: int) -> Exception | None:
    """Compare every byte of this rank's share of a checkpoint's files: one rank would take half an hour for a model of 70B."""
    try:
        verify_manifest(folder, "checkpoint", share=(rank, ranks))
    except Exception as error:  # told to all ranks
        return error
    return None


def _find_start(job: TrainJob) -> Start:
    """Verify the data, every byte, and that the checkpoint, whose bytes are verified, belongs to this job. Rank 0 only."""
    settings = job.settings(data=data_fingerprint(job.data_prefix, tokenizer_sha256=job.tokenizer_sha256))
    newest = store.latest_checkpoint(job.checkpoints)
    if newest is None:
        folder = job.start_checkpoint
        verify_checkpoint(folder, shape=job.shape, rope=job.start_rope, hashes=False)
        if job.stage.optimizer_from == "previous":
            check_moments(folder, job.stage.name)
    else:
        folder = newest
        manifest = verify_checkpoint(folder, shape=job.shape, rope=job.rope, hashes=False)
        if manifest.get("stage") != job.stage.name:
            raise CheckpointError(f"belongs to stage {manifest.get('stage')!r}, not {job.stage.name!r}", where=folder)
        refuse_changed_settings(manifest["settings"], settings, where=folder)
    made_for = read_card(folder).tokenizer_sha256
    if made_for and job.tokenizer_sha256 and made_for != job.tokenizer_sha256:
        raise CheckpointError(
            f"made for another tokenizer ({made_for[:12]}, the recipe's is {job.tokenizer_sha256[:12]})",
            where=folder,
            fix="use the tokenizer that belongs to the model",
        )
    return Start(folder=folder, resumes=newest is not None, settings=settings, tokenizer_sha256=made_for or job.tokenizer_sha256)


class Trainer:
    """One rank of one job: model, optimizer, data, and the steps over them."""

    def __init__(self, job: TrainJob, start: Start, control: Control, stop: StopRequest, pulse: Heartbeat) -> None:
        stage = job.stage
        self.job, self.stage, self.control, self.stop, self.pulse = job, stage, control, stop, pulse
        self.data = StepData(
            PackedSamples(job.data_prefix),
            stage,
            seed=job.seed,
            vocab_size=job.shape.vocab_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            device=training_device(),
            where=job.data_prefix,
            sentence_ends=job.sentence_ends,
        )
        model = build_gpt_model(
            job.shape,
            job.rope,
            stage.parallel,
            precision=stage.precision,
            seq_length=stage.seq_length,
            phase_dtype=job.phase_dtype,
            seed=None,  # NaN until loaded: nothing can be trained from random weights
            activations=stage.activations,
            backend=job.backend,
        )
        load_model_weights(model, start.folder)
        if stage.sparsity is not None and not start.resumes:
            zeros, weights = drop_smallest(model, stage.sparsity.sparsity)
            logger.info("%s of %s weights of linear layers of rank 0 are 0 now", f"{zeros:,}", f"{weights:,}")
        # samples with a cross-document mask have rows of their own: pipeline stages tell each other how many
        model.config.variable_seq_lengths = stage.cross_document_mask
        self.wrapped = wrap_model(model)
        self.optimizer = build_optimizer(self.wrapped, stage)
        self.schedule = build_schedule(self.optimizer, stage.optimizer, stage.iterations)
        self.checkpointer = Checkpointer(
            job,
            settings=start.settings,
            source=start.folder,
            wrapped=self.wrapped,
            optimizer=self.optimizer,
            schedule=self.schedule,
            control=control,
        )
        self.finished = self.checkpointer.load(start.folder) if start.resumes else 0  # steps
        if not start.resumes and stage.optimizer_from == "previous":
            self.checkpointer.load_moments(start.folder)
        self.saved = self.finished  # the save of this step is done or under way
        self.seconds: list[float] = []  # of the steps of this start
        # losses are counted once: by one tensor-parallel rank of the last pipeline stage
        self.counts_losses = parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        self.said_how_documents_are_split = False
        self.metrics: MetricsWriter | None = None
        if control.rank == 0:
            self.metrics = MetricsWriter(job.metrics_path, job.tensorboard, resumed_step=self.finished)
        announce(job, self.data, start.folder, self.finished if start.resumes else None, self._count_parameters())

    def _count_parameters(self) -> int:
        return int(self.control.gather([float(own_parameters(self.wrapped))]).sum())

    def run(self) -> str:
        """Train to the end. Returns how it ended, in words.

        Raises:
            StoppedBySignal: all ranks agreed to stop; the last finished step is saved.
            TrainingError: a loss or gradient that is no number, or a save that failed.
        """
        if self.finished >= self.stage.iterations:
            return f"{self.finished} iterations (nothing left to do)"
        # megatron-core collects garbage in each save, seconds long: what has been imported and built stays anyway
        gc.freeze()
        steps = self.stage.iterations - self.finished
        self.checkpointer.check_free_space(saves=-(-steps // self.stage.save_interval))
        while self.finished < self.stage.iterations:
            try:
                self._step()
            except _StopRequested as stop:
                self._save()
                raise self._stopped(stop.number) from None
            is_last = self.finished == self.stage.iterations
            if is_last or self.finished % self.stage.save_interval == 0:
                self._save(beside=self.stage.async_save and not is_last)
        return f"{self.finished} iterations"

    def close(self) -> None:
        """Drop a save that is still under way, after a failure, and close the metrics files."""
        self.checkpointer.abandon()
        if self.metrics is not None:
            self.metrics.close()

    # ------------------------------------------------------------------ one step

    def _step(self) -> None:
        """Forward and backward over all micro-batches, the checks, the update.

        Raises:
            _StopRequested: a signal came before the last micro-batch began; the step has not been taken.
        """
        began = time.perf_counter()
        iteration = self.finished
        ids = self.data.sample_ids(iteration)
        self._pass_border(1)
        losses = self._forward_backward(iteration)
        if self.stage.sparsity is not None and iteration + 1 < self.stage.sparsity.dense_from:
            hold_zeros(self.wrapped)
        self._begin("update", f"iteration {iteration + 1}")
        facts = self.control.gather([*self._own_sums(losses), float(_memory_bytes())])
        loss_sum, loss_weight, loss_tokens = (float(total) for total in facts[:, :3].sum(dim=0))
        self._check_loss(loss_sum, loss_weight, losses, ids)
        self.optimizer.prepare_grads()
        self._check_grad_norm(float(self.optimizer.get_grad_norm()), ids)
        lr = learning_rate(self.optimizer)
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(increment=1)
        self.finished += 1
        self.seconds.append(time.perf_counter() - began)
        if self.metrics is not None:
            tokens = self.stage.global_batch_size * self.stage.seq_length
            report(
                self.metrics,
                self.data,
                self.seconds,
                StepMetrics(
                    step=self.finished,
                    loss=loss_sum / loss_weight,
                    lr=lr,
                    grad_norm=float(grad_norm),
                    tokens_per_second=tokens / self.seconds[-1],
                    memory_bytes=int(facts[:, 3].max()),
                    seconds=self.seconds[-1],
                    consumed_samples=self.finished * self.stage.global_batch_size,
                    loss_tokens=int(loss_tokens),
                    samples=sample_digest(ids),
                ),
            )

    def _pass_border(self, micro_batch: int) -> None:
        """Before each micro-batch: has any rank had a signal, and has the save that is under way got further?

        All ranks agree: a rank that left alone would hang the rest.

        Raises:
            _StopRequested: on all ranks.
            TrainingError: the save failed.
        """
        # a rank of light samples waits here for one of heavy ones: the micro-batch before this one counts too
        begins = range(max(0, micro_batch - 2), micro_batch)
        if self.stage.parallel.pipeline_model_parallel_size > 1:  # one border for the whole step
            begins = range(self.stage.num_microbatches)
        work = self.data.heaviest(self.finished, begins)
        self._begin("micro-batch", f"iteration {self.finished + 1}, micro-batch {micro_batch}", work)
        number, is_busy = self.control.largest(self.stop.number, self.checkpointer.is_busy)
        if number:
            raise _StopRequested(number)
        if self.checkpointer.is_under_way and not is_busy:
            self.checkpointer.advance()

    def _begin(self, phase: Phase, where: str, work: float = 1.0) -> None:
        if torch.cuda.is_available():
            # a border is passed when the kernels before it have run, not when they are queued
            torch.cuda.current_stream().synchronize()
        self.pulse.passed(phase, where, work=work)

    def _forward_backward(self, iteration: int) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """Gradients of a step in the main gradient buffers.

        Returns (sample ids, [sum of weight x loss, sum of weights, tokens]) of each own micro-batch. Megatron divides the gradients
        by the sum of weights of all micro-batches and ranks, which it adds up in whole numbers.
        """
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses: list[tuple[tuple[int, ...], torch.Tensor]] = []
        may_stop_inside = self.stage.parallel.pipeline_model_parallel_size == 1  # a pipeline has sends under way

        def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            if losses and may_stop_inside:
                self._pass_border(len(losses) + 1)
            packed = {} if batch.layout is None else {"packed_seq_params": self._packed(batch.layout)}
            weights = batch.loss_mask.float() if batch.weights is None else batch.weights
            output = model(batch.tokens, batch.positions, None, labels=batch.labels, loss_weights=weights, **packed)

            def loss_function(loss_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
                tokens = batch.loss_mask.sum()
                weight = tokens if batch.weight is None else torch.full_like(tokens, batch.weight)
                report = torch.stack([loss_sum.detach().double(), weight.double(), tokens.double()])
                losses.append((batch.sample_ids, report))
                return loss_sum, weight.to(torch.int), {"lm loss": report}

            return output, loss_function

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=self.data.micro_batches(iteration),
            model=[self.wrapped],
            num_microbatches=self.stage.num_microbatches,
            seq_length=self.stage.seq_length,
            micro_batch_size=self.stage.micro_batch_size,
            forward_only=False,
        )
        return losses

    def _packed(self, layout: PackLayout) -> PackedBatch:
        if not self.said_how_documents_are_split:
            logger.info("documents of the first sample: %s", layout.describe(self.stage.parallel.attention_neighbours))
            self.said_how_documents_are_split = True
        return packed_batch(layout)

    def _own_sums(self, losses: list[tuple[tuple[int, ...], torch.Tensor]]) -> list[float]:
        if not self.counts_losses:
            return [0.0, 0.0, 0.0]
        sums: list[float] = torch.stack([report for _, report in losses]).sum(dim=0).tolist()
        return sums

    # ------------------------------------------------------------------ checks

    def _check_loss(
        self, loss_sum: float, loss_weight: float, losses: list[tuple[tuple[int, ...], torch.Tensor]], ids: list[int]
    ) -> None:
        """Raise TrainingError on every rank alike, before the weights are touched."""
        if loss_weight == 0:
            raise self._broken(f"no token of the step carries loss ({_listed(ids)})")
        if math.isfinite(loss_sum):
            return
        mine = [ids for ids, report in losses if not math.isfinite(report[0].item())]
        found = {number for rank in self.control.gather_objects(mine) for ids in rank for number in ids}
        raise self._broken(f"loss is {loss_sum / loss_weight} ({_listed(sorted(found))})")

    def _check_grad_norm(self, grad_norm: float, ids: list[int]) -> None:
        if not math.isfinite(grad_norm):
            raise self._broken(f"grad norm is {grad_norm}, the loss is a number ({_listed(ids)})")

    def _broken(self, what: str) -> TrainingError:
        self._begin("saving", f"iteration {self.finished}")
        try:
            self.checkpointer.finish()  # of a good state: all ranks are here
        except TrainingError as failed_save:
            logger.error("%s", failed_save)
        newest = store.latest_checkpoint(self.job.checkpoints)
        error = TrainingError(
            f"iteration {self.finished + 1}: {what}",
            where=self.job.data_prefix,
            fix="look at these samples or lower the learning rate; no step was taken, "
            + (f"{newest.name} is the newest checkpoint" if newest else "nothing has been saved"),
        )
        error.agreed = True
        return error

    # ------------------------------------------------------------------ saving and telling

    def _save(self, *, beside: bool = False) -> None:
        """Save the last finished step, unless that has been done, and finish what is under way. `beside`: only begin."""
        self._begin("saving", f"iteration {self.finished}")
        self.checkpointer.finish()
        if self.finished == self.saved:
            return
        if self.metrics is not None:
            self.metrics.sync()
        self.checkpointer.begin(self.finished, beside=beside)
        self.saved = self.finished
        if not beside:
            self.checkpointer.finish()

    def _stopped(self, signal_number: int) -> StoppedBySignal:
        saved = "checkpoint saved" if self.finished else "before the first step, nothing to save"
        error = StoppedBySignal(
            f"{StopRequest.name(signal_number)} at iteration {self.finished}, {saved}", fix="start again to go on"
        )
        error.agreed = True
        return error


class _StopRequested(Exception):
    """All ranks agreed, before a micro-batch, to drop the step and stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _memory_bytes() -> int:
    """Peak memory of this process: of the CUDA allocator, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _listed(ids: list[int]) -> str:
    shown = ", ".join(str(number) for number in ids[:_MOST_IDS])
    more = f" and {len(ids) - _MOST_IDS:,} more" if len(ids) > _MOST_IDS else ""
    return f"samples {shown}{more}" if len(ids) > 1 else f"sample {shown}"
