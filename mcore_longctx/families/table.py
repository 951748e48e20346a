"""Which rows of which Hugging Face tensors make up each Megatron tensor: a family is a table of `Line`s.

No rotary permutation: Megatron's `rotary_interleaved=False` turns the same pairs as Hugging Face. Keys are those of
`GPTModel.sharded_state_dict()` of megatron-core 0.16.1 and 0.19.2, the same for local and TransformerEngine specs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mcore_longctx.errors import ConversionError
from mcore_longctx.families.shape import ModelShape

__all__ = ["Line", "MappedTensor", "RowBlock", "expand", "extra_state_keys", "hf_shapes"]

LAYERS = "decoder.layers."
MAX_GROUPS = 100_000  # over all layers; Llama-3.1-405B has 1,008

Size: TypeAlias = Literal["vocab", "hidden", "ffn", "queries", "keys", "head"]
Flag: TypeAlias = Literal["always", "untied", "qkv_bias", "linear_bias", "qk_layernorm"]


@dataclass(frozen=True)
class Line:
    """One line of a family's table.

    Attributes:
        key: Megatron's name; one that begins with `decoder.layers.` stands for every layer.
        names: the Hugging Face tensors it is made of, `{i}` is the layer. One: it is that tensor. Two: gate, then up. Three: queries,
            keys and values, by query group: the group's queries, its key, its value.
        rows: of each of `names`, in their order.
        columns: None for a vector.
        tp: what tensor parallelism splits: 0 rows (gate and up each by itself), 1 columns, None nothing.
        when: which models have it.
    """

    key: str
    names: tuple[str, ...]
    rows: tuple[Size, ...]
    columns: Size | None
    tp: Literal[0, 1] | None = None
    when: Flag = "always"


@dataclass(frozen=True, slots=True)
class RowBlock:
    """`rows` rows of `hf_name` from `hf_row` on are the Megatron tensor's rows from `row` on."""

    hf_name: str
    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One layer of one Megatron tensor, or one that has no layers (`layer` is None).

    Attributes:
        key: name in the checkpoint, layers stacked on a leading axis.
        layer: index on that axis.
        rows: rows without vocabulary padding.
        columns: None for a vector.
        blocks: where the rows come from; together they are all rows, in order.
        parts: chunks of equal rows that Megatron saves it in at TP 1 (gate and up are two).
        is_vocabulary: rows are padded at the end.
        tp: what tensor parallelism splits: 0 rows of each part, 1 columns, None nothing.
    """

    key: str
    layer: int | None
    rows: int
    columns: int | None
    blocks: tuple[RowBlock, ...]
    parts: int = 1
    is_vocabulary: bool = False
    tp: Literal[0, 1] | None = None

    @property
    def layer_key(self) -> str:
        """Name where layers are not stacked: `decoder.layers.3.mlp...`."""
        return self.key if self.layer is None else self.key.replace(LAYERS, f"{LAYERS}{self.layer}.", 1)


def expand(table: Iterable[Line], shape: ModelShape) -> list[MappedTensor]:
    """Every weight of a model of these sizes: first those before the layers in the table, the layers in order, those after.

    Raises:
        ConversionError: sizes that no model has, so that a damaged config.json costs neither time nor memory.
    """
    if shape.num_layers * shape.num_query_groups > MAX_GROUPS:
        raise ConversionError(
            f"{shape.num_layers:,} layers of {shape.num_query_groups:,} key/value heads: no model is that large"
        )
    lines = [line for line in table if _applies(line.when, shape)]
    of_layers = [line for line in lines if line.key.startswith(LAYERS)]
    split = lines.index(of_layers[0])
    before, after = lines[:split], [line for line in lines[split:] if not line.key.startswith(LAYERS)]
    layers = [_mapped(line, shape, layer) for layer in range(shape.num_layers) for line in of_layers]
    return [*(_mapped(line, shape, None) for line in before), *layers, *(_mapped(line, shape, None) for line in after)]


def _applies(when: Flag, shape: ModelShape) -> bool:
    return {
        "always": True,
        "untied": not shape.tie_word_embeddings,
        "qkv_bias": shape.add_qkv_bias or shape.add_bias_linear,
        "linear_bias": shape.add_bias_linear,
        "qk_layernorm": shape.qk_layernorm,
    }[when]


def _mapped(line: Line, shape: ModelShape, layer: int | None) -> MappedTensor:
    sizes: dict[str, int] = {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "queries": shape.num_attention_heads * shape.kv_channels,
        "keys": shape.num_query_groups * shape.kv_channels,
        "head": shape.kv_channels,
    }
    rows = [sizes[name] for name in line.rows]
    names = [name.replace("{i}", str(layer)) for name in line.names]
    # queries, keys and values take turns group by group; anything else stands one after the other
    turns = shape.num_query_groups if len(names) == 3 else 1
    blocks: list[RowBlock] = []
    row = 0
    for turn in range(turns):
        for name, count in zip(names, rows, strict=True):
            blocks.append(RowBlock(name, turn * (count // turns), row, count // turns))
            row += count // turns
    columns = None if line.columns is None else sizes[line.columns]
    parts = 2 if len(names) == 2 else 1
    return MappedTensor(line.key, layer, row, columns, tuple(blocks), parts, line.rows == ("vocab",), line.tp)


def hf_shapes(tensors: Iterable[MappedTensor]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, as the blocks of these tensors imply it."""
    rows: dict[str, int] = {}
    columns: dict[str, int | None] = {}
    for tensor in tensors:
        for block in tensor.blocks:
            rows[block.hf_name] = max(rows.get(block.hf_name, 0), block.hf_row + block.rows)
            columns[block.hf_name] = tensor.columns
    return {name: (count,) if (width := columns[name]) is None else (count, width) for name, count in rows.items()}


def extra_state_keys(num_layers: int, *, stacked: bool = True) -> list[str]:
    """The `_extra_state` objects that a local or a TransformerEngine spec may ask for.

    A key that is missing in the file is fatal, a surplus one is ignored; the value `[None]` means no state (for
    TransformerEngine: `module/base.py:set_extra_state` returns at once).
    """
    modules = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "self_attention.core_attention",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
        "input_layernorm",
        "pre_mlp_layernorm",
    )
    keys = [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        if stacked
        else f"{LAYERS}{layer}.{module}._extra_state/shard_0_1"
        for module in modules
        for layer in range(num_layers)
    ]
    return [*keys, *(f"{module}._extra_state/shard_0_1" for module in ("decoder.final_layernorm", "output_layer"))]
