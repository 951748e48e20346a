"""Time of one optimizer step, term by term.

Symbols of the formulas: s tokens of a sequence, L layers, h hidden size, d head dimension, q query and kv key/value heads, f feed-forward
size, V words, P parameters, P_layer the weights of a layer's linear layers, TP PP CP DP the layout, t = s/CP tokens of a rank, v virtual
pipeline chunks, B sequences of a step, m = B/DP sequences of a replica, N = TP PP CP DP GPUs, peak the bf16 FLOP/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from mcore_longctx.layout.heads import key_head_replicas
from mcore_longctx.plan.calibration import CALIBRATION, Calibration
from mcore_longctx.plan.hardware import KernelRate
from mcore_longctx.plan.models import parameters, parameters_per_layer, step_flops
from mcore_longctx.plan.other_stacks import elementwise_bytes, is_own
from mcore_longctx.plan.own_stack import offloaded_bytes
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.terms import Term

__all__ = ["StepTime", "step_time"]

_FLOAT = 4  # bytes in which our exchanges sum and send the gradients of keys and values
_BACKWARD = 2.5  # FLOPs of attention's backward over its forward: five matrix products against two
_TRAFFIC = {"full": 4, "attention_kept": 3, "selective": 2, "none": 0}  # collectives of a layer that recompute repeats


@dataclass(frozen=True)
class StepTime:
    """Seconds. `micro_batch` is the unit after which a signal is answered: one forward and backward of one micro-batch."""

    terms: tuple[Term, ...]
    total: float
    micro_batch: float
    tokens_per_second_per_gpu: float
    mfu: float  # causal, no recompute counted, of the bf16 peak
    exchange_hidden: bool  # whether the key/value ring hides behind its kernels
    exchange_bytes: float  # received by a GPU per layer and sequence, forward
    offload_bytes: float  # to the host and back, per micro-batch and GPU


def step_time(setup: Setup, calibration: Calibration = CALIBRATION) -> StepTime:
    """One optimizer step; `terms` add up to `total`.

    Raises:
        ConfigError: the GPU has no kernel of the setup's name.
    """
    c = _Costs(setup, calibration)
    sequence = (
        c.linear(),
        c.elementwise(),
        c.head(),
        c.attention(forward=True),
        c.attention(forward=False),
        c.exchange(),
        c.tensor_parallel(),
        c.offload(),
    )
    seconds = sum(term.value for term in sequence)  # of one sequence
    compute = c.sequences * seconds
    bubble = c.bubble(compute)
    step = (*(_times(term, c.sequences) for term in sequence), bubble, c.pipeline())
    rest = (c.data_parallel(compute + bubble.value), c.optimizer(), c.host_parameters(), c.fixed())
    terms = (*step, *rest)
    total = sum(term.value for term in terms)
    gpus, batch = setup.parallel.world_size, c.sequences * setup.parallel.data_parallel_size
    return StepTime(
        terms=terms,
        total=total,
        micro_batch=setup.micro_batch_size * seconds,
        tokens_per_second_per_gpu=batch * setup.seq_length / total / gpus,
        mfu=batch * sum(step_flops(setup.shape, setup.seq_length)) / (total * gpus * setup.gpu.peak_flops),
        exchange_hidden=c.exchange_hidden,
        exchange_bytes=c.exchange_bytes,
        offload_bytes=2 * c.offloaded,
    )


@dataclass(frozen=True)
class _Costs:
    """The terms for one sequence (`linear` to `offload`) and for the step (the others), seconds."""

    setup: Setup
    calibration: Calibration

    @cached_property
    def sequences(self) -> float:
        """Of a replica and step. Not a whole number where somebody published a batch that does not divide."""
        setup = self.setup
        return max(setup.micro_batch_size, setup.global_batch_size / setup.parallel.data_parallel_size)

    @cached_property
    def flops(self) -> tuple[float, float, float]:
        return step_flops(self.setup.shape, self.setup.seq_length)

    @cached_property
    def ranks(self) -> int:
        """Of one replica."""
        return self.setup.parallel.world_size // self.setup.parallel.data_parallel_size

    @cached_property
    def layers(self) -> float:
        """Of a pipeline stage."""
        return self.setup.shape.num_layers / self.setup.parallel.pipeline_model_parallel_size

    @cached_property
    def rate(self) -> KernelRate:
        return self.setup.gpu.kernel(self.setup.kernel)

    @cached_property
    def tokens(self) -> float:
        return self.setup.seq_length / self.setup.parallel.context_parallel_size

    def gemm_rate(self, kind: str) -> float:
        share = self.calibration.gemm_fp8 if kind == "fp8" else self.calibration.gemm_bf16
        return self.setup.gpu.peak_flops * self.setup.gpu.sustained * share

    def bandwidth(self, gpus: int) -> float:
        """Of a group that spans so many GPUs: NVLink inside a node, else the network adapter of a GPU."""
        gpu = self.setup.gpu
        if gpus <= gpu.gpus_per_node:
            return gpu.nvlink_bandwidth * self.calibration.nvlink
        return gpu.network_bandwidth * self.calibration.network

    @cached_property
    def own(self) -> bool:
        return is_own(self.setup)

    @cached_property
    def again(self) -> float:
        """Share of the linear layers' forward that runs again in the backward pass."""
        setup = self.setup
        shape = setup.shape
        matrix = shape.hidden_size * shape.ffn_hidden_size / parameters_per_layer(shape)  # one of the three of the MLP
        if setup.recompute == "none":
            return 2 * matrix if setup.mlp_tile is not None else 0.0
        if setup.recompute == "selective":
            return 3 * matrix
        if setup.recompute == "attention_kept" or self.own:
            return 1 - matrix  # nobody needs the product with `down` again, and ours does not make it
        return 1 + 3 * matrix if setup.mlp_tile is not None else 1.0  # tiled in a checkpoint: the MLP's forward runs a third time

    def linear(self) -> Term:
        rate = self.gemm_rate(self.setup.gemm)
        return Term(
            "linear layers",
            self.flops[0] * (1 + self.again / 3) / self.ranks / rate,
            "6 L P_layer s (1 + x/3) / (TP PP CP) / (peak e_g)",
            f"{self.flops[0]:.3g} (1 + {self.again:.2f}/3) / {self.ranks} / {rate:.3g}",
            f"x = {self.again:.2f} of the forward is done again",
        )

    def elementwise(self) -> Term:
        """Norms, residual sums, rotary embedding, SwiGLU, casts: bytes through the GPU's memory, the backward twice the forward."""
        bytes_ = elementwise_bytes(self.setup)
        bandwidth = self.setup.gpu.memory_bandwidth * self.calibration.memory
        tokens = self.tokens / self.setup.parallel.tensor_model_parallel_size
        return Term(
            "elementwise",
            self.layers * tokens * bytes_ * (3 + self.again) / bandwidth,
            "L/PP t/TP b (3 + x) / memory bandwidth",
            f"{self.layers:g} x {tokens:.4g} x {bytes_:,} x {3 + self.again:.2f} / {bandwidth:.3g}",
            "read and written in the forward of a layer",
        )

    def head(self) -> Term:
        setup = self.setup
        again = 4 / 3 if setup.loss == "chunked" and not self.own else 1.0  # ours has the gradients when it has the logits
        ranks = setup.parallel.tensor_model_parallel_size * setup.parallel.context_parallel_size
        value = self.flops[1] * again / ranks / self.gemm_rate("bf16")
        return Term(
            "head",
            value,
            "6 V h s / (TP CP) / (peak e_g)",
            f"{self.flops[1]:.3g} x {again:.2f} / {ranks} / {self.gemm_rate('bf16'):.3g}",
            "on the last stage",
        )

    @cached_property
    def _exchanges(self) -> dict[str, float]:
        """Share of the layers with each exchange."""
        kinds = self.setup.parallel.cp_comm_types
        return (
            {kind: kinds.count(kind) / len(kinds) for kind in set(kinds)} if self.setup.parallel.context_parallel_size > 1 else {}
        )

    @cached_property
    def forwards(self) -> int:
        return 2 if self.setup.recompute == "full" else 1

    def attention(self, *, forward: bool) -> Term:
        flops = self.flops[2] / 3 / self.ranks
        ring = sum(share for kind, share in self._exchanges.items() if kind in ("p2p", "a2a+p2p"))
        slower = 1 + ring * self.calibration.ring_tokens / self.tokens  # a ring merges t rows after each piece of t^2 work
        times, rate = (self.forwards, self.rate.forward) if forward else (_BACKWARD, self.rate.backward)
        return Term(
            f"attention {'forward' if forward else 'backward'}",
            times * flops * slower / rate,
            f"{'n_f' if forward else '2.5'} 2 s^2 q d L / (TP PP CP) / {'rf' if forward else 'rb'} (1 + ring t0/t)",
            f"{times} x {flops:.3g} / {rate:.3g} x {slower:.3f}",
            "run again in the backward pass" if forward and self.forwards == 2 else "",
        )

    @cached_property
    def _kv_bytes(self) -> float:
        """Keys and values of a token on a tensor-parallel rank, bf16."""
        shape, tp = self.setup.shape, self.setup.parallel.tensor_model_parallel_size
        return 2 * max(1.0, shape.num_query_groups / tp) * shape.kv_channels * self.setup.bytes_per_element

    @cached_property
    def _qo_bytes(self) -> float:
        shape, tp = self.setup.shape, self.setup.parallel.tensor_model_parallel_size
        return 2 * shape.num_attention_heads / tp * shape.kv_channels * self.setup.bytes_per_element

    def _copies(self, ranks: int) -> int:
        """How often our all-to-all over so many ranks sends each key/value head: to every rank that has queries of its group."""
        shape, tp = self.setup.shape, self.setup.parallel.tensor_model_parallel_size
        return key_head_replicas(shape.num_attention_heads // tp, max(1, shape.num_query_groups // tp), ranks) if self.own else 1

    def _received(self, kind: str) -> tuple[float, float]:
        """Bytes that a GPU receives in one layer's forward of a sequence: (through the ring or the gather, through the all-to-all)."""
        p, t = self.setup.parallel, self.tokens
        cp = p.context_parallel_size
        if kind == "a2a":
            return 0.0, (self._copies(cp) * self._kv_bytes + self._qo_bytes) * t * (cp - 1) / cp
        if kind == "a2a+p2p":
            inner, ring = p.hierarchical_context_parallel_sizes or (1, cp)
            keys = self._copies(inner) * self._kv_bytes
            return keys * t * (ring - 1), (keys + self._qo_bytes) * t * (inner - 1) / inner
        repeated = (
            kind == "all_gather" and self.setup.sharding == "zero3"
        )  # torchtitan repeats keys and values to the query heads first
        return (self._qo_bytes if repeated else self._kv_bytes) * t * (cp - 1), 0.0

    @cached_property
    def exchange_bytes(self) -> float:
        return sum(share * sum(self._received(kind)) for kind, share in self._exchanges.items())

    @cached_property
    def _gradients(self) -> float:
        """Bytes of key and value gradients over those of keys and values: ours travel in float32."""
        return _FLOAT / self.setup.bytes_per_element if self.own else 1.0

    def _ring_backward(self, kind: str) -> float:
        """Traffic of a ring's backward over its forward: keys and values again, and their gradients, which ours brings home: a hop more."""
        cp = self.setup.parallel.context_parallel_size
        ranks = (self.setup.parallel.hierarchical_context_parallel_sizes or (1, cp))[1] if kind == "a2a+p2p" else cp
        home = ranks / (ranks - 1) if self.own and ranks > 1 else 1.0
        return 1 + self._gradients * home

    def _ring_left(self, kind: str) -> float:
        """Seconds of one layer that its ring waits for transfers."""
        p = self.setup.parallel
        moved = (
            self.calibration.ring_traffic
            * self._received(kind)[0]
            / self.bandwidth(p.tensor_model_parallel_size * p.context_parallel_size)
        )
        kernel = self.flops[2] / 3 / self.ranks / self.layers * (1 + self.calibration.ring_tokens / self.tokens)
        forward, backward = kernel / self.rate.forward, _BACKWARD * kernel / self.rate.backward
        return self.forwards * max(0.0, moved - forward) + max(0.0, self._ring_backward(kind) * moved - backward)

    @cached_property
    def exchange_hidden(self) -> bool:
        return all(self._ring_left(kind) == 0.0 for kind in self._exchanges if kind in ("p2p", "a2a+p2p"))

    def exchange(self) -> Term:
        p = self.setup.parallel
        if not self._exchanges:
            return Term("context-parallel exchange", 0.0, "0", "0", "one context-parallel rank")
        group = p.tensor_model_parallel_size * p.context_parallel_size
        value, parts = 0.0, []
        for kind, share in sorted(self._exchanges.items()):
            ring, all_to_all = self._received(kind)
            if kind == "all_gather":
                seconds = (self.forwards + 1 + self._gradients) * ring / self.bandwidth(group)
            elif kind == "p2p":
                seconds = self._ring_left(kind)
            else:
                inner = p.tensor_model_parallel_size * (p.hierarchical_context_parallel_sizes or (p.context_parallel_size,))[0]
                seconds = (self.forwards + (2 if self.own else 1)) * all_to_all / self.bandwidth(inner)
                seconds += self._ring_left(kind) if kind == "a2a+p2p" else 0.0
            value += share * self.layers * seconds
            parts.append(f"{kind}: {share * self.layers:g} layers x {seconds:.3g} s")
        if self.own:  # gradients in float32; do, q, k, v and o one way and dq, dk and dv back are twice q, k, v and o
            ring_back, gather_back, all_to_all_back, keys = "1 + 4/e CP/(CP-1)", "1 + 4/e", "2", "r kv"
        else:
            ring_back, gather_back, all_to_all_back, keys = "2", "2", "1", "kv"
        formulas = {
            "p2p": f"L/PP (n_f max(0, 1.4 x/bw - kernel) + max(0, 1.4 ({ring_back}) x/bw - kernel)), x = 2 e t kv/TP d (CP-1)",
            "all_gather": f"L/PP (n_f + {gather_back}) 2 e t kv/TP d (CP-1) / bw",
            "a2a": f"L/PP (n_f + {all_to_all_back}) 2 e t d (q + {keys})/TP (CP-1)/CP / bw",
            "a2a+p2p": "a2a inside, p2p between",
        }
        note = "hidden behind its kernels" if value == 0.0 else "not hidden"
        return Term(
            "context-parallel exchange",
            value,
            "; ".join(formulas[kind] for kind in sorted(self._exchanges)),
            "; ".join(parts),
            note,
        )

    def tensor_parallel(self) -> Term:
        tp = self.setup.parallel.tensor_model_parallel_size
        if tp == 1:
            return Term("tensor-parallel collectives", 0.0, "0", "0", "one tensor-parallel rank")
        count = 10 + _TRAFFIC[self.setup.recompute]
        bytes_ = self.tokens * self.setup.shape.hidden_size * self.setup.bytes_per_element * (tp - 1) / tp
        return Term(
            "tensor-parallel collectives",
            self.layers * count * bytes_ / self.bandwidth(tp),
            "L/PP n 2 h t (TP-1)/TP / bw",
            f"{self.layers:g} x {count} x {bytes_:.3g} / {self.bandwidth(tp):.3g}",
            "not overlapped",
        )

    @cached_property
    def offloaded(self) -> float:
        """Bytes that a GPU sends to its host for one micro-batch."""
        return offloaded_bytes(self.setup).value if self.setup.offload_fraction else 0.0

    def offload(self) -> Term:
        if not self.offloaded:
            return Term("offload", 0.0, "0", "0", "nothing is kept on the host")
        moved = self.offloaded / self.setup.micro_batch_size / self.setup.gpu.pcie_bandwidth
        away = self.setup.offload_fraction
        linear, kernel = self.linear().value + self.elementwise().value, self.attention(forward=True).value / self.forwards
        forward = away * (linear / 4 + kernel)
        backward = away * (linear * 3 / 4 + self.attention(forward=False).value + (self.forwards - 1) * kernel)
        return Term(
            "offload",
            max(0.0, moved - forward) + max(0.0, moved - backward),
            "max(0, bytes/pcie - forward) + max(0, bytes/pcie - backward), of the offloaded layers",
            f"{moved:.3g} s of transfer against {forward:.3g} s forward, {backward:.3g} s backward",
            "" if moved > min(forward, backward) else "hidden",
        )

    def bubble(self, compute: float) -> Term:
        pp, chunks = self.setup.parallel.pipeline_model_parallel_size, self.setup.virtual_pipeline_chunks
        micro_batches = self.sequences / self.setup.micro_batch_size
        value = compute * (pp - 1) / (micro_batches * chunks)
        return Term(
            "pipeline bubble", value, "m t_seq (PP-1) / (m v)", f"{compute:.3g} x {pp - 1} / ({micro_batches:g} x {chunks})"
        )

    def pipeline(self) -> Term:
        p = self.setup.parallel
        pp = p.pipeline_model_parallel_size
        if pp == 1:
            return Term("pipeline transfers", 0.0, "0", "0", "one stage")
        bytes_ = self.tokens / p.tensor_model_parallel_size * self.setup.shape.hidden_size * self.setup.bytes_per_element
        value = 2 * (pp - 1) * self.setup.micro_batch_size * bytes_ / self.bandwidth(p.world_size)
        return Term(
            "pipeline transfers",
            value,
            "2 (PP-1) 2 h t/TP / bw",
            f"2 x {pp - 1} x {bytes_:.3g} / {self.bandwidth(p.world_size):.3g}",
            "once through the stages and back; the others are hidden",
        )

    def data_parallel(self, compute: float) -> Term:
        setup = self.setup
        p = setup.parallel
        weights = parameters(setup.shape) / (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
        shards = p.data_parallel_size * p.context_parallel_size
        bandwidth = self.bandwidth(p.world_size // p.pipeline_model_parallel_size)
        if shards == 1:
            return Term("data parallel", 0.0, "0", "0", "one shard")
        share = (shards - 1) / shards
        if setup.sharding == "zero3" and p.pipeline_model_parallel_size == 1:
            moved = self.sequences / setup.micro_batch_size * 3 * 2 * weights * share / bandwidth
            behind = self.calibration.overlap * self.sequences * (self.linear().value + self.head().value)
            formula = "max(0, m 6 P/(TP PP) (n-1)/n / bw - hidden), n = DP CP"
        else:
            moved = (4 + 2) * weights * share / bandwidth
            behind = self.calibration.overlap * compute
            formula = "max(0, (4 + 2) P/(TP PP) (n-1)/n / bw - hidden), n = DP CP"
        note = "hidden" if moved <= behind else ""
        return Term("data parallel", max(0.0, moved - behind), formula, f"{moved:.3g} s, of which {behind:.3g} s can hide", note)

    def optimizer(self) -> Term:
        setup = self.setup
        p = setup.parallel
        if setup.optimizer == "adam_cpu":
            nodes = max(1, p.world_size // setup.gpu.gpus_per_node)
            value = parameters(setup.shape) / nodes / self.calibration.adam_cpu
            return Term(
                "optimizer", value, "P / nodes / a", f"{parameters(setup.shape):.3g} / {nodes} / {self.calibration.adam_cpu:.3g}"
            )
        shard = parameters(setup.shape) / p.world_size
        return Term(
            "optimizer",
            26 * shard / setup.gpu.memory_bandwidth,
            "26 P / N / memory bandwidth",
            f"26 x {shard:.3g} / {setup.gpu.memory_bandwidth:.3g}",
        )

    def host_parameters(self) -> Term:
        setup = self.setup
        if not setup.parameters_on_host:
            return Term("parameters from the host", 0.0, "0", "0", "they are on the GPU")
        weights = parameters(setup.shape)
        moved = self.sequences / setup.micro_batch_size * 3 * 2 * weights / setup.parallel.world_size / setup.gpu.pcie_bandwidth
        slower = weights / setup.parallel.world_size / self.calibration.adam_cpu if setup.optimizer == "adam_cpu" else 0.0
        return Term(
            "parameters from the host",
            moved + slower,
            "m 6 P / N / pcie + P / N / a",
            f"{moved:.3g} + {slower:.3g}",
            "one GPU has a share of the host's threads",
        )

    def fixed(self) -> Term:
        return Term(
            "fixed",
            self.calibration.fixed_seconds,
            "constant",
            f"{self.calibration.fixed_seconds} s",
            "launches, clipping, logging",
        )


def _times(term: Term, sequences: float) -> Term:
    return Term(
        term.name,
        term.value * sequences,
        f"m ({term.formula})" if term.formula != "0" else "0",
        f"{sequences:g} x ({term.numbers})",
        term.note,
    )
