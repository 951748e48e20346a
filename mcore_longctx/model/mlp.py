"""Megatron's MLP with a forward over tiles of tokens, and one that can be left out when a layer is recomputed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from mcore_longctx.errors import ConfigError
from mcore_longctx.model.weight_hooks import run_forward_pre_hooks
from mcore_longctx.parallel.tiled_mlp import tiled_swiglu

__all__ = ["TiledMLP", "tiled_mlp_spec"]

# what is computed, and nothing else: (field of the config, its value)
_COMPUTED: tuple[tuple[str, Any], ...] = (
    ("gated_linear_unit", True),
    ("activation_func", F.silu),
    ("use_te_activation_func", False),
    ("activation_func_clamp_value", None),
    ("activation_func_fp8_input_store", False),
    ("glu_linear_offset", 0.0),
    ("fp8", None),
    ("fp4", None),
)


def tiled_mlp_spec(tile: int | None = None) -> ModuleSpec:
    """`TiledMLP` of Megatron's own linear layers, for `TransformerLayerSubmodules.mlp` of every supported version."""
    return ModuleSpec(
        module=TiledMLP,
        params={"tile": tile},
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )


class TiledMLP(MLP):
    """SwiGLU feed-forward in place of Megatron's MLP: the same weights under the same names, computed by `tiled_swiglu`.

    With `tile=None` and outside `skipping_forward` it is Megatron's MLP: the fastest, and the one that keeps 3 f/t numbers of a token
    for its backward. With a tile it keeps its input only, and makes gate and up again in backward.

    Args:
        config: a TransformerConfig.
        submodules: `linear_fc1` a ColumnParallelLinear, `linear_fc2` a RowParallelLinear.
        tile: tokens of one GEMM, those of all ranks under sequence parallelism counted; None: all.
        tp_group: the tensor-parallel group; None: that of `pg_collection`, else Megatron's own.
        ffn_hidden_size: f; None: the config's.

    Raises:
        ConfigError: anything that is not computed: another activation or none that is gated, experts, fp8, other linear layers,
            a tile below 1.
    """

    def __init__(
        self,
        config: Any,
        submodules: MLPSubmodules,
        tile: int | None = None,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: Any = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,  # of no meaning here, as in Megatron's MLP
        **name: Any,  # megatron-core 0.19 names its modules
    ) -> None:
        for field, computed in _COMPUTED:
            if getattr(config, field, computed) != computed:
                found = getattr(config, field)
                raise ConfigError(
                    f"{field} is {getattr(found, '__name__', found)!r}; the tiled MLP computes SwiGLU in the dtype of its weights only",
                    fix="use Megatron's MLP",
                )
        if is_expert:
            raise ConfigError("the tiled MLP does not compute experts", fix="use Megatron's MLP")
        if tile is not None and tile < 1:
            raise ConfigError(f"tile of the MLP is {tile}, expected at least one token")
        if tp_group is None and pg_collection is not None:
            tp_group = pg_collection.tp
        ffn_hidden_size = config.ffn_hidden_size if ffn_hidden_size is None else ffn_hidden_size
        super().__init__(config, submodules, input_size=input_size, ffn_hidden_size=ffn_hidden_size, tp_group=tp_group, **name)
        for linear, wanted in ((self.linear_fc1, ColumnParallelLinear), (self.linear_fc2, RowParallelLinear)):
            if not isinstance(linear, wanted):
                raise ConfigError(
                    f"the tiled MLP needs Megatron's {wanted.__name__}, not {type(linear).__name__}", fix="use Megatron's MLP"
                )
        self.tile = tile
        self._skips = False

    @contextlib.contextmanager
    def skipping_forward(self) -> Iterator[None]:
        """Inside, `forward` returns zeros that take no memory, and backward is as ever.

        For the second run of a recomputed layer: its result is thrown away, and the product with the down projection need not be
        made again.
        """
        before, self._skips = self._skips, True
        try:
            yield
        finally:
            self._skips = before

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, h] -> [s, b, h] and the down projection's bias [h] or None, which the layer adds, as with Megatron's MLP.

        s is divided by the tensor-parallel size under sequence parallelism.

        Raises:
            ConfigError: `per_token_scale` (of experts) is given.
        """
        if per_token_scale is not None:
            raise ConfigError("per_token_scale is given, which the tiled MLP does not compute", fix="use Megatron's MLP")
        if self.tile is None and not self._skips:
            out, bias = super().forward(hidden_states)
            return out, bias
        run_forward_pre_hooks(self.linear_fc1, hidden_states)
        run_forward_pre_hooks(self.linear_fc2, hidden_states)
        out = tiled_swiglu(
            hidden_states,
            self.linear_fc1.weight,
            self.linear_fc2.weight,
            self.linear_fc1.bias,
            group=self.linear_fc1.tp_group,
            sequence_parallel=self.linear_fc1.sequence_parallel,
            tile=self.tile,
            skip_forward=self._skips,
        )
        return out, self.linear_fc2.bias
