"""Folders of packed samples: read by Megatron as intended, equal for any order of files, whole or not there at all."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from mcore_longctx.data import IndexedReader, PackedSamples, read_runs
from mcore_longctx.data import build as build_module
from mcore_longctx.data.build import BuildReport, expect
from mcore_longctx.data.inspect.verify import verify_data
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.errors import ConfigError, DataError, LongctxError
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
    arguments = {"chats": False, "model_vocab_size": 512, "seq_length": SEQ_LENGTH, "num_samples": None, "seed": 7} | changes
    return build_module.build(data, "text", tokenizer=tokenizer, out=out, **arguments)


def samples_of(report: BuildReport) -> list[list[int]]:
    reader = IndexedReader(report.prefix)
    return [reader[i].tolist() for i in range(len(reader))]


def folder_of(report: BuildReport) -> Path:
    return report.pack.folder


def test_the_folder_holds_what_the_architecture_names(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=10)
    names = [".lock", "lengths.json", "lengths.png", "manifest.json", "plan", "text.bin", "text.idx", "text.runs", "tokens"]
    assert sorted(path.name for path in folder_of(report).iterdir()) == names
    assert (report.pack.samples, report.samples_needed) == (11, 10)
    manifest = verify_manifest(folder_of(report), "data")
    assert (manifest["samples"], manifest["seq_length"], manifest["seed"], manifest["method"]) == (11, SEQ_LENGTH, 7, "pretrain")
    tokenizer = load_tokenizer(tokenizer_folder)
    runs = read_runs(report.prefix)
    assert runs.literals.tolist() == tokenizer.encode("<s>").tolist()
    assert manifest["tokenizer"] == {"sha256": tokenizer.sha256, "vocab_size": 512}
    assert runs.facts["tokenizer_sha256"] == tokenizer.sha256
    assert runs.facts["plan_sha256"] == manifest["plan_sha256"]
    assert set(manifest["sources"]) == {"source0", "source1"}
    assert json.loads((folder_of(report) / "lengths.json").read_text())["sources"] == manifest["sources"]
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
    every = [run for sample in range(report.pack.samples) for run in read_runs(report.prefix).sample(sample)]
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
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".runs", ".json", ".png")
    }


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
    one, other = (files_of(folder_of(report)) for report in reports)
    for name in ("text.bin", "text.idx", "text.runs", "lengths.json", "lengths.png"):
        assert one[name] == other[name], name
    again = build(section(tmp_path / "a", length_sampling=how), tokenizer_folder, tmp_path / "again", num_samples=30)
    assert files_of(folder_of(again)) == one
    another = build(section(tmp_path / "a", length_sampling=how), tokenizer_folder, tmp_path / "another", num_samples=30, seed=8)
    assert files_of(folder_of(another))["text.bin"] != one["text.bin"]


# ------------------------------------------------------------------ settings
def test_segments_keep_their_loss_flags(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    question, answer = words(1, 30), words(2, 10)
    records = [{"segments": [{"text": question, "loss": False}, {"text": answer, "loss": True}]}] * 8
    report = build(section(jsonl("a.jsonl", records), separator_kind="none"), tokenizer_folder, tmp_path / "out")
    tokenizer, samples = load_tokenizer(tokenizer_folder), PackedSamples(report.prefix)
    asked, answered = len(tokenizer.encode(question)), len(tokenizer.encode(answer))
    pattern = np.tile(np.repeat([False, True], [asked, answered]), 8)
    found = np.concatenate([samples.runs.loss_flags(i, 0, SEQ_LENGTH) for i in range(len(samples))])
    assert found.tolist() == pattern[: len(found)].tolist()
    assert verify_manifest(folder_of(report), "data")["tokens_with_loss"] == int(found.sum())


def test_single_packing_takes_one_document_a_sample_and_counts_what_it_drops(
    corpus, tokenizer_folder: Path, tmp_path: Path
) -> None:
    report = build(section(*corpus, packing="single"), tokenizer_folder, tmp_path / "out")
    runs = read_runs(report.prefix)
    assert {len(runs.sample(i)) for i in range(len(runs))} == {1}
    tokenizer = load_tokenizer(tokenizer_folder)
    lengths = [len(tokenizer.encode(words(i, 1 + i))) for i in range(60)]
    lengths += [len(tokenizer.encode(words(100 + i, 100 + 10 * i))) for i in range(20)]
    assert report.pack.samples == sum(length // SEQ_LENGTH for length in lengths)


def test_shares_hold_in_the_samples(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    report = build(section(*corpus, shares=(1, 3)), tokenizer_folder, tmp_path / "out", num_samples=20)
    used = [source["tokens_after"] for source in verify_manifest(folder_of(report), "data")["sources"].values()]
    total = report.pack.samples * SEQ_LENGTH
    assert report.pack.samples == 21
    assert abs(sum(used) / total - 1) < 0.15  # the rest is separators
    assert 0.2 < used[0] / sum(used) < 0.3


def test_too_few_documents_are_an_error_that_says_how_much_would_repeat(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"would be taken \d+\.\d+ times.*repeat_to_fill"):
        build(section(*corpus), tokenizer_folder, tmp_path / "out", num_samples=100_000)
    report = build(section(*corpus, repeat_to_fill=True), tokenizer_folder, tmp_path / "out", num_samples=1_000)
    assert report.pack.samples == 1_001


# ------------------------------------------------------------------ again
def test_a_finished_build_is_not_done_twice(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    data = section(*corpus)
    report = build(data, tokenizer_folder, tmp_path / "out", num_samples=5)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("text.*")}
    again = build(data, tokenizer_folder, tmp_path / "out", num_samples=5)
    assert again.pack.was_done
    assert not report.pack.was_done
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("text.*")}


def test_other_settings_in_a_folder_that_was_begun_are_refused(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    out, (short, long) = tmp_path / "out", corpus
    build(section(short, long), tokenizer_folder, out, num_samples=5)
    before = files_of(out)
    other = tmp_path / "other"
    other.mkdir()
    text = (tokenizer_folder / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    changed = [
        (section(short), tokenizer_folder, {}, "the sources were .* when this folder was begun"),
        (section(short, long), other, {}, "the tokenizer is another one than when this folder was begun"),
        (
            section(short, long),
            tokenizer_folder,
            {"model_vocab_size": 70_000},
            "dtype was 'uint16' when this folder was begun, it is 'int32'",
        ),
        (section(short, long), tokenizer_folder, {"seed": 8}, "holds packed data 'text', made by a plan with other settings"),
    ]
    for data, tokenizer, changes, message in changed:
        with pytest.raises(ConfigError, match=message):
            build(data, tokenizer, out, **({"num_samples": 5} | changes))
        assert files_of(out) == before
    (long / "00.txt").write_text("changed")
    with pytest.raises(LongctxError, match="has changed: 7 bytes"):
        build(section(short, long), tokenizer_folder, out, num_samples=5)
    assert files_of(out) == before


def test_a_folder_of_somebody_else_is_left_alone(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="the folder is not empty, and nothing was tokenized here"):
        build(section(*corpus), tokenizer_folder, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_dry_run_estimates_and_writes_nothing(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    expected = expect(section(*corpus).sources, tokenizer_folder, chats=False, vocab_size=512)
    report = build(section(*corpus), tokenizer_folder, tmp_path / "out")
    assert [path for path in before if not path.exists()] == []
    for (name, size, tokens), source in zip(expected.sources, report.tokens.sources, strict=True):
        assert name == source.name
        assert size == source.bytes
        assert abs(tokens / source.tokens - 1) < 0.02


def long_documents() -> list[dict]:
    return [{"id": f"{i}", "text": (words(i, 9000) + "\n") * 90} for i in range(6)]  # 5 MB each


def many_documents() -> list[dict]:
    return [{"id": f"{i}", "meta": "x" * (i % 50), "text": words(i, 40 + i % 300)} for i in range(12_000)]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_gzip(path: Path, records: list[dict]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode(), 6))


def write_parquet(path: Path, records: list[dict]) -> None:
    rows = {name: [record[name] for record in records] for name in ("id", "text")}
    pyarrow.parquet.write_table(pyarrow.table(rows), path, compression="zstd", row_group_size=1000)


def write_folder(path: Path, records: list[dict]) -> None:
    """All of the kinds beside each other: a byte of one holds more than one of another."""
    path.mkdir()
    write_lines(path / "a.jsonl", records[::4])
    write_gzip(path / "b.jsonl.gz", records[1::4])
    write_parquet(path / "c.parquet", records[2::4])
    for record in records[3::4]:
        (path / f"{record['id']}.txt").write_text(record["text"])


@pytest.mark.parametrize(
    ("suffix", "write", "made", "packed"),
    [
        (".jsonl", write_lines, long_documents, None),
        (".jsonl", write_lines, many_documents, None),
        (".jsonl.gz", write_gzip, long_documents, None),
        (".jsonl.gz", write_gzip, many_documents, 1 << 21),  # the first two thirds are unpacked
        (".parquet", write_parquet, many_documents, None),
        ("", write_folder, many_documents, None),
    ],
)
def test_a_dry_run_is_within_a_tenth(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch, made, suffix: str, write, packed
) -> None:
    """Documents that are longer than a range, and packed files, of which a byte is many characters."""
    records = made()
    write(tmp_path / f"a{suffix}", records)
    monkeypatch.setattr(build_module, "_PACKED", packed or build_module._PACKED)
    encode = load_tokenizer(tokenizer_folder).encode
    tokens = sum(len(encode(record["text"])) for record in records)
    sources = section(tmp_path / f"a{suffix}").sources
    ((_, _, expected),) = expect(sources, tokenizer_folder, chats=False, vocab_size=None).sources
    assert abs(expected / tokens - 1) < 0.1, expected / tokens


def test_a_dry_run_counts_the_tasks_of_its_range_and_refuses_what_the_run_would(corpus, tokenizer_folder: Path) -> None:
    sources = section(*corpus).sources
    sizes = [file.stat().st_size for file in corpus if file.is_file()]
    few = expect(sources, tokenizer_folder, chats=False, vocab_size=512)
    many = expect(sources, tokenizer_folder, chats=False, vocab_size=512, range_bytes=1000)
    assert (few.sources, few.files) == (many.sources, many.files)
    assert many.tasks >= few.tasks + sum(size // 1000 - 1 for size in sizes)
    with pytest.raises(DataError, match=r"vocabulary of the tokenizer \(350\) is larger than the model's \(200\)"):
        expect(sources, tokenizer_folder, chats=False, vocab_size=200)


def test_a_dry_run_of_chats(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    path = jsonl("chats.jsonl", [conversation(i, 2 + i % 9) for i in range(300)])
    expected = expect(section(path).sources, tokenizer_folder, chats=True, vocab_size=512)
    report = build(section(path), tokenizer_folder, tmp_path / "out", chats=True)
    assert expected.sources[0][2] == report.tokens.sources[0].tokens


# ------------------------------------------------------------------ chats
def conversation(seed: int, count: int) -> dict:
    messages = [{"role": "user", "content": words(seed, 5)}, {"role": "assistant", "content": words(seed + 1, count)}]
    return {"messages": messages}


def test_chats_are_packed_whole_with_padding_behind(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    path = jsonl("chats.jsonl", [conversation(i, 2 + i % 9) for i in range(30)] + [conversation(99, 300)])
    arguments = {
        "chats": True,
        "tokenizer": tokenizer_folder,
        "model_vocab_size": 512,
        "seq_length": 128,
        "num_samples": None,
        "seed": 1,
    }
    report = build_module.build(section(path), "chats", out=tmp_path / "out", **arguments)
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
    assert "1 conversation" in str(report)
    assert "longer than" in str(report)
    verify_data(folder_of(report))
    again = build_module.build(section(path), "chats", out=tmp_path / "again", **arguments)
    assert files_of(folder_of(again)) == files_of(folder_of(report))


def test_settings_without_meaning_for_chats_are_refused(tokenizer_folder: Path, tmp_path: Path, jsonl) -> None:
    path = jsonl("chats.jsonl", [conversation(1, 5)])
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"data\.text\.packing: has no meaning for chats"):
        build(section(path, packing="single"), tokenizer_folder, out, chats=True)
    with pytest.raises(ConfigError, match=r"data\.text\.sources: share has no meaning for chats"):
        build(section(path, shares=(1,)), tokenizer_folder, out, chats=True)
    assert not out.exists()
    with pytest.raises(DataError, match="no conversation of at most 16 tokens"):
        build(section(path), tokenizer_folder, out, chats=True, seq_length=16)


# ------------------------------------------------------------------ bad input
def bad_document(path: Path) -> Path:
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    return path


def test_bad_input_leaves_nothing_that_looks_finished(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    (short, _) = corpus
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (section(short, bad_document(tmp_path / "bad.jsonl")), {}, r"bad\.jsonl:2: not UTF-8"),
        (section(short, empty), {}, "empty"),
        (section(short), {"model_vocab_size": 100}, r"vocabulary of the tokenizer \(350\) is larger than the model's \(100\)"),
        (section(short), {"seq_length": 10**6}, "not one sample of 1,000,000 tokens|not a single sample"),
    ]
    for number, (data, changes, message) in enumerate(cases):
        out = tmp_path / f"out{number}"
        with pytest.raises(DataError, match=message):
            build(data, tokenizer_folder, out, **changes)
        left = {path.name for path in out.rglob("*") if path.is_file()} if out.exists() else set()
        assert not any(name.startswith("text.") or ".partial" in name for name in left), left
        assert not (out / "manifest.json").exists()


def test_bad_records_up_to_a_number_are_left_out_and_counted(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    bad = bad_document(tmp_path / "bad.jsonl")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not UTF-8.*--max-bad"):
        build(section(bad), tokenizer_folder, out, seq_length=2)
    assert not list((out / "tokens").glob("*.docs"))
    report = build(section(bad, max_bad=1), tokenizer_folder, out, seq_length=1)  # the same folder goes on
    assert [(source.documents, source.bad) for source in report.tokens.sources] == [(1, 1)]
    manifest = verify_manifest(out / "tokens", "tokens")
    assert len(manifest["bad"]) == 1
    assert manifest["bad"][0].startswith(f"{bad}:2: not UTF-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not UTF-8"):
        build(section(bad), tokenizer_folder, out, seq_length=1)


def test_a_name_that_leaves_the_folder_is_refused(corpus, tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\.\./x' cannot be a file name; rename the data set"):
        build_module.build(
            section(*corpus), "../x", chats=False, tokenizer=tokenizer_folder, model_vocab_size=512, seq_length=64, num_samples=1,
            seed=1, out=tmp_path / "out",
        )  # fmt: skip


MEMORY = """
import resource, sys
from pathlib import Path
from mcore_longctx.data.build import build as build_data
from mcore_longctx.recipe.schema import DataSection, DocumentSource
folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
def build(name):
    section = DataSection(sources=(DocumentSource(name="one", path=folder / f"{name}.txt"),))
    build_data(section, "x", chats=False, tokenizer=tokenizer, model_vocab_size=512, seq_length=16384, num_samples=None, seed=1, out=folder / name)
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
