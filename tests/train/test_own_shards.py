"""What each rank saves of the optimizer makes up what megatron-core would have gathered: every element, once, the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.train import iteration_folder
from mcore_longctx.train.own_shards import own_shards, rectangles
from tests.train.jobs import make_job, make_world, train


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_rectangles_are_a_range_in_its_order(rows: int, columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * columns))
    end = data.draw(st.integers(start, rows * columns))
    for shape in ((rows, columns), (rows * columns,)):
        numbers = np.arange(rows * columns).reshape(shape)
        found = rectangles(shape, start, end)
        pieces = [numbers[tuple(slice(at, at + n) for at, n in zip(*one, strict=True))].ravel() for one in found]
        assert np.concatenate([np.arange(0), *pieces]).tolist() == list(range(start, end))
        assert len(found) <= 3


def gather_as_megatron_does(rank: int) -> None:
    from megatron.core import parallel_state

    from mcore_longctx.train import checkpoint

    def gathered(optimizer: Any, model: Any) -> dict[str, Any]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {**checkpoint._LAYOUT_FREE, "dp_cp_group": group}
        before = [dict(vars(one)) for one in optimizer.chained_optimizers]
        state = optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
        mine = own_shards(optimizer, model)
        # Megatron's objects have nothing replaced on them, and what is beside the tensors is what Megatron puts there
        assert [one.keys() for one in before] == [vars(one).keys() for one in optimizer.chained_optimizers]
        assert mine.keys() == state.keys()
        beside = [{k: v for k, v in one.items() if k != "param_state"} for one in (mine, state)]
        assert repr(beside[0]) == repr(beside[1])
        return state

    checkpoint.own_shards = gathered


def assembled(folder: Path) -> dict[str, Any]:
    """Whole tensors from the chunks of a checkpoint, each element written once."""
    import torch

    found = {}
    for name, tensor in read_torch_dist(folder).tensors.items():
        whole, seen = torch.full(tensor.shape, float("nan"), dtype=torch.float64), torch.zeros(tensor.shape, dtype=torch.int8)
        for chunk in tensor.chunks:
            with chunk.file.open("rb") as file:
                file.seek(chunk.offset)
                values = torch.load(io.BytesIO(file.read(chunk.length)), weights_only=True)
            place = tuple(slice(at, at + n) for at, n in zip(chunk.offsets, values.shape, strict=True))
            whole[place] = values.double()
            seen[place] += 1
        assert seen.min() == seen.max() == 1, name
        found[name] = whole
    return found


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "data_parallel_size": 2},
        {"data_parallel_size": 2, "precision": "bf16"},
    ],
    ids=["TP2-DP2", "DP2-bf16"],
)
def test_the_state_is_that_of_megatrons_own_gathering(tmp_path: Path, layout: dict[str, Any]) -> None:
    world = make_world(tmp_path)
    own, stock = (make_job(world, name, train_iters=3, **layout) for name in ("own", "stock"))
    train(own)
    train(stock, before=gather_as_megatron_does)
    mine, theirs = (assembled(iteration_folder(job.checkpoints, 3)) for job in (own, stock))
    assert mine.keys() == theirs.keys()
    assert sum(name.startswith("optimizer.state.") for name in mine) > 10
    for name in mine:
        assert mine[name].equal(theirs[name]), name
