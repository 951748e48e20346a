"""Which rows of which Hugging Face tensors make up each Megatron tensor.

    Megatron (layer i)              Hugging Face `model.layers.i.`
    linear_qkv.layer_norm_weight    input_layernorm.weight
    linear_qkv.weight               self_attn.{q,k,v}_proj.weight, by query group: the group's queries, its key, its value
    linear_proj.weight              self_attn.o_proj.weight
    linear_fc1.layer_norm_weight    post_attention_layernorm.weight
    linear_fc1.weight               mlp.gate_proj.weight, then mlp.up_proj.weight
    linear_fc2.weight               mlp.down_proj.weight

No rotary permutation: Megatron's `rotary_interleaved=False` turns the same pairs as Hugging Face. Keys are those of
`GPTModel.sharded_state_dict()` of megatron-core 0.16.1 and 0.19.2, the same for local and TransformerEngine specs.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_longctx.errors import ConversionError
from mcore_longctx.recipe import ModelShape

__all__ = ["MappedTensor", "RowBlock", "extra_state_keys", "hf_shapes", "llama_tensors"]

LAYERS = "decoder.layers."
MAX_GROUPS = 100_000  # over all layers; Llama-3.1-405B has 1,008


@dataclass(frozen=True)
class RowBlock:
    """`rows` rows of `hf_name` from `hf_row` on are the Megatron tensor's rows from `row` on."""

    hf_name: str
    hf_row: int
    row: int
    rows: int


@dataclass(frozen=True)
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
    """

    key: str
    layer: int | None
    rows: int
    columns: int | None
    blocks: tuple[RowBlock, ...]
    parts: int = 1
    is_vocabulary: bool = False

    @property
    def layer_key(self) -> str:
        """Name where layers are not stacked: `decoder.layers.3.mlp...`."""
        return self.key if self.layer is None else self.key.replace(LAYERS, f"{LAYERS}{self.layer}.", 1)


def llama_tensors(shape: ModelShape) -> list[MappedTensor]:
    """Every weight of a Llama, in the order of the layers.

    Raises:
        ConversionError: sizes that no model has, so that a damaged config.json costs neither time nor memory.
    """
    if shape.num_layers * shape.num_query_groups > MAX_GROUPS:
        raise ConversionError(
            f"{shape.num_layers:,} layers of {shape.num_query_groups:,} key/value heads: no model is that large"
        )
    hidden, ffn, vocab = shape.hidden_size, shape.ffn_hidden_size, shape.vocab_size
    tensors = [_whole("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, hidden, is_vocabulary=True)]
    for layer in range(shape.num_layers):
        megatron, hf = LAYERS, f"model.layers.{layer}."
        tensors += [
            _whole(f"{megatron}self_attention.linear_qkv.layer_norm_weight", f"{hf}input_layernorm.weight", hidden, None, layer),
            _qkv(shape, layer),
            _whole(
                f"{megatron}self_attention.linear_proj.weight",
                f"{hf}self_attn.o_proj.weight",
                hidden,
                shape.num_attention_heads * shape.kv_channels,
                layer,
            ),
            _whole(f"{megatron}mlp.linear_fc1.layer_norm_weight", f"{hf}post_attention_layernorm.weight", hidden, None, layer),
            MappedTensor(
                f"{megatron}mlp.linear_fc1.weight",
                layer,
                2 * ffn,
                hidden,
                (RowBlock(f"{hf}mlp.gate_proj.weight", 0, 0, ffn), RowBlock(f"{hf}mlp.up_proj.weight", 0, ffn, ffn)),
                parts=2,
            ),
            _whole(f"{megatron}mlp.linear_fc2.weight", f"{hf}mlp.down_proj.weight", hidden, ffn, layer),
        ]
    tensors.append(_whole("decoder.final_layernorm.weight", "model.norm.weight", hidden, None))
    if not shape.tie_word_embeddings:
        tensors.append(_whole("output_layer.weight", "lm_head.weight", vocab, hidden, is_vocabulary=True))
    return tensors


def _whole(
    key: str, hf_name: str, rows: int, columns: int | None, layer: int | None = None, *, is_vocabulary: bool = False
) -> MappedTensor:
    return MappedTensor(key, layer, rows, columns, (RowBlock(hf_name, 0, 0, rows),), is_vocabulary=is_vocabulary)


def _qkv(shape: ModelShape, layer: int) -> MappedTensor:
    head, groups = shape.kv_channels, shape.num_query_groups
    queries = shape.num_attention_heads // groups * head  # rows of one group's queries
    group_rows = queries + 2 * head
    hf = f"model.layers.{layer}.self_attn."
    blocks: list[RowBlock] = []
    for group in range(groups):
        first = group * group_rows
        blocks += [
            RowBlock(f"{hf}q_proj.weight", group * queries, first, queries),
            RowBlock(f"{hf}k_proj.weight", group * head, first + queries, head),
            RowBlock(f"{hf}v_proj.weight", group * head, first + queries + head, head),
        ]
    key = f"{LAYERS}self_attention.linear_qkv.weight"
    return MappedTensor(key, layer, groups * group_rows, shape.hidden_size, tuple(blocks))


def hf_shapes(tensors: list[MappedTensor]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, as the blocks of these tensors imply it."""
    rows: dict[str, int] = {}
    columns: dict[str, int | None] = {}
    for tensor in tensors:
        for block in tensor.blocks:
            rows[block.hf_name] = max(rows.get(block.hf_name, 0), block.hf_row + block.rows)
            columns[block.hf_name] = tensor.columns
    return {name: (count,) if (width := columns[name]) is None else (count, width) for name, count in rows.items()}


def extra_state_keys(num_layers: int) -> list[str]:
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
    keys = [f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}" for module in modules for layer in range(num_layers)]
    return [*keys, *(f"{module}._extra_state/shard_0_1" for module in ("decoder.final_layernorm", "output_layer"))]
