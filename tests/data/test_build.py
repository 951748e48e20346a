"""Folders of packed samples: read by Megatron as intended, equal for any order of files, whole or not there at all."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from mcore_longctx.data import IndexedReader, PackedSamples, read_runs
from mcore_longctx.data.build import BuildReport, build_pretrain, build_sft
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.verify import verify_data
from mcore_longctx.errors import CheckpointError, ConfigError, DataError
from mcore_longctx.manifest import verify_manifest
from mcore_longctx.recipe.schema import DataSection, DocumentSource, LengthSampling, TokenCount
from tests.data.conftest import VOCABULARY, words

SEQ_LENGTH = 64


def section(*paths: Path, shares: tuple[float, ...] = (), **settings) -> DataSection:
    sources = tuple(
        DocumentSource(name=f"source{i}", path=path, share=shares[i] if shares else None) for i, path in enumerate(paths)
    )
    return DataSection(sources=sources, **settings)


@pytest.fixture
def corpus(tmp_path: Path, jsonl: Callable[..., Path]) -> list[Path]:
    """Two sources: 60 documents of 1 to 60 words, and 20 longer ones as files."""
    short = jsonl("short.jsonl", [{"id": f"s{i}", "text": words(i, 1 + i)} for i in range(60)])
    (tmp_path / "long").mkdir()
    for i in range(20):
        (tmp_path / "long" / f"{i:02d}.txt").write_text(words(100 + i, 100 + 10 * i))
    return [short, tmp_path / "long"]


def build(data: DataSection, tokenizer: Path, out: Path, **changes) -> BuildReport:
    arguments = {"model_vocab_size": 512, "seq_length": SEQ_LENGTH, "num_samples": None, "seed": 7} | changes
    return build_pretrain(data, "text", tokenizer=tokenizer, out=out, **arguments)


def samples_of(report: BuildReport) -> list[list[int]]:
    reader = IndexedReader(report.prefix)
    return [reader[i].tolist() for i in range(len(reader))]


def test_the_folder_holds_what_the_architecture_names(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=10)
    names = ["lengths.json", "lengths.png", "manifest.json", "text.bin", "text.idx", "text.runs.npz"]
    assert sorted(path.name for path in report.folder.iterdir()) == names
    assert (report.samples, report.samples_needed) == (11, 10)
    manifest = verify_manifest(report.folder, "data")
    assert (manifest["samples"], manifest["seq_length"], manifest["seed"], manifest["method"]) == (11, SEQ_LENGTH, 7, "pretrain")
    tokenizer = load_tokenizer(tokenizer_folder)
    assert manifest["separator"] == {"text": "<s>", "token_ids": tokenizer.encode("<s>").tolist()}
    assert manifest["tokenizer"] == {"sha256": tokenizer.sha256, "vocab_size": VOCABULARY}
    assert [file["name"] for file in manifest["inputs"]["source1"]["files"]] == [f"{i:02d}.txt" for i in range(20)]
    assert set(manifest["sources"]) == {"source0", "source1"}
    assert json.loads((report.folder / "lengths.json").read_text())["sources"] == manifest["sources"]
    documents = manifest["tokens"] - manifest["tokens_of_separators"]
    assert sum(source["tokens_after"] for source in manifest["sources"].values()) == documents
    for source in manifest["sources"].values():
        for total in ("documents_before", "tokens_before", "documents_after", "tokens_after"):
            assert sum(bucket[total] for bucket in source["buckets"]) == source[total]
    assert IndexedReader(report.prefix).dtype == np.uint16


def test_the_samples_are_the_documents_with_the_separator_between(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus, separator="\n<s>\n"), tokenizer_folder, tmp_path / "out")
    tokenizer = load_tokenizer(tokenizer_folder)
    separator = tokenizer.encode("\n<s>\n").tolist()
    at_once, apart = tokenizer.encode("x\n" + "\n<s>\n"), [*tokenizer.encode("x\n"), *separator]
    assert at_once.tolist() != apart  # text joined before encoding merges across the seam
    stream = np.concatenate(samples_of(report)).tolist()
    texts = {f"s{i}": words(i, 1 + i) for i in range(60)} | {f"{i:02d}.txt": words(100 + i, 100 + 10 * i) for i in range(20)}
    every = [run for sample in range(report.samples) for run in read_runs(report.prefix).sample(sample)]
    order = [run.document for run in every if run.document is not None and run.start == 0]
    expected: list[int] = []
    for name in order:
        expected += [*(separator if expected else []), *tokenizer.encode(texts[name]).tolist()]
    assert expected[: len(stream)] == stream
    assert len(set(order)) == len(order) >= 78


def test_a_separator_that_looks_like_a_control_token_is_ordinary_text(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus, separator="<|end_of_text|>"), tokenizer_folder, tmp_path / "out", num_samples=3)
    separator = read_runs(report.prefix).literals.tolist()
    tokenizer = load_tokenizer(tokenizer_folder)
    assert separator == tokenizer.encode("<|end_of_text|>").tolist()
    assert tokenizer.control_id("<|end_of_text|>") not in [*separator, *np.concatenate(samples_of(report)).tolist()]


# ------------------------------------------------------------------ Megatron reads them
def gpt_dataset(prefix: Path, cache: Path, *, extra: bool) -> GPTDataset:
    tokenizer = SimpleNamespace(eod=1, pad=-1, vocab_size=VOCABULARY, unique_identifiers={"class": "made-up"})
    config = GPTDatasetConfig(
        random_seed=3,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix)], None),
        split="100,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=extra,
        path_to_cache=str(cache),
    )
    data = IndexedDataset(str(prefix))
    return GPTDataset(data, str(prefix), np.arange(len(data), dtype=np.int32), None, Split.train, config)


def test_megatrons_gpt_dataset_reads_exactly_the_samples(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=12)
    ours = samples_of(report)
    assert len(ours) == 13
    stored = IndexedDataset(str(report.prefix))  # its arrays are views of a map that dies with it
    assert [stored.get(i).tolist() for i in range(13)] == ours

    without = gpt_dataset(report.prefix, tmp_path / "cache0", extra=False)
    rows = [without[i] for i in range(13)]
    assert len(without) == 13
    assert sorted(row["tokens"].tolist() for row in rows) == sorted(ours)
    for row in rows:
        assert row["labels"].tolist()[:-1] == row["tokens"].tolist()[1:]
        assert row["loss_mask"][-1] == 0

    stock = gpt_dataset(report.prefix, tmp_path / "cache1", extra=True)
    assert len(stock) == 12  # what the stage needs: this is why one sample more is written
    read = [stock[i]["tokens"].tolist() for i in range(12)]
    assert all(tokens in ours for tokens in read)
    assert len({tuple(tokens) for tokens in read}) == 12


# ------------------------------------------------------------------ determinism
def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".npz", ".json", ".png")}


def test_order_of_lines_and_split_into_files_change_nothing(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    records = [{"text": words(i, 5 + 3 * i)} for i in range(40)] + [{"text": "twice the same"}] * 3
    jsonl("a/one.jsonl", records)
    shuffled = [records[i] for i in np.random.default_rng(1).permutation(len(records))]
    for part in range(3):
        jsonl(f"b/z{3 - part}.jsonl", shuffled[part::3])
    how = LengthSampling(short_below=TokenCount(100), keep_probability=0.6, long_above=TokenCount(200), repetition=1.5)
    reports = [
        build(section(tmp_path / name, length_sampling=how), tokenizer_folder, tmp_path / f"out-{name}", num_samples=30)
        for name in "ab"
    ]
    one, other = (files_of(report.folder) for report in reports)
    for name in ("text.bin", "text.idx", "text.runs.npz", "lengths.json", "lengths.png"):
        assert one[name] == other[name], name
    again = build(section(tmp_path / "a", length_sampling=how), tokenizer_folder, tmp_path / "again", num_samples=30)
    assert files_of(again.folder) == one
    another = build(section(tmp_path / "a", length_sampling=how), tokenizer_folder, tmp_path / "another", num_samples=30, seed=8)
    assert files_of(another.folder)["text.bin"] != one["text.bin"]


# ------------------------------------------------------------------ settings
def test_segments_keep_their_loss_flags(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    question, answer = words(1, 30), words(2, 10)
    records = [{"segments": [{"text": question, "loss": False}, {"text": answer, "loss": True}]}] * 8
    report = build(section(jsonl("a.jsonl", records), separator=""), tokenizer_folder, tmp_path / "out")
    tokenizer, samples = load_tokenizer(tokenizer_folder), PackedSamples(report.prefix)
    asked, answered = len(tokenizer.encode(question)), len(tokenizer.encode(answer))
    pattern = np.tile(np.repeat([False, True], [asked, answered]), 8)
    found = np.concatenate([samples.runs.loss_flags(i, 0, SEQ_LENGTH) for i in range(len(samples))])
    assert found.tolist() == pattern[: len(found)].tolist()
    assert verify_manifest(report.folder, "data")["tokens_with_loss"] == int(found.sum())


def test_single_packing_takes_one_document_a_sample_and_counts_what_it_drops(
    corpus, tokenizer_folder: Path, tmp_path: Path
) -> None:
    report = build(section(*corpus, packing="single"), tokenizer_folder, tmp_path / "out")
    runs = read_runs(report.prefix)
    assert {len(runs.sample(i)) for i in range(len(runs))} == {1}
    tokenizer = load_tokenizer(tokenizer_folder)
    lengths = [len(tokenizer.encode(words(i, 1 + i))) for i in range(60)]
    lengths += [len(tokenizer.encode(words(100 + i, 100 + 10 * i))) for i in range(20)]
    assert report.samples == sum(length // SEQ_LENGTH for length in lengths)
    short = sum(length < SEQ_LENGTH for length in lengths)
    assert short > 5
    assert verify_manifest(report.folder, "data")["dropped_too_short"] == short
    assert f"dropped: {short} documents shorter than a sample" in str(report)


def test_shares_hold_in_the_samples(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus, shares=(1, 3)), tokenizer_folder, tmp_path / "out", num_samples=40)
    used = [int(source.used.sum()) for source in report.sources]
    total = report.samples * SEQ_LENGTH
    assert report.samples == 41
    assert abs(sum(used) / total - 1) < 0.15  # the rest is separators
    assert 0.2 < used[0] / sum(used) < 0.3


def test_too_few_documents_are_said_aloud(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=100_000)
    assert report.samples < 100_000
    assert f"{report.samples:,} samples of 64 tokens, FEWER than the 100,000 that the stage needs" in str(report)
    assert verify_manifest(report.folder, "data")["samples_needed"] == 100_000


def test_the_table_shows_what_length_sampling_did(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    how = LengthSampling(short_below=TokenCount(64), keep_probability=0.0, long_above=TokenCount(256), repetition=2.0)
    report = build(section(*corpus, length_sampling=how), tokenizer_folder, tmp_path / "out")
    lines = str(report).splitlines()
    assert lines[0] == f"text: {report.samples} samples of 64 tokens"
    assert lines[1].split() == [
        "source",
        "documents",
        "tokens",
        "read",
        "in",
        "samples",
        "below",
        "64",
        "between",
        "above",
        "256",
    ]
    assert "-> 0 %" in lines[2]
    assert len({len(line) for line in lines[1:4]}) == 1


# ------------------------------------------------------------------ chats
def conversation(seed: int, count: int) -> dict:
    messages = [{"role": "user", "content": words(seed, 5)}, {"role": "assistant", "content": words(seed + 1, count)}]
    return {"messages": messages}


def test_chats_are_packed_whole_with_padding_behind(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    path = jsonl("chats.jsonl", [conversation(i, 2 + i % 9) for i in range(30)] + [conversation(99, 300)])
    arguments = {"tokenizer": tokenizer_folder, "model_vocab_size": 512, "seq_length": 128, "seed": 1}
    report = build_sft(section(path), "chats", out=tmp_path / "out", **arguments)
    runs, samples, seen = read_runs(report.prefix), PackedSamples(report.prefix), []
    pad = load_tokenizer(tokenizer_folder).control_id("<|pad|>")
    for index in range(len(runs)):
        rows = runs.sample(index)
        names = [row.document for row in rows if row.document is not None]
        seen += sorted(set(names), key=names.index)
        assert not any(row.loss for row in rows if row.is_padding)
        assert all(not row.is_padding for row in rows[:-1])
        stored = samples.tokens(index)
        padding = rows[-1].length if rows[-1].is_padding else 0
        assert (stored[128 - padding :] == pad).all()
        assert pad not in stored[: 128 - padding]
    assert len(seen) == len(set(seen)) == 30
    assert verify_manifest(report.folder, "data")["dropped_too_long"] == 1
    assert "dropped: 1 conversation longer than 128 tokens" in str(report)
    verify_data(report.folder)
    again = build_sft(section(path), "chats", out=tmp_path / "again", **arguments)
    assert files_of(again.folder) == files_of(report.folder)


def test_settings_without_meaning_for_chats_are_refused(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    path = jsonl("chats.jsonl", [conversation(1, 5)])
    arguments = {"tokenizer": tokenizer_folder, "model_vocab_size": 512, "seq_length": 128, "seed": 1, "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match=r"data\.chats\.packing: has no meaning for chats"):
        build_sft(section(path, packing="single"), "chats", **arguments)
    with pytest.raises(ConfigError, match=r"data\.chats\.sources: share has no meaning for chats"):
        build_sft(section(path, shares=(1,)), "chats", **arguments)
    with pytest.raises(DataError, match="chats: no conversation of at most 16 tokens; add chats or raise seq_length"):
        build_sft(section(path), "chats", **(arguments | {"seq_length": 16}))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ bad input
def bad_document(path: Path) -> Path:
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    return path


def test_bad_input_leaves_no_folder(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    out, (short, _) = tmp_path / "runs" / "out", corpus
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (section(short, bad_document(tmp_path / "bad.jsonl")), {}, DataError, r"bad\.jsonl:2: not UTF-8"),
        (section(short, empty), {}, DataError, "no .* file in this folder"),
        (
            section(short),
            {"model_vocab_size": 100},
            DataError,
            r"vocabulary of the tokenizer \(350\) is larger than the model's \(100\)",
        ),
        (section(short), {"seq_length": 10**6}, DataError, "text: not one sample of 1,000,000 tokens: the documents have"),
        (
            section(short, packing="single"),
            {"seq_length": 10**6},
            DataError,
            "no document of 1,000,000 tokens left for packing 'single'",
        ),
    ]
    for data, changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            build(data, tokenizer_folder, out, **changes)
        assert not out.parent.exists() or list(out.parent.iterdir()) == [], message


def test_a_folder_that_is_there_is_left_alone(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=2)
    before = files_of(report.folder)
    with pytest.raises(ConfigError, match="out: output folder is already there"):
        build(section(*corpus), tokenizer_folder, tmp_path / "out")
    assert files_of(report.folder) == before


def test_a_name_that_leaves_the_folder_is_refused(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot be a file name; rename the data set"):
        build_pretrain(
            section(*corpus), "../x", tokenizer=tokenizer_folder, model_vocab_size=512, seq_length=64, num_samples=1, seed=1,
            out=tmp_path / "out",
        )  # fmt: skip


def test_verify_finds_a_flipped_bit_and_a_foreign_id(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=5)
    assert verify_data(report.folder)["samples"] == 6
    whole = (report.folder / "text.bin").read_bytes()
    flipped = bytearray(whole)
    flipped[500] ^= 1
    (report.folder / "text.bin").write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r"text\.bin: contents differ from the manifest's sha256"):
        verify_data(report.folder)
    (report.folder / "text.bin").write_bytes(whole)
    manifest = json.loads((report.folder / "manifest.json").read_text())
    manifest["tokenizer"]["vocab_size"] = 100
    (report.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"holds id \d+, the vocabulary ends at 100"):
        verify_data(report.folder)


MEMORY = """
import resource, sys
from pathlib import Path
from mcore_longctx.data.build import build_pretrain
from mcore_longctx.recipe.schema import DataSection, DocumentSource
folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
def build(name):
    section = DataSection(sources=(DocumentSource(name="one", path=folder / f"{name}.txt"),))
    build_pretrain(section, "x", tokenizer=tokenizer, model_vocab_size=512, seq_length=16384, num_samples=None, seed=1, out=folder / name)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(build("small"), build("large"))
"""


def test_a_document_of_five_million_tokens_needs_little_memory(tokenizer_folder: Path, tmp_path: Path) -> None:
    line = words(5, 30_000)
    (tmp_path / "small.txt").write_text(line)
    per_line = len(load_tokenizer(tokenizer_folder).encode(line))
    copies = -(-5_000_000 // per_line)
    (tmp_path / "large.txt").write_text(line * copies)
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(tokenizer_folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250).stdout
    small, large = map(int, printed.split())
    assert IndexedReader(tmp_path / "large" / "x").sequence_lengths.sum() >= 4_900_000
    # encoded at once it takes 2 GiB; text, ids and one piece take a tenth of that
    assert large - small < 250, (small, large)
