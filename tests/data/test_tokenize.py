"""Documents to shards: tasks in any order and any number of starts, bad records over all tasks, the reference asked now and then."""

import json
import os
import socket
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
from tests.data.conftest import make_tokenizer, words


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
    assert '"<s>": [' in text
    for damaged in ("", "{", "[]", '{"format": 2}', text.replace('"tasks"', '"tusks"'), text.replace('"<s>": [', '"<s>": [1')):
        path.write_text(damaged)
        with pytest.raises(DataError, match=r"settings\.json: damaged"):
            prepare_job(tmp_path / "out", sources, tokenizer)
        with pytest.raises(DataError, match=r"settings\.json: damaged"):
            open_job(tmp_path / "out")


def test_a_start_that_was_killed_before_its_settings_goes_on(sources, tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tokens"
    folder.mkdir(parents=True)
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    (folder / f"settings.json.partial-{socket.gethostname()}-{dead}").touch()
    run_job(prepare_job(tmp_path / "out", sources, tokenizer), tokenizer)
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []


def test_a_file_that_is_not_read_may_come_to_a_source(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(words(1, 50))
    source = [DocumentSource(name="texts", path=tmp_path / "texts")]
    run_job(prepare_job(tmp_path / "out", source, tokenizer), tokenizer)
    (tmp_path / "texts" / "notes.pdf").touch()
    (tmp_path / "texts" / ".lock").touch()
    report = run_job(prepare_job(tmp_path / "out", source, tokenizer), tokenizer)
    assert report is not None
    assert report.tasks_done_before == 1
    (tmp_path / "texts" / "b.txt").write_text("more")
    with pytest.raises(DataError, match=r"b\.txt: is new since the run began"):
        prepare_job(tmp_path / "out", source, tokenizer)


def test_lost_tokens_are_made_again(sources, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", sources, tokenizer, range_bytes=700)
    run_job(job, tokenizer)
    before = files(job.folder)
    (job.folder / "000002.tokens").unlink()
    (job.folder / "000004.docs").unlink()
    report = run_job(job, tokenizer)
    assert report is not None
    assert report.tasks_done_before == len(job.tasks) - 2
    assert files(job.folder) == before


@pytest.fixture
def chats(tmp_path: Path) -> list[DocumentSource]:
    chats = [[{"role": "user", "content": words(i, 4)}, {"role": "assistant", "content": words(i + 50, 6)}] for i in range(9)]
    chats[4] = chats[4][:1]  # no answer
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return [DocumentSource(name="chats", path=tmp_path / "chats.jsonl")]


def test_a_chat_that_cannot_be_used_is_a_bad_record(chats, tokenizer, tmp_path: Path) -> None:
    job = prepare_job(tmp_path / "out", chats, tokenizer, chats=True)
    with pytest.raises(DataError, match=r"chats\.jsonl:5: no message of role 'assistant'"):
        run_job(job, tokenizer)
    report = run_job(job, tokenizer, max_bad=1)
    assert report is not None
    assert [(source.documents, source.bad) for source in report.sources] == [(8, 1)]


def test_another_chat_template_or_other_special_tokens_are_refused(chats, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")
    config = tmp_path / "model" / "tokenizer_config.json"
    job = prepare_job(tmp_path / "out", chats, load_tokenizer(tmp_path / "model"), chats=True, range_bytes=300)
    run_job(job, load_tokenizer(tmp_path / "model"), max_bad=1, tasks=[0])
    text = config.read_text()
    config.write_text(text.replace("| trim", "| upper"))
    with pytest.raises(ConfigError, match="the chat template is another one than when this folder was begun"):
        prepare_job(tmp_path / "out", chats, load_tokenizer(tmp_path / "model"), chats=True, range_bytes=300)
    config.write_text(text.replace('"pad_token": "<|pad|>"', '"pad_token": "<|end_of_text|>"'))
    with pytest.raises(ConfigError, match="BOS, EOS or pad of the tokenizer are others"):
        prepare_job(tmp_path / "out", chats, load_tokenizer(tmp_path / "model"), chats=True, range_bytes=300)
