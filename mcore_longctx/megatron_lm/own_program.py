"""Batches, datasets and loss of plain pretraining, for `pretrain` of Megatron-LM where no pretrain_gpt.py is at hand.

Takes the data flags of pretrain_gpt.py (`--data-path`, blends, splits, `--mock-data`), or `--longctx-data`, packed samples with their
sidecar: which tokens carry loss, and the order of `mcore-longctx train`. Chats, fill-in-the-middle, distillation and
multi-token prediction are refused by name; a checkout of Megatron-LM has them.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core import mpu, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model

from mcore_longctx.data import PackedSamples
from mcore_longctx.errors import DataError
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.train.order import SampleOrder

__all__ = ["PackedDataset", "datasets_provider", "forward_step"]

_SPIKE = 10.0  # --check-for-spiky-loss: this many times the largest loss so far

_straggler = StragglerDetector()


# ------------------------------------------------------------------------------------------------------------------------ datasets


def datasets_provider(samples: Sequence[int | None], vp_stage: int | None = None) -> Any:
    """Training, validation and test sets. `samples` are the smallest numbers of samples that they must have."""
    from megatron.training import get_args

    args = get_args()
    if args.longctx_data is not None:
        return PackedDataset(args.longctx_data, args, samples[0] or 0), None, None
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, partial(_is_read_here, vp_stage), _dataset_config(args)).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: every rank may call it


def _is_read_here(vp_stage: int | None) -> bool:
    """The first and the last pipeline stage need batches, and one rank of each tensor-parallel group reads them."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return bool(mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage))


def _dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Each setting from the flag of its name, and those whose flag has another."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    counts = args.per_dataset_sequences_path
    values = {
        field.name: getattr(args, field.name) for field in fields(GPTDatasetConfig) if field.init and hasattr(args, field.name)
    }
    values |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": build_tokenizer(args),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequences_per_dataset": json.loads(Path(counts).read_text()) if counts is not None else None,
    }
    return GPTDatasetConfig(**values)


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed samples of `mcore-longctx data` in the order of `mcore-longctx train`: item i is the i-th sample that is trained on.

    Args:
        prefix: PREFIX.bin, PREFIX.idx and PREFIX.runs.
        args: `seq_length`, `seed` and `padded_vocab_size` of Megatron-LM.
        num_samples: of the whole training.

    Raises:
        DataError: the samples are missing, damaged or of another length, or one holds a token beyond the vocabulary.
    """

    def __init__(self, prefix: str, args: Namespace, num_samples: int) -> None:
        self.samples = PackedSamples(prefix)
        self.prefix, self.vocab_size = prefix, args.padded_vocab_size
        if self.samples.seq_length != args.seq_length:
            raise DataError(
                f"samples have {self.samples.seq_length:,} tokens, --seq-length is {args.seq_length:,}",
                where=f"--longctx-data {prefix}",
            )
        self.order = SampleOrder(len(self.samples), seed=args.seed)
        self.num_samples = num_samples + 1  # Megatron's sampler wants one left when a finished run is started again

    def __len__(self) -> int:
        """Items, one more than are trained on."""
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """int64 `tokens` and `labels`, float32 `loss_mask`, each [seq_length]."""
        number = self.order[index]
        tokens, labels, loss_mask = self.samples.sample(number)
        if tokens.max() >= self.vocab_size:
            raise DataError(
                f"sample {number} holds token {tokens.max()}, the vocabulary has {self.vocab_size:,}", where=self.prefix
            )
        mask = torch.from_numpy(loss_mask).float()
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels), "loss_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------------- step


def forward_step(data_iterator: Iterator[dict[str, Tensor]] | None, model: Any) -> tuple[Tensor, Any]:
    """One micro-batch through this rank's part of the model.

    Returns:
        What the model gives (losses [b, s/c] on the last pipeline stage), and the function that makes of it the sum of losses, the
        number of tokens that carry loss, and what is logged.
    """
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _straggler(bdata=True):
        batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    with _straggler:
        output = model(
            batch.get("tokens"), batch.get("position_ids"), None, labels=batch.get("labels"), loss_mask=batch.get("loss_mask")
        )
    return output, partial(_loss, batch.get("loss_mask"))


def _batch(data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None) -> dict[str, Tensor]:
    """This rank's tokens of a micro-batch: int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, all [b, s/c]."""
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    if not is_first_or_last_pipeline_stage(vp_stage):
        return {}
    cp_size, cp_rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    mine = torch.from_numpy(zigzag_positions(get_args().seq_length, cp_size, cp_rank))
    read = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        read = {name: sample[name].index_select(1, mine) for name in ("tokens", "labels", "loss_mask")}
    batch = tensor_parallel.broadcast_data(["tokens", "labels"], read, torch.int64)
    batch |= tensor_parallel.broadcast_data(["loss_mask"], read, torch.float32)
    batch["position_ids"] = mine.to(batch["tokens"].device).expand_as(batch["tokens"])
    return batch


def _loss(loss_mask: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of a micro-batch and its number of tokens. Megatron divides, as --calculate-per-token-loss says."""
    from megatron.training import get_args

    assert loss_mask is not None  # only the last pipeline stage has losses
    weights = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * weights).sum()
    tokens = weights.sum().detach().to(torch.int)
    _check_loss(total, get_args())
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def _check_loss(total: Tensor, args: Namespace) -> None:
    """--check-for-nan-in-loss-and-grad and --check-for-spiky-loss, before ranks are mixed."""
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for wrong, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            machine.validate_result(
                result=total,
                rejection_func=wrong,
                message=f"found {name} in the loss of a micro-batch",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        machine.validate_result(
            result=total,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss"),
            message="spiky loss",
            tolerance=0.0,
            fatal=False,
        )
