"""Texts and tokenizers of the task tests."""

import random

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders

LINES = [
    f"And line {'abcdefghij'[i % 10] * (3 + i * 7 % 50)} of the text has its own words, the {'xyz'[i % 3]}." for i in range(400)
]
TEXT = "\n".join(LINES) + "\n"

_WORDS = [
    "the",
    "old",
    "mill",
    "stood",
    "by",
    "a",
    "river",
    "and",
    "nobody",
    "knew",
    "who",
    "had",
    "built",
    "it",
    "when",
    "snow",
    "fell",
    "they",
    "said",
    "he",
    "came",
    "back",
    "to",
    "look",
]


def make_prose(seed, sentences):
    """Paragraphs of several sentences, with numbers, abbreviations and other marks at the ends of sentences."""
    rng = random.Random(seed)
    parts = []
    for _ in range(sentences):
        said = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(3, 14))).capitalize()
        said += rng.choice(["", "", "", f" {rng.randint(1, 2000)}", " at St. Ives", ', "yes"', " (no)"])
        parts += [said, rng.choice([".", ".", ".", ".", "!", "?", "...", '."'])]
        parts.append(rng.choice([" ", " ", " ", " ", "  ", "\n", "\n\n"]))
    return "".join(parts)


PROSE = make_prose(7, 1500)


class Bytes:
    """The byte vocabulary of the tiny model."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()


class Merges:
    """A real byte-level BPE of 600 entries that groups digits by three, as Llama 3's does."""

    def __init__(self):
        self.tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(r"\d{1,3}| ?[a-zA-Z]+| ?[^\sa-zA-Z\d]+\n*|\s+"), "isolated")
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self.tokenizer.decoder = token_decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
        self.tokenizer.train_from_iterator([TEXT, "The pass key for dolu is 0123456789.\n"], trainer)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


class Llama3(Merges):
    """Llama 3's own split rule: a space goes with the letters behind it, newlines with the marks before them."""

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

    def __init__(self):
        self.tokenizer = Tokenizer(models.BPE())
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.split), "isolated"), bytes_])
        self.tokenizer.decoder = token_decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False)
        self.tokenizer.train_from_iterator([PROSE, TEXT, "The secret number of dolu-zeka is 4829137.\n" * 9], trainer)


class Llama2(Merges):
    """As Llama 2's: a space before every text, no split rule, bytes for newlines."""

    def __init__(self):
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        self.tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<unk>", *byte_tokens]
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False, limit_alphabet=90)
        self.tokenizer.train_from_iterator([PROSE.replace("\n", " "), "0123456789 ABCXYZ-, Set. Which?"], trainer)
        self.tokenizer.pre_tokenizer = None
        self.tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        self.tokenizer.decoder = token_decoders.Sequence(
            [
                token_decoders.Replace("\u2581", " "),
                token_decoders.ByteFallback(),
                token_decoders.Fuse(),
                token_decoders.Strip(" ", 1, 0),
            ]
        )


TOKENIZERS = {"bytes": Bytes(), "merges": Merges(), "llama3": Llama3(), "llama2": Llama2()}


def farthest(haystack, tokens, *, lines_only):
    """How far from its depth a sentence may stand in a text of that many tokens: half the widest gap between borders, or what is
    called near (64 tokens or 1 %), where a sentence's start goes before a line's.
    """
    if lines_only:
        return np.diff(haystack.line_starts, prepend=0).max() / 2 + 1
    borders = np.union1d(haystack.line_starts, haystack.sentence_starts)
    return max(np.diff(borders, prepend=0).max() / 2 + 1, 64, 0.01 * tokens)
