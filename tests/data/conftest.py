"""A tokenizer with control tokens and a chat template, made on the spot, and writers of small corpora."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mcore_longctx.data.files.shards import DocumentTable, ShardWriter, read_table

VOCABULARY = 350
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
# the split rule of Llama 3's tokenizer.json
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# as in Llama 3: content is trimmed, the answer ends in <|eot_id|>
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
WORDS = [
    "the",
    "of",
    "whale",
    "ship",
    "sea",
    "and",
    "mast",
    "sail",
    "harpoon",
    "a",
    "in",
    "to",
    "night",
    "captain",
    "storm",
    "deck",
    "über",
    "naïve",
    "海",
    "鯨",
    "x1",
    "42",
    "def",
    "return",
]


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n", "  ", "\t"]) for _ in range(count))


def make_tokenizer(folder: Path, split: str | None = LLAMA3_SPLIT, template: str | None = LLAMA3_TEMPLATE) -> Path:
    """A byte-level BPE of VOCABULARY entries in `folder`, as a model folder has it. split None: the rule of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([words(seed, 400) for seed in range(8)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL[0],
        "eos_token": {
            "__type": "AddedToken",
            "content": "<|eot_id|>",
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
            "normalized": False,
        },
        "pad_token": "<|pad|>",
        "model_max_length": 131072,
        **({"chat_template": template} if template else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """jsonl(name, records): a JSONL file in the test's folder."""

    def write(name: str, records: list) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return path

    return write


def make_table(
    folder: Path, documents: list[tuple[int, str, list[tuple[int, bool]]]], sources: int = 1, shards_a_source: int = 1
) -> DocumentTable:
    """Table of made-up documents: (source, id, [(length of a segment, loss), ...]). Every token is another one."""
    count, shard_source = 0, []
    for source in range(sources):
        mine = [(name, segments) for index, name, segments in documents if index == source]
        for part in range(shards_a_source):
            with ShardWriter(folder, len(shard_source), np.dtype("<i4"), f"source{source}") as shard:
                for name, segments in mine[part::shards_a_source]:
                    made = []
                    for length, loss in segments:
                        made.append((np.arange(count, count + length, dtype=np.int32), loss))
                        count += length
                    shard.add(name, made)
                shard.publish({})
            shard_source.append(source)
    return read_table(folder, [f"source{index}" for index in range(sources)], shard_source)
