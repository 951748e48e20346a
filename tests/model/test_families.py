"""Biases and norms of heads, as the families have them: logits and every gradient against transformers', in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp

from mcore_longctx.errors import ConfigError
from mcore_longctx.families import ModelShape
from mcore_longctx.model import (
    build_gpt_model,
    destroy_process_groups,
    init_process_groups,
    longctx_layer_spec,
    transformer_config,
)
from mcore_longctx.model.builder import gpt_model_of_spec
from mcore_longctx.model.norm import RMSNorm
from mcore_longctx.recipe.schema import Activations, Parallel
from tests.model.llama import PLAIN_ROPE, SHAPE, build, hf_model, megatron_names, own_part
from tests.model.test_layouts import batches, forward_backward, layout
from tests.multiproc import run_processes

TOLERANCE = 1e-5  # of the largest entry: float32 sums in another order

SHAPES: dict[str, ModelShape] = {
    "llama with biases": replace(SHAPE, add_bias_linear=True),
    "llama with biases, tied": replace(SHAPE, add_bias_linear=True, tie_word_embeddings=True),
    "mistral": replace(SHAPE, family="mistral", kv_channels=16),
    "qwen2": replace(SHAPE, family="qwen2", add_qkv_bias=True),
    "qwen2, tied": replace(SHAPE, family="qwen2", add_qkv_bias=True, tie_word_embeddings=True, layernorm_epsilon=1e-6),
    "qwen3": replace(SHAPE, family="qwen3", qk_layernorm=True, kv_channels=16, layernorm_epsilon=1e-6),
    "qwen3, tied": replace(SHAPE, family="qwen3", qk_layernorm=True, tie_word_embeddings=True),
}
LAYOUTS = [layout(tp=2), layout(tp=2, sp=True), layout(pp=2), layout(cp=2)]
ACTIVATIONS = {
    "none": Activations(),
    "attention kept, tiled": Activations(recompute="attention_kept", mlp_tile=12),
    "full": Activations(recompute="full"),
}
FOUR_RANKS = [layout(tp=2, pp=2, sp=True), layout(tp=2, cp=2, sp=True)]


def rope_of(shape: ModelShape) -> Any:
    return replace(PLAIN_ROPE, head_dim=shape.kv_channels)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """name.pt: weights, mean loss and gradients by transformers, under Megatron's names."""
    folder = tmp_path_factory.mktemp("families")
    for name, shape in SHAPES.items():
        hf, batch = hf_model(shape, rope_of(shape)), batches(shape.vocab_size)["uneven"]
        weights = {key: tensor.clone() for key, tensor in megatron_names(dict(hf.state_dict()), shape).items()}
        losses = torch.nn.functional.cross_entropy(
            hf(batch.tokens).logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        loss = (losses * batch.mask.flatten()).sum() / batch.mask.sum()
        loss.backward()
        gradients = megatron_names({key: parameter.grad for key, parameter in hf.named_parameters()}, shape)
        torch.save({"weights": weights, "loss": loss.item(), "gradients": gradients}, folder / f"{name}.pt")
    return folder


def errors_of(folder: Path, layouts: list[Parallel], policies: list[str]) -> dict[str, float]:
    """Run in each rank: largest difference to transformers, by family, layout and quantity, relative to the largest entry."""
    errors: dict[str, float] = {}
    for parallel in layouts:
        init_process_groups(parallel, seed=1)
        for name, shape in SHAPES.items():
            saved = torch.load(folder / f"{name}.pt", weights_only=True)
            for policy in policies:
                options = {"shape": shape, "rope": rope_of(shape), "activations": ACTIVATIONS[policy], "new_groups": False}
                model = build(parallel, saved["weights"], **options)
                result = forward_backward(model, batches(shape.vocab_size)["uneven"])
                label = f"{parallel.describe()}, {name}, {policy}"
                if result.loss is not None:
                    errors[f"{label}: loss"] = abs(result.loss - saved["loss"]) / saved["loss"]
                for key, (own_name, parameter, gradient) in result.gradients.items():
                    expected = own_part(model, own_name, parameter, saved["gradients"])
                    whole = saved["gradients"].get(key, saved["gradients"]["embedding.word_embeddings.weight"])
                    errors[f"{label}: gradient of {key}"] = ((gradient - expected).abs().max() / whole.abs().max()).item()
    destroy_process_groups()
    return errors


def assert_small(results: list[dict[str, float]], *wanted: str) -> None:
    for rank, errors in enumerate(results):
        wrong = [f"rank {rank}: {what}: {error:.1e}" for what, error in errors.items() if not error < TOLERANCE]
        assert not wrong, "\n".join(wrong[:40])
        for text in wanted:
            assert any(text in what for what in errors), f"rank {rank} has nothing of {text}"


OF_ALL = ("linear_qkv.bias", "linear_proj.bias", "linear_fc1.bias", "linear_fc2.bias", "q_layernorm.weight", "k_layernorm.weight")


def test_one_process_gives_the_loss_and_gradients_of_transformers(reference: Path) -> None:
    assert_small([errors_of(reference, [Parallel()], list(ACTIVATIONS))], *OF_ALL)


@pytest.mark.multiproc
def test_two_ranks_give_the_loss_and_gradients_of_transformers(reference: Path) -> None:
    assert_small(run_processes(errors_of, 2, reference, LAYOUTS, ["none", "attention kept, tiled"]), *OF_ALL)


@pytest.mark.multiproc
def test_four_ranks_give_the_loss_and_gradients_of_transformers(reference: Path) -> None:
    assert_small(run_processes(errors_of, 4, reference, FOUR_RANKS, ["attention kept, tiled"]), *OF_ALL)


@pytest.fixture
def one_process() -> Iterator[None]:
    init_process_groups(Parallel(), seed=0)
    yield
    destroy_process_groups()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_transformers(name: str) -> None:
    shape = SHAPES[name]
    hf = hf_model(shape, rope_of(shape))
    model = build(Parallel(), megatron_names(dict(hf.state_dict()), shape), shape=shape, rope=rope_of(shape), new_groups=False)
    ids, positions = (
        torch.randint(shape.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1)),
        torch.arange(64).expand(2, -1),
    )
    with torch.no_grad():
        theirs, ours = hf(ids).logits, model(ids, positions)[..., : shape.vocab_size]
    assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()


@pytest.mark.usefixtures("one_process")
def test_initial_biases_are_zero_and_norms_one() -> None:
    shape = replace(SHAPE, add_bias_linear=True, qk_layernorm=True)
    for name, parameter in build_gpt_model(shape, PLAIN_ROPE, Parallel(), precision="fp32", seq_length=64).named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name


@pytest.mark.usefixtures("one_process")
def test_norms_of_heads_that_a_spec_lacks_are_not_left_out_silently() -> None:
    config = transformer_config(replace(SHAPE, qk_layernorm=True), PLAIN_ROPE, Parallel(), precision="fp32")

    def built(spec: Any) -> Any:
        return gpt_model_of_spec(config, spec, vocab_size=384, seq_length=64, rope=PLAIN_ROPE)

    with pytest.raises(ConfigError, match="has qk_layernorm, and the layer spec has no norms of queries and keys"):
        built(longctx_layer_spec())
    attention = built(longctx_layer_spec(qk_layernorm=True)).decoder.layers[0].self_attention
    assert isinstance(attention.q_layernorm, RMSNorm)
    assert attention.q_layernorm.weight.shape == attention.k_layernorm.weight.shape == (8,)
    plain = build(Parallel(), new_groups=False).decoder.layers[0].self_attention
    assert isinstance(plain.q_layernorm, IdentityOp | None)
