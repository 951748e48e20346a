"""Documents to shards: tasks in any order and any number of starts, bad records over all tasks, the reference asked now and then."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from mcore_longctx.data.tokenizers import Tokenizer, load_tokenizer
from mcore_longctx.data.tokens.job import open_job, prepare_job, read_documents_table
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.errors import ConfigError, DataError, DifferenceFound
from mcore_longctx.manifest import verify_manifest
from mcore_longctx.recipe.schema import DocumentSource
from tests.data.conftest import words


@pytest.fixture
def sources(tmp_path: Path) -> list[DocumentSource]:
    for name, count in (("a", 30), ("b", 20)):
        lines = [json.dumps({"id": f"{name}{i}", "text": words(i, 20 + i)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": ""}', ""]))
    return [DocumentSource(name=name, path=tmp_path / f"{name}.jsonl") for name in "ab"]


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tasks_in_any_order_and_many_starts_give_the_same_files(sources, tokenizer, tmp_path: Path) -> None:
    whole = prepare_job(tmp_path / "whole", sources, tokenizer, range_bytes=700)
    assert len(whole.tasks) > 8
    report = run_job(whole, tokenizer)
    parts = prepare_job(tmp_path / "parts", sources, tokenizer, range_bytes=700)
    last = len(parts.tasks) - 1
    assert run_job(parts, tokenizer, tasks=[last, 3]) is None
    with pytest.raises(DataError, match=rf"tokens: 2 of {last + 1} tasks are done; run `data tokenize` again"):
        read_documents_table(open_job(tmp_path / "parts"))
    assert run_job(parts, tokenizer, tasks=range(last, 4, -1)) is None
    again = run_job(open_job(tmp_path / "parts"), tokenizer)
    assert report is not None
    assert again is not None
    assert again.sources == report.sources
    assert again.tasks_done_before == last - 4 + 1
    assert [(source.documents, source.empty) for source in report.sources] == [(30, 1), (20, 1)]
    one, other = files(whole.folder), files(parts.folder)
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name != "settings.json")  # settings.json has the versions, too: equal


def test_shards_hold_the_documents_in_order(sources, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", sources, tokenizer, range_bytes=900)
    run_job(job, tokenizer)
    table = read_documents_table(job)
    assert [table.document_id(row) for row in range(len(table))] == [f"a{i}" for i in range(30)] + [f"b{i}" for i in range(20)]
    assert [table.sources[source] for source in table.source] == ["a"] * 30 + ["b"] * 20
    for row in (0, 7, 29, 30, 49):
        shard = int(np.searchsorted(table.shard_first, row, side="right")) - 1
        stored = table.shards[shard].tokens()[table.token_offset[row] :][: table.length[row]]
        count = row if row < 30 else row - 30
        assert stored.tolist() == tokenizer.encode(words(count, 20 + count)).tolist()
    assert len(set(table.key.tolist())) == 50


def test_the_manifest_says_what_was_read(sources, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", sources, tokenizer, vocab_size=400)
    run_job(job, tokenizer)
    manifest = verify_manifest(job.folder, "tokens")
    assert [shard["crc32"] for shard in manifest["shards"]] == [zlib.crc32(source.path.read_bytes()) for source in sources]
    assert [shard["bytes_read"] for shard in manifest["shards"]] == [source.path.stat().st_size for source in sources]
    assert manifest["dtype"] == "uint16"
    assert {shard["backend"] for shard in manifest["shards"]} == {tokenizer.backend}


def test_bad_records_are_counted_over_all_tasks(sources, tokenizer, tmp_path: Path) -> None:
    for source in sources:
        with source.path.open("ab") as file:
            file.write(b'{"text": 3}\n')
    job = prepare_job(tmp_path / "out", sources, tokenizer, range_bytes=700)
    with pytest.raises(
        DataError, match=r"a\.jsonl:32: 'text' is a number, expected a string; repair the record, or allow bad records"
    ):
        run_job(job, tokenizer)
    with pytest.raises(DataError, match=r"\(and 1 more\)"):
        run_job(job, tokenizer, max_bad=1)
    report = run_job(job, tokenizer, max_bad=2)
    assert report is not None
    assert [(source.documents, source.bad) for source in report.sources] == [(30, 1), (20, 1)]
    assert "left out: 1 empty, 1 bad" in str(report)
    with pytest.raises(DataError, match=r"\(and 1 more\); allow them with --max-bad 2"):
        run_job(job, tokenizer, max_bad=1)  # the shards are there; what they left out still counts


def test_the_reference_is_asked_for_a_share_of_the_documents(
    sources, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, asked = tokenizer.encode, []
    job = prepare_job(tmp_path / "out", sources, tokenizer)
    monkeypatch.setattr(
        "mcore_longctx.data.tokens.tokenize.check_against_reference", lambda tok, text, where: asked.append(str(where))
    )
    run_job(job, tokenizer, verify_fraction=0.5)
    assert 10 < len(asked) < 40
    assert all(place.partition(".jsonl:")[2].isdigit() for place in asked)
    monkeypatch.undo()
    job = prepare_job(tmp_path / "other", sources, tokenizer)
    monkeypatch.setattr(tokenizer, "encode", lambda text: np.append(encode(text)[:-1], 7) if "whale" in text else encode(text))
    with pytest.raises(DifferenceFound, match=r"\.jsonl:\d+"):
        run_job(job, tokenizer, verify_fraction=1.0)
    assert not list(job.folder.glob("000000.*"))


def test_another_tokenizer_is_refused(sources, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", sources, tokenizer)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(tokenizer.path.read_text() + " ")
    other = load_tokenizer(tmp_path / "other")
    with pytest.raises(ConfigError, match="is not the tokenizer that this folder was begun with"):
        run_job(job, other)
    with pytest.raises(ConfigError, match="the tokenizer is another one than when this folder was begun"):
        prepare_job(tmp_path / "out", sources, other)


def test_an_input_that_changes_while_it_is_read_is_an_error(sources, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", sources, tokenizer)
    with sources[1].path.open("ab") as file:
        file.write(b'{"text": "more"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl: has changed"):
        run_job(job, tokenizer)
    assert not (job.folder / "manifest.json").exists()


def test_damaged_settings_are_one_line(sources, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", sources, tokenizer)
    path = job.folder / "settings.json"
    text = path.read_text()
    for damaged in ("", "{", "[]", '{"format": 2}', text.replace('"tasks"', '"tusks"'), text.replace('"uint16"', '"uint17"')):
        path.write_text(damaged)
        with pytest.raises((DataError, ConfigError), match=r"settings\.json: (damaged|dtype was 'uint17')"):
            prepare_job(tmp_path / "out", sources, tokenizer)
        with pytest.raises(DataError, match=r"settings\.json: damaged"):
            open_job(tmp_path / "out")
