"""Small tokenizers of each kind, trained on the spot, and texts that break tokenizers."""

import base64
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tests.data.conftest import CONTROL, LLAMA3_SPLIT, make_tokenizer, words

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama3": LLAMA3_SPLIT, "gpt2": None, "qwen2": QWEN2_SPLIT}
KINDS = [*SPLITS, "llama2"]

_PARTS = [
    *CONTROL,
    *["</s>", "<unk>", "<0x0A>", "<tool>", "a<tool>", "\u2581", "the", "whale", "ship", "The", "x1", "42", "1234567", "don't"],
    *["I'LL", "'s", "'", " ", "  ", "     ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\xa0", "\u3000", "\u2028", "\u200b", "\x00"],
    *["\u00e9", "e\u0301", "\u0301", "\u0130", "\ufb01", "\u6d77", "\u9be8", "\u3002", "\u0634", "\u0928\u093f", "\U0001f40b"],
    *[
        "\U0001f468\u200d\U0001f469",
        "\ufffd",
        "\ufeff",
        "\U0010ffff",
        "_",
        "--",
        "...",
        "(x)->",
        "\u00bd",
        "\u0663",
        "zz" * 20,
        "xyzq",
        "qzqz",
        " qzqz",
    ],
]
nasty_texts = st.lists(st.one_of(st.sampled_from(_PARTS), st.text(max_size=3)), max_size=60).map("".join)
long_texts = st.lists(
    st.sampled_from([*_PARTS, "the sea ", "a storm, ", "night.\n", "if (a) {\n"]), min_size=150, max_size=500
).map("".join)


def make_kind(folder: Path, kind: str) -> Path:
    """A tokenizer.json as one of KINDS has it."""
    if kind == "llama2":
        return make_llama2(folder)
    make_tokenizer(folder, split=SPLITS[kind])
    return edit(folder, normalizer={"type": "NFC"}) if kind == "qwen2" else folder


def edit(folder: Path, **fields: Any) -> Path:
    """Set fields of the tokenizer.json; `model` is merged with what is there."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    fields["model"] = spec["model"] | fields.get("model", {})
    path.write_text(json.dumps(spec | fields), encoding="utf-8")
    return folder


def add_token(folder: Path, text: str, **flags: Any) -> Path:
    """One more added token, not special, behind the others."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    index = 1 + max([*spec["model"]["vocab"].values(), *(row["id"] for row in spec["added_tokens"])])
    row = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"].append({"id": index, "content": text} | row | flags)
    path.write_text(json.dumps(spec), encoding="utf-8")
    return folder


def make_llama2(folder: Path) -> Path:
    """As Llama 2's tokenizer.json: a space before every text, no split rule, bytes for what is not in the vocabulary."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = HFTokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False, limit_alphabet=60
    )
    tokenizer.train_from_iterator([words(seed, 400) for seed in range(8)], trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return edit(folder, added_tokens=[row for row in spec["added_tokens"] if row["content"] not in byte_tokens])


def whole(folder: Path, text: str) -> list[int]:
    """The library's own encoding of the whole text as ordinary characters."""
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def make_ranks(path: Path, ranks: int = 128_000) -> Path:
    """A file of ranks as Llama 3's: real tokens first, then ones of bytes that no text has."""
    folder = make_tokenizer(path.parent / "for_ranks")
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    to_byte = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    merged = [bytes(to_byte[character] for character in "".join(pair)) for pair in spec["model"]["merges"]]
    # one that is made of two others in two ways, and a word that is made of no two others, as Llama 3's has
    special = [b"xy", b"yz", b"xyz", b"qzqz"]
    tokens = list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *merged, *special]))
    tokens += [b"\xff\xfe" + index.to_bytes(3, "big") for index in range(ranks - len(tokens))]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path
