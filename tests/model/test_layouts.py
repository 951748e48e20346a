"""Loss, every gradient, chosen logits and loaded weights are the same for every layout as for one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import LongContextGPTModel, destroy_process_groups, init_process_groups
from mcore_longctx.model.initial_weights import global_name
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import (
    SEQ_LENGTH,
    SHAPE,
    Batch,
    build,
    hf_llama,
    megatron_names,
    own_part,
    save_torch_dist,
)
from tests.multiproc import run_processes

# float32 sums in another order: the worst seen is 2e-6
TOLERANCE = 1e-5
SAMPLES = 4
BF16_TOLERANCE = 5e-3  # of the loss, against float32
# at TP 2 the second rank holds nothing but padding of this vocabulary
TIED = replace(SHAPE, tie_word_embeddings=True, vocab_size=100)


def layout(
    tp: int = 1, pp: int = 1, cp: int = 1, dp: int = 1, sp: bool = False, comm: Any = "p2p", sizes: tuple[int, int] | None = None
) -> Parallel:
    return Parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        sequence_parallel=sp,
        cp_comm_type=comm,
        hierarchical_context_parallel_sizes=sizes,
    )


TWO_RANKS = [
    layout(dp=2),
    layout(tp=2),
    layout(tp=2, sp=True),
    layout(pp=2),
    layout(cp=2),
    layout(cp=2, comm="all_gather"),
    layout(cp=2, comm="a2a"),
]
TWO_RANKS_TIED = [layout(tp=2, sp=True), layout(pp=2), layout(cp=2)]
FOUR_RANKS = [
    layout(cp=4),
    layout(cp=4, comm="all_gather"),
    layout(cp=4, comm=("a2a", "a2a+p2p", "p2p", "a2a+p2p"), sizes=(2, 2)),
    layout(tp=2, sp=True, cp=2),
    layout(tp=2, pp=2, sp=True),
    layout(pp=2, cp=2),
    layout(cp=2, dp=2),
]


def batches(vocab_size: int) -> dict[str, Batch]:
    """Uneven: other token counts on every DP and CP rank. Middle masked: the last CP rank has no token at all."""
    tokens = torch.randint(vocab_size, (SAMPLES, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(5))
    uneven = (torch.arange(SAMPLES * SEQ_LENGTH).view(SAMPLES, -1) % 5 != 0).float()
    uneven[: SAMPLES // 2, SEQ_LENGTH // 2 :] = 0
    middle = torch.ones(SAMPLES, SEQ_LENGTH)
    middle[:, SEQ_LENGTH // 4 : 3 * SEQ_LENGTH // 4] = 0
    return {
        name: Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)
        for name, mask in (("uneven", uneven), ("middle masked", middle))
    }


@dataclass
class StepResult:
    """Mean loss over all tokens (last stage only) and this rank's gradients by global name."""

    loss: float | None
    gradients: dict[str, tuple[str, Tensor, Tensor]]  # global name -> own name, parameter, gradient


def forward_backward(model: LongContextGPTModel, batch: Batch, *, weighted: bool = True) -> StepResult:
    """One step through Megatron's own schedule, DDP and finalize_model_grads. `weighted`: the loss is summed in the model."""
    cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    config = model.config
    with device_context():
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        config.finalize_model_grads_func = finalize_model_grads
        per_rank = SAMPLES // dp
        mine = slice(dp_rank * per_rank, (dp_rank + 1) * per_rank)
        local = batch.on_rank(cp, cp_rank)
        microbatches = zip(*(tensor[mine].split(1) for tensor in local), strict=True)

        def forward_step(iterator: Iterator[Any], module: Any) -> Any:
            tokens, positions, labels, mask = next(iterator)
            losses = module(tokens, positions, None, labels=labels, loss_weights=mask if weighted else None)

            def loss_function(losses: Tensor) -> Any:
                total, count = losses if weighted else (losses * mask).sum(), mask.sum().int()
                return total, count, {"sums": torch.stack((total.detach(), count.float()))}

            return losses, loss_function

        wrapped.zero_grad_buffer()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=microbatches,
            model=[wrapped],
            num_microbatches=per_rank,
            seq_length=SEQ_LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
    loss = None
    if parallel_state.is_pipeline_last_stage():
        sums = torch.stack([report["sums"] for report in reports]).sum(0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        loss = (sums[0] / sums[1]).item()
    gradients = {global_name(name, config): (name, p, p.main_grad.clone()) for name, p in model.named_parameters()}
    return StepResult(loss, gradients)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: weights, losses, gradients, logits and a torch_dist folder, untied and tied."""
    folder = tmp_path_factory.mktemp("reference")
    for name, shape in (("untied", SHAPE), ("tied", TIED)):
        weights = megatron_names(dict(hf_llama(shape).state_dict()), shape)
        saved: dict[str, Any] = {"weights": weights}
        for case, batch in batches(shape.vocab_size).items():
            model = build(Parallel(), weights, shape=shape)
            result = forward_backward(model, batch, weighted=case == "uneven")
            saved[case] = (result.loss, {key: gradient for key, (_, _, gradient) in result.gradients.items()})
            tokens, positions, _, _ = batch.on_rank(1, 0)
            saved["logits"] = model.logits_at(tokens, positions, torch.arange(SAMPLES * SEQ_LENGTH)).view(SAMPLES, SEQ_LENGTH, -1)
        save_torch_dist(model, folder / f"{name}.torch_dist")
        torch.save(saved, folder / f"{name}.pt")
    destroy_process_groups()
    return folder


def compare_layouts(folder: Path, name: str, layouts: list[Parallel]) -> dict[str, float]:
    """Run in each rank: largest relative difference to the reference, by layout and quantity."""
    saved = torch.load(folder / f"{name}.pt", weights_only=True)
    shape = TIED if name == "tied" else SHAPE
    errors: dict[str, float] = {}
    for parallel in layouts:
        init_process_groups(parallel, seed=1)
        for case, batch in batches(shape.vocab_size).items():
            model = build(parallel, saved["weights"], shape=shape, new_groups=False)
            result = forward_backward(model, batch, weighted=case == "uneven")
            loss, gradients = saved[case]
            label = f"{parallel.describe()}, {case}"
            if result.loss is not None:
                errors[f"{label}: loss"] = abs(result.loss - loss) / loss
            for key, (own_name, parameter, gradient) in result.gradients.items():
                expected = own_part(model, own_name, parameter, gradients)
                largest = gradients.get(key, gradients["embedding.word_embeddings.weight"]).abs().max()
                errors[f"{label}: gradient of {key}"] = ((gradient - expected).abs().max() / largest).item()
        label = parallel.describe()
        in_bf16 = forward_backward(build(parallel, saved["weights"], shape=shape, precision="bf16", new_groups=False), batch)
        if in_bf16.loss is not None:
            errors[f"{label}: bf16 loss"] = abs(in_bf16.loss - loss) / loss * TOLERANCE / BF16_TOLERANCE
        if parallel.pipeline_model_parallel_size == 1:
            errors[f"{label}: logits of chosen rows"] = chosen_rows_error(model, batch, saved["logits"])
        loaded = build(parallel, shape=shape, seed=None, new_groups=False)
        load_model_weights(loaded, folder / f"{name}.torch_dist")
        pairs = zip(loaded.parameters(), model.parameters(), strict=True)
        errors[f"{label}: loaded weights"] = max((a - b).abs().max().item() for a, b in pairs)
    return errors


def chosen_rows_error(model: LongContextGPTModel, batch: Batch, logits: Tensor) -> float:
    """Logits at rows that differ between CP ranks (one of them asks for none), against the reference's."""
    cp_rank = parallel_state.get_context_parallel_rank()
    tokens, positions, _, _ = batch.on_rank(parallel_state.get_context_parallel_world_size(), cp_rank)
    rows = torch.tensor([] if cp_rank == 1 else [0, 3, tokens.size(1) - 1, 2 * tokens.size(1) + 7], dtype=torch.int64)
    found = model.logits_at(tokens, positions, rows)
    assert found.shape == (len(rows), logits.size(-1))
    assert found.dtype is torch.float32
    sample, row = rows // tokens.size(1), rows % tokens.size(1)
    expected = logits[sample, positions[0][row]]
    return ((found - expected).abs().max() / logits.abs().max()).item() if len(rows) else 0.0


def assert_equal_to_reference(results: list[dict[str, float]]) -> None:
    wrong = {
        f"rank {rank}: {quantity}": error
        for rank, errors in enumerate(results)
        for quantity, error in errors.items()
        if not error < (TOLERANCE if "loaded" not in quantity else 1e-30)
    }
    assert not wrong, "\n".join(f"{quantity}: {error:.2e}" for quantity, error in wrong.items())
    assert all(errors for errors in results)


@pytest.mark.multiproc
def test_two_ranks_give_the_loss_and_gradients_of_one_process_in_every_layout(reference: Path) -> None:
    assert_equal_to_reference(run_processes(compare_layouts, 2, reference, "untied", TWO_RANKS))


@pytest.mark.multiproc
def test_two_ranks_with_tied_embeddings_give_the_loss_and_gradients_of_one_process(reference: Path) -> None:
    assert_equal_to_reference(run_processes(compare_layouts, 2, reference, "tied", TWO_RANKS_TIED))


@pytest.mark.multiproc
def test_four_ranks_give_the_loss_and_gradients_of_one_process_in_every_layout(reference: Path) -> None:
    assert_equal_to_reference(run_processes(compare_layouts, 4, reference, "untied", FOUR_RANKS))


def test_one_process_gives_the_loss_and_gradients_of_transformers(reference: Path) -> None:
    for name, shape in (("untied", SHAPE), ("tied", TIED)):
        saved = torch.load(reference / f"{name}.pt", weights_only=True)
        for case, batch in batches(shape.vocab_size).items():
            hf = hf_llama(shape)
            logits = hf(batch.tokens).logits
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            loss = (losses * batch.mask.flatten()).sum() / batch.mask.sum()
            loss.backward()
            gradients = {key: parameter.grad for key, parameter in hf.named_parameters()}
            expected = megatron_names(gradients, shape)
            our_loss, ours = saved[case]
            assert our_loss == pytest.approx(loss.item(), rel=TOLERANCE)
            assert ours.keys() == expected.keys()
            for key, gradient in expected.items():
                padding = ours[key][len(gradient) :]
                assert not padding.any(), f"{key}: vocabulary padding has a gradient"
                error = (ours[key][: len(gradient)] - gradient).abs().max() / gradient.abs().max()
                assert error < TOLERANCE, f"{name}, {case}, {key}: {error:.1e}"
