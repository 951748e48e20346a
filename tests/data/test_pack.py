"""Packing: every run copied to its place, ids with their documents, a folder of another plan never mixed in."""

import json
from pathlib import Path

import numpy as np
import pytest

from mcore_longctx.data import IndexedReader, PackedSamples, read_runs
from mcore_longctx.data.files.sidecar import LITERAL, PADDING
from mcore_longctx.data.pack import pack
from mcore_longctx.data.planning.plan import make_plan, read_plan
from mcore_longctx.data.planning.separator import make_separator
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.job import open_job, prepare_job, read_documents_table
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.schema import DataSection, DocumentSource
from tests.data.conftest import words

SEQ_LENGTH = 96


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Two files whose ids have different lengths, in bytes too."""
    made = {"é" * (i % 9) + f"{i}": words(i, 3 + 11 * (i % 13)) for i in range(90)}
    for part, name in enumerate(("a", "b")):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for key in list(made)[part::2]:
                file.write(json.dumps({"id": key, "text": made[key]}) + "\n")
    return made


def tokenize(tmp_path: Path, tokenizer: Path, out: str = "out") -> Path:
    tools = load_tokenizer(tokenizer)
    sources = [DocumentSource(name=name, path=tmp_path / f"{name}.jsonl") for name in "ab"]
    job = prepare_job(tmp_path / out, sources, tools, vocab_size=512, range_bytes=1000)
    run_job(job, tools)
    return tmp_path / out


def plan(out: Path, seed: int = 5, **settings) -> None:
    job = open_job(out)
    section = DataSection(sources=job.sources, **settings)
    make_plan(
        out / "plan",
        read_documents_table(job),
        section,
        name="x",
        seed=seed,
        seq_length=SEQ_LENGTH,
        separator=make_separator(section, job),
    )


@pytest.mark.parametrize("packing", ["concatenate", "single", "best_fit", "intact"])
@pytest.mark.parametrize("separator", ["text", "bos_eos", "none"])
def test_every_token_is_the_one_that_its_run_names(
    texts, tokenizer_folder: Path, tmp_path: Path, packing: str, separator: str
) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out, packing=packing, separator_kind=separator)
    pack(out, "x")
    tokenizer, reader, runs = load_tokenizer(tokenizer_folder), IndexedReader(out / "x"), read_runs(out / "x")
    pad = tokenizer.control_id("<|pad|>")
    literal = {
        "text": tokenizer.encode("<s>").tolist(),
        "bos_eos": [tokenizer.control_id("<|begin_of_text|>"), tokenizer.control_id("<|eot_id|>")],
        "none": [],
    }[separator]
    encoded = {name: tokenizer.encode(text).tolist() for name, text in texts.items()}
    where = {name: "ab"[number % 2] for number, name in enumerate(texts)}
    kinds = set()
    for index in range(len(runs)):
        expected: list[int] = []
        for run, document in zip(runs.sample(index), runs.document[runs.rows(index)].tolist(), strict=True):
            kinds.add(min(document, 0))
            if document == PADDING:
                expected += [pad] * run.length
            elif document == LITERAL:
                expected += literal[run.start : run.start + run.length]
            else:
                assert run.source == where[run.document]
                expected += encoded[run.document][run.start : run.start + run.length]
        assert reader[index].tolist() == expected
    assert (LITERAL in kinds) == (separator != "none" and packing != "single")
    assert (PADDING in kinds) == (packing in ("best_fit", "intact"))


def test_documents_are_numbered_as_they_appear(texts, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    pack(out, "x")
    document = np.asarray(read_runs(out / "x").document)
    first = [int(np.argmax(document == number)) for number in range(int(document.max()) + 1)]
    assert first == sorted(first)
    assert len(first) > 60


def packed_and_planned_otherwise(tmp_path: Path, tokenizer: Path) -> tuple[bytes, Path]:
    """The .bin of the plan with seed 5, and a folder of the same tokens that is planned with seed 6."""
    out = tokenize(tmp_path, tokenizer)
    plan(out, seed=5)
    pack(out, "x")
    other = tokenize(tmp_path, tokenizer, "other")
    plan(other, seed=6)
    return (out / "x.bin").read_bytes(), other


def test_a_block_size_that_does_not_divide_and_a_plan_made_again(
    texts, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack that was begun by one plan is not finished by another."""
    expected, other = packed_and_planned_otherwise(tmp_path, tokenizer_folder)
    begin_pack(other, "x", 3, monkeypatch)
    assert len(list((other / "x.packing").glob("*.crc"))) == 3
    plan(other, seed=5)
    pack(other, "x")
    assert (other / "x.bin").read_bytes() == expected
    assert not (other / "x.packing").exists()


def test_a_plan_of_other_tokens_is_refused(texts, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    (tmp_path / "b.jsonl").write_text("".join((tmp_path / "b.jsonl").read_text().splitlines(keepends=True)[:-1]))
    other = tokenize(tmp_path, tokenizer_folder, "other")
    (out / "plan").rename(other / "plan")
    with pytest.raises(DataError, match=r"other/plan: was made from other tokens; run `data plan` again"):
        pack(other, "x")
    assert not (other / "x.idx").exists()


def test_files_of_somebody_else_are_left_alone(texts, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    (out / "x.bin").write_bytes(b"years of work")
    with pytest.raises(ConfigError, match=r"x\.bin: is already there, and not from this plan; use another name"):
        pack(out, "x")
    assert (out / "x.bin").read_bytes() == b"years of work"
    pack(out, "y")
    with pytest.raises(ConfigError, match="holds packed data 'y' of another name or plan"):
        pack(out, "x")


def test_a_damaged_shard_is_named(texts, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    shard = out / "tokens" / "000001.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"000001\.tokens: [\d,]+ bytes, its table says [\d,]+; remove it and start"):
        pack(out, "x")
    (out / "tokens" / "000001.docs").write_bytes(b"")
    with pytest.raises(DataError, match=r"000001\.docs: "):
        read_documents_table(open_job(out))
    assert read_plan(out / "plan")[1]["samples"] > 0


class Stop(Exception):
    pass


def begin_pack(out: Path, name: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack that stops after some blocks. Its work folder."""
    monkeypatch.setattr("mcore_longctx.data.pack._BLOCK_BYTES", 3 * SEQ_LENGTH * 2)
    seen = 0

    def stop(tokens: int) -> None:
        nonlocal seen
        seen += 1
        if seen == blocks:
            raise Stop

    with pytest.raises(Stop):
        pack(out, name, on_block=stop)
    return out / f"{name}.packing"


def test_marks_of_a_file_that_is_gone_are_not_believed(
    texts, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    work = begin_pack(out, "x", 3, monkeypatch)
    (work / "tokens.bin").unlink()
    pack(out, "x")
    check = PackedSamples(out / "x")
    for index in range(len(check)):
        check.check_sample(index)
        assert np.asarray(check.tokens(index)).any()


def test_what_another_plan_had_published_is_removed_and_not_kept(
    texts, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the renames, then planned anew: the files of the first plan are ours and unfinished."""
    expected, other = packed_and_planned_otherwise(tmp_path, tokenizer_folder)

    def stop(*args: object, **kwargs: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("mcore_longctx.data.pack.write_manifest", stop)
        with pytest.raises(Stop):
            pack(other, "x")
    assert (other / "x.idx").exists()
    plan(other, seed=5)
    pack(other, "x")
    assert (other / "x.bin").read_bytes() == expected
    assert not list(other.glob("*.packing"))


def test_an_unfinished_pack_of_another_name_is_removed(
    texts, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    begin_pack(out, "x", 2, monkeypatch)
    (out / "theses.packing").mkdir()
    (out / "theses.packing" / "settings.json").write_text('{"of": "somebody else"}')
    pack(out, "y")
    assert sorted(path.name for path in out.glob("*.packing")) == ["theses.packing"]


def test_a_work_folder_with_damaged_settings_is_refused(
    texts, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    work = begin_pack(out, "x", 2, monkeypatch)
    text = (work / "settings.json").read_text()
    (work / "settings.json").write_text(text.replace('"plan_sha256": "', '"plan_sha256": "0'))
    with pytest.raises(ConfigError, match=r"x\.packing: is no folder of an unfinished pack, or a damaged one"):
        pack(out, "x")
    assert (work / "tokens.bin").exists()


def test_a_work_folder_that_outlived_its_pack_is_removed(texts, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tokenize(tmp_path, tokenizer_folder)
    plan(out)
    pack(out, "x")
    (out / "x.packing").mkdir()
    (out / "x.packing" / "000000.crc").touch()
    assert pack(out, "x").was_done
    assert not (out / "x.packing").exists()
