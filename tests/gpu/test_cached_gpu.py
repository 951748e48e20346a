"""On one CUDA device, over NCCL: a prompt's cache and its continuations against transformers. `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mcore_longctx.evaluate.cached import greedy, option_scores, prefill, score_suffix
from mcore_longctx.model import destroy_process_groups, init_process_groups
from mcore_longctx.recipe.schema import Parallel
from tests.gpu.test_model_gpu import CUDA_SHAPE, LLAMA3
from tests.model.llama import build, hf_llama, megatron_names

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPT, SUFFIX, ANSWER = 3001, 40, 24


@pytest.fixture(scope="module")
def _one_device() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    init_process_groups(Parallel(), seed=0)
    yield
    destroy_process_groups()


@pytest.mark.usefixtures("_one_device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-4), ("fp32", 1e-3), ("bf16", 0.3)])
def test_continuations_equal_transformers_full_forward(precision: Any, tolerance: float) -> None:
    """fp64: transformers' norms and softmax stay in float32. Log-probabilities are of order 10."""
    hf = hf_llama(CUDA_SHAPE, LLAMA3).cuda()
    weights = megatron_names(dict(hf.state_dict()), CUDA_SHAPE)
    storage = "bf16" if precision == "bf16" else "fp32"
    model = build(Parallel(), weights, new_groups=False, shape=CUDA_SHAPE, rope=LLAMA3, precision=storage, seq_length=4096).eval()
    if precision == "fp64":
        model, hf = model.double(), hf.double()
    ids = torch.randint(CUDA_SHAPE.vocab_size, (PROMPT + SUFFIX,), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        logits = hf(ids[None].cuda()).logits[0].double().cpu()
    expected = logits[PROMPT + ANSWER - 1 : -1].log_softmax(-1).gather(1, ids[PROMPT + ANSWER :, None])[:, 0].numpy()

    cache, suffix = prefill(model, ids[:PROMPT].numpy()), ids[PROMPT:].numpy()
    before = [rows.clone() for layer in cache.layers for rows in layer]
    for _ in range(2):  # the second branch finds the cache as the first did
        assert np.abs(score_suffix(model, cache, suffix, ANSWER).log_probability - expected).max() < tolerance
    (option,) = option_scores(model, cache, suffix[:ANSWER], [suffix[ANSWER:]])
    assert abs(option.log_probability - expected.sum()) < tolerance * len(expected)
    said = greedy(model, cache, suffix, max_new_tokens=16)
    assert all(torch.equal(a, b) for a, b in zip(before, (rows for layer in cache.layers for rows in layer), strict=True))
    if precision != "bf16":  # bf16 may choose another of two tokens that are nearly alike
        tokens = ids[None].cuda()
        out = hf.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert said == out[0, ids.numel() :].tolist()
