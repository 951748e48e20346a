"""Texts on which two tokenizers must agree, and Hugging Face's tokenizer made small enough to be asked at every start.

The whole tokenizer of Llama 3 takes 0.5 CPU-s to load, the small one 0.1 with the asking: therefore the check is never skipped
and its outcome is not kept anywhere.
"""

from __future__ import annotations

import random
from typing import Any

import msgspec

__all__ = ["check_texts", "small_reference"]

_LONGEST = 24  # characters of the tokens that are found by a table of all substrings


def check_texts(control: dict[str, tuple[int, bool]]) -> list[str]:
    """The texts on which gigatoken must agree: about 5,000 characters, always the same for the same added tokens."""
    named = [text for text, (_, special) in control.items() if special]
    named = [*named[:8], *named[-2:], *[text for text, (_, special) in control.items() if not special][:40]]
    rng = random.Random(0)
    parts = [*_NASTY, *_ALPHABET]
    return [
        "",
        *_NASTY,
        *(f"a{text}b {text} {text}\n{text}1" for text in named),
        *("".join(rng.choice(parts)[:40] for _ in range(25)) for _ in range(12)),
    ]


_NASTY = [
    "Hello world, it's Bob's book; we'RE, they'd, I'LL, 'tis, don\u2019t",
    "a  b   c \t d\t\te \n f\n\n\ng \r\n\r\n h\r i \x0b\x0c j   ",
    "   leading and trailing   ",
    "\n",
    " ",
    "1 12 123 1234 12345678901 3.14159 1,000,000 0x1F \u0663\u0664\u0665 \u00bd\u00b2 \u2167",
    "for(i=0;i<10;++i){x[i]->y::z(\"a\\\\n\", 'b');} // --- === *** $#@!%^&*()_+",
    'http://example.org/a_b?c=d&e=%20f#g <html><b>&amp;</b> {"k": [null, -1e-5]}\n',
    "\u00fcber na\u00efve \u00c5ngstr\u00f6m \u0130stanbul \u01c5 \ufb01n \u0152uvre STRASSE \u1e9e",
    "e\u0301\u0301 a\u030a n\u0303o \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u6d77\u306f\u5e83\u3044\u3001\u30ab\u30bf\u30ab\u30ca\u3002\u4f60\u597d\uff0c\u4e16\u754c\uff01 \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0639\u0631\u0628\u064a \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f40b\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001d54f\U00020000\U0010ffff \ufffd\ufeff\ue000",
    "nul\x00\x00 \x01\x1b\x7f\x85\xa0\xad \u2003\u3000\u2028\u2029 \u200b\u202e",
    "\u2581under \u2581\u2581 <0x0A> <s></s> <unk> [INST] <|im_start|>",
    "a" * 300,
    " " * 200 + "x",
    "\n" * 100 + "x",
    "-" * 150,
    "7" * 100,
    "\u6d77" * 60,
]
_ALPHABET = [
    "a",
    "B",
    "the",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'",
    "'s",
    "'LL",
    "9",
    "42",
    ".",
    "_",
    "\u00e9",
    "\u0301",
    "\u6d77",
    "\U0001f40b",
    "\x00",
    "\xa0",
]


def small_reference(spec: dict[str, Any], texts: list[str]) -> Any:
    """Hugging Face's tokenizer with only those tokens and merges that can occur in `texts`: loads in milliseconds, same ids."""
    from tokenizers import Tokenizer

    model = spec["model"]
    bare = spec | {"model": model | {"vocab": {}, "merges": []}, "added_tokens": [], "post_processor": None}
    bare["model"]["unk_token"] = None
    empty = Tokenizer.from_buffer(msgspec.json.encode(bare))
    words: set[str] = set()
    for text in texts:
        for part in _apart(text, [row["content"] for row in spec["added_tokens"] if not row["special"]]):
            normal = empty.normalizer.normalize_str(part) if empty.normalizer else part
            words.update(word for word, _ in empty.pre_tokenizer.pre_tokenize_str(normal)) if empty.pre_tokenizer else words.add(
                normal
            )
    vocabulary = model["vocab"]
    joined = "\n".join(sorted(words))
    short = {word[i : i + size] for word in words for i in range(len(word)) for size in range(1, _LONGEST + 1)}
    kept = {text for text in vocabulary if text in short or (len(text) > _LONGEST and text in joined)}
    kept.update(text for text in vocabulary if len(text) == 6 and text.startswith("<0x"))
    kept.update(row["content"] for row in spec["added_tokens"] if row["content"] in vocabulary)
    if model.get("unk_token") in vocabulary:
        kept.add(model["unk_token"])
    halves = {(text[:i], text[i:]) for text in kept for i in range(1, len(text)) if text[:i] in kept and text[i:] in kept}
    wanted = halves | {" ".join(pair) for pair in halves}  # files have merges as pairs or, older ones, as text
    merges = [pair for pair in model["merges"] if (pair if isinstance(pair, str) else tuple(pair)) in wanted]
    added = [row for row in spec["added_tokens"] if row["content"] in vocabulary or not row["special"]]
    small = {text: vocabulary[text] for text in kept}
    small.update((row["content"], row["id"]) for row in added)
    small_spec = spec | {"model": model | {"vocab": small, "merges": merges}, "added_tokens": added, "post_processor": None}
    tokenizer = Tokenizer.from_buffer(msgspec.json.encode(small_spec))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _apart(text: str, added: list[str]) -> list[str]:
    """The text, and its parts between added tokens, which are normalized alone."""
    parts = [text]
    for token in added:
        parts = [piece for part in parts for piece in part.split(token)]
    return [text, *parts]
