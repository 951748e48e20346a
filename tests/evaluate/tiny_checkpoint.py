"""A small random Llama as Hugging Face folder and as torch_dist checkpoint, with a byte tokenizer and held-out text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mcore_longctx.convert import Execution, import_hf
from mcore_longctx.families import ModelShape
from mcore_longctx.recipe.schema import EvaluateSection, LossByPositionSection, NeedleSection, Parallel, TokenCount
from mcore_longctx.rope import RopeScaling, write_hf_rope

BOS = 256
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=64,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=258,  # padded to 384: 126 columns that stand for no token
)
OWN = RopeScaling(type="none", head_dim=8, rope_theta=10_000.0, max_position_embeddings=128)
SCALED = RopeScaling(type="llama3", head_dim=8, rope_theta=10_000.0, factor=8, original_max_position_embeddings=128)


def hf_model(rope: RopeScaling) -> Any:
    """LlamaForCausalLM in float32. Every real logit is negative, so that a padded column, left in, would win."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        **write_hf_rope(rope if rope.max_position_embeddings else replace(rope, max_position_embeddings=1024)),
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_query_groups,
        head_dim=SHAPE.kv_channels,
        rms_norm_eps=SHAPE.layernorm_epsilon,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=257,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).float().eval()


def write_tokenizer(folder: Path) -> None:
    """Bytes are their own ids; a text begins with <s>, as Llama's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(shifted)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))


def held_out_text(lines: int = 150) -> str:
    rng = random.Random(5)
    words = ["".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 8))) for _ in range(200)]
    return "".join(" ".join(rng.choices(words, k=rng.randint(4, 12))) + ".\n" for _ in range(lines))


def make(folder: Path) -> Path:
    """FOLDER/hf, FOLDER/base (torch_dist) and FOLDER/held-out.txt."""
    hf = folder / "hf"
    hf_model(OWN).save_pretrained(hf, safe_serialization=True)
    write_tokenizer(hf)
    import_hf(hf, folder / "base", how=Execution(checksum=True))
    (folder / "held-out.txt").write_text(held_out_text(), encoding="utf-8")
    return folder


def section(folder: Path, parallel: Parallel, **changes: Any) -> EvaluateSection:
    """Two lengths, three depths, two samples; four long and six short windows."""
    text = folder / "held-out.txt"
    needle = NeedleSection(haystack=text, lengths=(TokenCount(128), TokenCount(256)), depths=3, samples=2, digits=4)
    loss = LossByPositionSection(path=text, seq_length=TokenCount(256), short_length=TokenCount(128), windows=4, short_windows=6)
    return EvaluateSection(**({"needle": needle, "loss_by_position": loss, "parallel": parallel, "precision": "fp32"} | changes))
