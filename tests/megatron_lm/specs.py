"""Layer specs as a user writes them for --spec."""

from typing import Any

from mcore_longctx.model import longctx_layer_spec

NOTHING = 3


def layer_function(config: Any) -> Any:
    """A layer of ours, changed or not; Megatron-LM calls it with its GPTModelConfig."""
    return longctx_layer_spec()
