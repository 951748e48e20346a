"""The models that are measured: stock Megatron-Core and ours, with the same weights, the same tokens and one training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from live_bytes import LiveBytes
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel

from mcore_longctx.families import ModelShape
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import LongContextAttention, build_gpt_model, init_process_groups, transformer_config
from mcore_longctx.model.initial_weights import set_initial_weights
from mcore_longctx.parallel.exchange import make_exchange
from mcore_longctx.recipe.schema import Activations, Parallel
from mcore_longctx.rope import RopeScaling

__all__ = ["LLAMA_8B", "TINY", "AttentionCalls", "ForwardOnly", "LayersStep", "TrainingStep", "our_model", "stock_model"]

TINY = ModelShape(
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=896,  # 3.5 h, as Llama-3.1-8B
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=128,
    vocab_size=8192,
)
"""The CPU twin: Llama's head dimension and proportions, attention 70 to 95 % of the FLOPs from 8K tokens on."""

LLAMA_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)
ROTARY_BASE = 500_000.0
SEED = 7


def rope(shape: ModelShape) -> RopeScaling:
    """Plain RoPE at Llama 3's base."""
    return RopeScaling(type="none", head_dim=shape.kv_channels, rope_theta=ROTARY_BASE)


def start_groups() -> None:
    """One process; matrix products in the precision of their inputs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not torch.distributed.is_initialized():
        init_process_groups(Parallel(), seed=SEED)


def stock_model(shape: ModelShape, tokens: int, *, flash: bool, precision: str = "fp32") -> Any:
    """Megatron-Core's GPTModel: local layers, its RotaryEmbedding, its full recompute of every layer, its logits and its loss.

    `flash` puts our attention kernel where Megatron's own DotProductAttention has a matrix of s x s scores, and changes nothing else.
    """
    start_groups()
    with device_context():
        config = transformer_config(
            shape,
            rope(shape),
            Parallel(),
            precision=precision,  # type: ignore[arg-type]
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=1,
        )
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        if flash:
            spec.submodules.self_attention.submodules.core_attention = LongContextAttention
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=shape.vocab_size,
            max_sequence_length=tokens,
            position_embedding_type="rope",
            rotary_base=int(ROTARY_BASE),
        )
        set_initial_weights(model, shape.vocab_size, SEED)
        return model.to(training_device()).train()


def our_model(shape: ModelShape, tokens: int, activations: Activations, *, precision: str = "fp32") -> Any:
    """`build_gpt_model` under a policy for activations."""
    start_groups()
    return build_gpt_model(
        shape,
        rope(shape),
        Parallel(),
        precision=precision,  # type: ignore[arg-type]
        seq_length=tokens,
        seed=SEED,
        activations=activations,
    ).train()


def random_tokens(shape: ModelShape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and labels [1, tokens]."""
    ids = torch.randint(shape.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(SEED))
    device = training_device()
    return ids[:, :-1].to(device), torch.arange(tokens, device=device)[None], ids[:, 1:].to(device)


class TrainingStep:
    """Forward and backward over one sequence, the mean loss of its tokens. Gradients are there from the start, as in training.

    Stock models give a loss for each token; Megatron's DotProductAttention is given the mask that Megatron-LM's data loader makes for it
    ([1, 1, s, s], True where a key is hidden). Ours are trained as the product does: with the weight of each token in the sum.
    """

    def __init__(self, model: Any, shape: ModelShape, tokens: int, *, is_stock: bool = False, with_mask: bool = False) -> None:
        self.model, self.shape, self.is_stock, self.with_mask = model, shape, is_stock, with_mask
        self.batch = random_tokens(shape, tokens)
        self.loss = float("nan")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def states(self) -> Iterator[Tensor]:
        """Weights, gradients and the batch."""
        for parameter in self.model.parameters():
            yield parameter
            yield parameter.grad
        yield from self.batch

    def step(self) -> None:
        """One call."""
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        with device_context():
            loss = self.forward()
            torch.autograd.backward(loss)
        self.loss = loss.item()

    def forward(self) -> Tensor:
        """The loss."""
        ids, positions, labels = self.batch
        if self.is_stock:
            tokens = ids.size(1)
            mask = (
                torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).triu_(1)[None, None] if self.with_mask else None
            )
            return self.model(ids, positions, mask, labels=labels).float().mean()
        weights = torch.full(labels.shape, 1 / labels.numel(), device=labels.device)
        return self.model(ids, positions, None, labels=labels, loss_weights=weights)

    def facts(self) -> dict[str, Any]:
        """Loss, norm of all gradients, and attention operators of a step over the first tokens."""
        norm = torch.stack([parameter.grad.float().norm() for parameter in self.model.parameters()]).norm().item()
        told = {"loss": self.loss, "grad_norm": norm}
        self.batch = tuple(part[:, :COUNTED_TOKENS].contiguous() for part in self.batch)
        with OperatorCalls() as calls:
            self.step()
        return told | {"attention": calls.attention(self.shape.num_layers)}


class ForwardOnly(TrainingStep):
    """Counts the bytes that are alive at the end of the forward pass, above weights, gradients and batch (CPU)."""

    def step(self) -> None:
        """Forward."""
        with device_context(), LiveBytes(self.states()) as live:
            loss = self.forward()
            self.alive = live.now - live.at_start
        del loss

    def facts(self) -> dict[str, Any]:
        """The bytes."""
        return {"bytes": self.alive}


class LayersStep:
    """Forward and backward through the layers of a model from given hidden states, without embedding and loss head.

    `kernel` is a name of `kernels.attention`, or empty for the one that the rule chooses.
    """

    def __init__(self, shape: ModelShape, tokens: int, activations: Activations, precision: str, kernel: str = "") -> None:
        self.model = our_model(replace(shape, vocab_size=128), tokens, activations, precision=precision)
        device, dtype = training_device(), self.model.config.params_dtype
        generator = torch.Generator(device).manual_seed(SEED)
        size = (tokens, 1, shape.hidden_size)
        self.hidden = torch.randn(size, generator=generator, device=device, dtype=dtype).requires_grad_()
        self.grad_out = torch.randn(size, generator=generator, device=device, dtype=dtype)
        self.angles = self.model.rotary_pos_emb.angles(torch.arange(tokens, device=device)[None])
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.hidden.grad = torch.zeros_like(self.hidden)
        cores = [layer.self_attention.core_attention for layer in self.model.decoder.layers]
        if kernel:
            for core in cores:
                core.exchange = make_exchange(core.cp_comm_type, core.cp_group, kernels=(kernel,))

    def states(self) -> Iterator[Tensor]:
        """Weights, gradients, input, gradient of the output, angles."""
        for parameter in (*self.model.parameters(), self.hidden):
            yield parameter
            yield parameter.grad
        yield self.grad_out
        yield self.angles

    def step(self) -> None:
        """One call."""
        self.hidden.grad.zero_()
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        with device_context():
            out = self.model.decoder(hidden_states=self.hidden, attention_mask=None, rotary_pos_emb=self.angles)
            torch.autograd.backward(out, self.grad_out)

    def facts(self) -> dict[str, Any]:
        """Norms of the gradients of the input and of all weights: policies must agree."""
        weights = torch.stack([parameter.grad.float().norm() for parameter in self.model.parameters()]).norm().item()
        return {"input_grad": self.hidden.grad.float().norm().item(), "grad_norm": weights}


COUNTED_TOKENS = 256


@dataclass(frozen=True)
class AttentionCalls:
    """Attention operators of one step, per layer."""

    forward: float
    backward: float


class OperatorCalls(TorchDispatchMode):
    """Counts torch's operators by name: what ran, whoever called it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count and run."""
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    def attention(self, layers: int) -> AttentionCalls:
        """Fused attention operators, per layer."""
        fused = {name: count for name, count in self.counts.items() if "attention" in name or "flash_attn" in name}
        backward = sum(count for name, count in fused.items() if "backward" in name or "bwd" in name)
        return AttentionCalls(forward=(sum(fused.values()) - backward) / layers, backward=backward / layers)


def with_layers(shape: ModelShape, layers: int) -> ModelShape:
    """The same model with another depth."""
    return replace(shape, num_layers=layers)
