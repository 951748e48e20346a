"""`LongContextRotary`: angles at explicit positions, in place of Megatron's table over the whole sequence.

Every rank is told the positions of its own tokens and makes angles for these alone. The attention factor of YaRN is not applied
here: it goes through the softmax scale, a^2 / sqrt(d), which is the same mathematics and which no fused kernel can lose.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mcore_longctx.errors import ConfigError
from mcore_longctx.layout import zigzag_positions
from mcore_longctx.model.packed import agreed_layout
from mcore_longctx.rope import RopeScaling
from mcore_longctx.rope.frequencies import ntk_base

__all__ = ["LongContextRotary", "PhaseDtype", "hf_inverse_frequencies"]

PhaseDtype = Literal["float32", "float64"]
_ROWS_AT_ONCE = 65_536


class LongContextRotary(torch.nn.Module):
    """Stands where GPTModel has `rotary_pos_emb`.

        phase_dtype   inverse frequencies            product             worst angle error below 128K / 1M / 4M
        float32       float32, as transformers does  float32             0.006 / 0.05 / 0.2 rad: bit-equal to transformers
        float64       float64                        float64, mod 2 pi   2.4e-7 rad at any length

    Positions come from `set_positions` (LongContextGPTModel does so at each forward). A stock GPTModel sets none: then they are the
    positions of this rank of the group `cp_group`, in the pack of documents that is given, else in zigzag over the sequence. For a pack
    of qkv_format "thd" Megatron slices a table itself, from position 0 to the longest document: on every rank, so prefer "sbhd".

    Args:
        scaling: the rope.
        cp_group: context-parallel group, for a stock GPTModel; None: not split.
        phase_dtype: see above.

    Raises:
        ConfigError: type `dynamic`, which has no fixed frequencies.
    """

    def __init__(self, scaling: RopeScaling, cp_group: Any = None, phase_dtype: PhaseDtype = "float32") -> None:
        super().__init__()
        scaling.check_trainable()
        self.scaling, self.cp_group, self.phase_dtype = scaling, cp_group, phase_dtype
        # A plain attribute: a registered buffer would follow the model to bf16, in which rope is unusable.
        self.inv_freq = (
            torch.from_numpy(scaling.frequencies()[0]) if phase_dtype == "float64" else hf_inverse_frequencies(scaling)
        )
        self.positions: Tensor | None = None
        self._pack_positions: Tensor | None = None

    def set_positions(self, position_ids: Tensor | None) -> None:
        """Positions [b, s/c] int64 of the tokens of the next forward; None: derive them from the length."""
        self.positions = position_ids

    def angles(self, position_ids: Tensor) -> Tensor:
        """Angles at `position_ids` [b, s], float32 [s, b, 1, d]: both halves of d hold the same d/2 angles (Llama's layout).

        Rows that are all alike give b = 1, which broadcasts.
        """
        if position_ids.size(0) > 1 and position_ids.stride(0) == 0:
            position_ids = position_ids[:1]
        self.inv_freq = self.inv_freq.to(position_ids.device)  # once: afterwards it is there
        half = self.inv_freq.size(0)
        angles = torch.empty((*position_ids.t().shape, 1, 2 * half), dtype=torch.float32, device=position_ids.device)
        # in pieces: float64 products of all positions would be twice as large as the result
        for rows, piece in zip(position_ids.t().split(_ROWS_AT_ONCE), angles.split(_ROWS_AT_ONCE), strict=True):
            phase = rows.unsqueeze(-1).to(self.inv_freq.dtype) * self.inv_freq  # [rows, b, d/2]
            if self.phase_dtype == "float64":
                phase = torch.remainder(phase, 2 * math.pi)
            piece[:, :, 0, :half] = phase
            piece[:, :, 0, half:] = phase
        return angles

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: Any,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> int:
        """Length of the whole sequence (of the table for a pack in "thd"), as GPTModel asks for it before `forward`."""
        if inference_context is not None:
            raise ConfigError("inference contexts are not supported by this rotary embedding")
        hidden = transformer.input_tensor if transformer.input_tensor is not None else transformer_input
        assert hidden is not None
        rows = hidden.size(0)
        if transformer_config.sequence_parallel:
            rows *= transformer_config.tensor_model_parallel_size
        if packed_seq_params is not None:
            layout = agreed_layout(packed_seq_params, rows, self.cp_group, hidden.device)
            if packed_seq_params.qkv_format == "thd":
                table = max(packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv or 0)
                # a table exactly as long as the pack would be read as positions that run through all documents
                return int(table) + (table == layout.rows * layout.cp_size)
            if self.positions is None:
                rank = 0 if self.cp_group is None else self.cp_group.rank()
                self._pack_positions = torch.from_numpy(layout.positions(rank)).unsqueeze(0)
        return int(rows * transformer_config.context_parallel_size)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles of this rank's tokens, float32 [s/c, b or 1, 1, d]; `max_seq_len` is the whole sequence.

        For a pack in "thd" (`packed_seq`): angles from position 0, float32 [max_seq_len, 1, 1, d].
        """
        if packed_seq:
            return self.angles(self._on_device(torch.arange(max_seq_len).unsqueeze(0)))
        positions, of_pack, self._pack_positions = self.positions, self._pack_positions, None
        if positions is not None:
            return self.angles(positions)
        if of_pack is None:
            size, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
            of_pack = torch.from_numpy(zigzag_positions(max_seq_len, size, rank)).unsqueeze(0)
        return self.angles(self._on_device(of_pack))

    @staticmethod
    def _on_device(positions: Tensor) -> Tensor:
        return positions.cuda() if torch.cuda.is_available() else positions


def hf_inverse_frequencies(scaling: RopeScaling) -> Tensor:
    """Inverse frequencies in float32, operation by operation as transformers computes them, float32 [d/2] on the CPU.

    `scaling.frequencies()` is the exact table; rounding it to float32 differs from this in the last bits of some entries, and at 1M
    positions such a bit is a visible angle. A rope that transformers cannot express (YaRN with its ramp in rotations) is computed as
    the `llama3` form that it equals.

    Source: transformers 4.57.6 and 5.x modeling_rope_utils (`_compute_*_parameters`) and LlamaRotaryEmbedding.
    """
    scaling.check_trainable()
    base, dim = scaling.rope_theta, scaling.head_dim
    if scaling.type == "ntk":
        # transformers has no such type: it is exported as this changed base
        base = ntk_base(dim, base, scaling.factor)
    pos_freqs = base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float) / dim)
    inv_freq = 1.0 / pos_freqs
    if scaling.type in ("bands", "longrope"):
        return 1.0 / (torch.tensor(scaling.divisors(), dtype=torch.float32) * pos_freqs)
    if scaling.type == "linear":
        return inv_freq / scaling.factor
    if scaling.type == "llama3":
        return _hf_llama3(inv_freq, scaling, scaling.low_freq_factor, scaling.high_freq_factor)
    if scaling.type == "yarn" and scaling.ramp == "rotations":
        return _hf_llama3(inv_freq, scaling, scaling.alpha, scaling.beta)
    if scaling.type == "yarn":
        return _hf_yarn(pos_freqs, scaling)
    return inv_freq


def _hf_llama3(inv_freq: Tensor, scaling: RopeScaling, low_freq_factor: float, high_freq_factor: float) -> Tensor:
    factor, original = scaling.factor, scaling.original_length
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low_freq_factor, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    is_medium = ~(wavelength < original / high_freq_factor) * ~(wavelength > original / low_freq_factor)
    return torch.where(is_medium, smoothed, scaled)


def _hf_yarn(pos_freqs: Tensor, scaling: RopeScaling) -> Tensor:
    dim, factor = scaling.head_dim, scaling.factor

    def pair_index(rotations: float) -> float:
        return (dim * math.log(scaling.original_length / (rotations * 2 * math.pi))) / (2 * math.log(scaling.rope_theta))

    low, high = pair_index(scaling.beta_fast), pair_index(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    return (1.0 / (factor * pos_freqs)) * (1 - keep) + (1.0 / pos_freqs) * keep
