"""`augment` from a recipe's section to packed samples: the same for any number of workers and starts, untied by verify, shown."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.data import IndexedReader, PackedSamples, read_runs
from mcore_longctx.data import build as build_module
from mcore_longctx.data import pack as pack_module
from mcore_longctx.data.files.arrays import map_arrays, write_arrays
from mcore_longctx.data.files.sidecar import LITERAL, PADDING
from mcore_longctx.data.inspect.merge import merge_indexed
from mcore_longctx.data.inspect.untie import untie
from mcore_longctx.data.inspect.verify import check_data, verify_data
from mcore_longctx.data.planning import augmenting
from mcore_longctx.data.planning.plan import read_plan
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.recipe.data import AugmentSection, ChunkSet, DataSection, DocumentSource
from tests.data.conftest import make_tokenizer, words

SEQ_LENGTH = 512
CIP = AugmentSection(type="cip", chunks=(3,), probability=0.7)
UTK = AugmentSection(type="utk", chunks=(2, 3), probability=0.7)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": f"d{i}", "text": words(i, 20 + i)} for i in range(60)]
    parts = [{"text": words(77, 30), "loss": False}, {"text": words(78, 90), "loss": True}]
    rows.append({"id": "parts", "segments": parts})
    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(corpus: Path, tokenizer: Path, out: Path, how: AugmentSection | None, workers: int = 1, **settings) -> Path:
    section = DataSection(sources=(DocumentSource(name="docs", path=corpus),), augment=how, **settings)
    arguments = {"chats": False, "model_vocab_size": 512, "seq_length": SEQ_LENGTH, "num_samples": None, "seed": 7}
    return build_module.build(section, "text", tokenizer=tokenizer, out=out, workers=workers, **arguments).prefix


def bytes_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "runs")]


@pytest.mark.parametrize("how", [CIP, UTK])
@pytest.mark.parametrize("settings", [{}, {"packing": "best_fit", "separator_kind": "bos_eos"}, {"packing": "intact"}])
def test_any_number_of_workers_and_size_of_blocks_gives_the_same_bytes_that_verify_unties(
    corpus: Path, tokenizer: Path, tmp_path: Path, how: AugmentSection, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(corpus, tokenizer, tmp_path / "one", how, **settings)
    monkeypatch.setattr(augmenting, "_ROWS", 3)  # a sample at a time
    monkeypatch.setattr(pack_module, "_BLOCK_BYTES", 4096)
    three = build(corpus, tokenizer, tmp_path / "three", how, workers=3, **settings)
    assert bytes_of(one) == bytes_of(three)
    assert "pieces" in verify_data(one.parent)["checked"]
    plain = build(corpus, tokenizer, tmp_path / "plain", None, **settings)
    before, after = IndexedReader(plain), IndexedReader(one)
    same = [before[i].tolist() == after[i].tolist() for i in range(len(before))]
    assert 0 < sum(same) < len(same) == len(after)
    if how.type == "cip":
        assert all(sorted(before[i]) == sorted(after[i]) for i in range(len(before)))
    runs, facts = read_plan(one.parent / "plan")
    kinds = json.loads((one.parent / "manifest.json").read_text())
    literal = runs.document == LITERAL
    added = literal & (runs.start >= facts["augment"]["separator_tokens"])
    assert facts["tokens_of_labels"] == kinds["tokens_of_labels"] == int(runs.length[added].sum())
    assert facts["tokens_of_padding"] == int(runs.length[runs.document == PADDING].sum())
    left = facts["left_out"]["docs"]
    assert left["in_samples"]["tokens"] == int(runs.length[runs.document >= 0].sum())
    lost = left["cut_by_labels"]["tokens"]
    plain_facts = read_plan(plain.parent / "plan")[1]
    assert lost == plain_facts["left_out"]["docs"]["in_samples"]["tokens"] - left["in_samples"]["tokens"]
    assert (lost > 0) == (how.type == "utk" and settings.get("packing") is None) or settings
    with pytest.raises(DataError, match=f"augment {how.type} has spread the documents of a sample over it"):
        PackedSamples(one).document_lengths(0)


def test_what_is_packed_is_what_the_runs_say(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Labels and knots too: the sample's tokens are the documents' tokens and the literals, read by another way."""
    prefix = build(corpus, tokenizer, tmp_path / "out", UTK)
    runs, reader, samples = read_runs(prefix), IndexedReader(prefix), PackedSamples(prefix)
    plain = read_runs(build(corpus, tokenizer, tmp_path / "plain", None))
    plain_reader = IndexedReader(tmp_path / "plain" / "text")
    tokens: dict[tuple[str, int], int] = {}
    for i in range(len(plain)):
        at = 0
        for run in plain.sample(i):
            for j in range(run.length):
                if run.document is not None:
                    tokens[run.document, run.start + j] = int(plain_reader[i][at + j])
            at += run.length
    for i in range(len(runs)):
        expected, flags = [], []
        for run in runs.sample(i):
            places = range(run.start, run.start + run.length)
            expected += [tokens[run.document, at] if run.document is not None else int(runs.literals[at]) for at in places]
            flags += [run.loss] * run.length
        assert reader[i].tolist() == expected
        assert samples.sample(i)[2].tolist() == [*flags[1:], False]


def change(prefix: Path, sample: int, row: int, **values: int) -> None:
    arrays, facts = map_arrays(Path(f"{prefix}.runs"))
    changed = {name: np.array(column) for name, column in arrays.items()}
    for name, value in values.items():
        changed[name][changed["first_run"][sample] + row] = value
    write_arrays(Path(f"{prefix}.runs"), changed, facts)


def rows_of(prefix: Path, wanted: str) -> list[tuple[int, int]]:
    """Sample and row of runs of a kind."""
    runs = read_runs(prefix)
    from mcore_longctx.data.methods.labels import literal_names

    name = literal_names(runs)
    found = []
    for i in range(len(runs)):
        for row, run in enumerate(runs.sample(i)):
            kind = "document" if run.document is not None else name(run.start)
            found += [(i, row)] if kind == wanted else []
    return found


@pytest.mark.parametrize("how", [CIP, UTK])
def test_a_piece_in_another_place_is_found(corpus: Path, tokenizer: Path, tmp_path: Path, how: AugmentSection) -> None:
    """Two pieces of equal documents exchanged, one moved by a token, flags turned: all of it agrees with every checksum."""
    prefix = build(corpus, tokenizer, tmp_path / "out", how)
    runs = read_runs(prefix)
    saved = Path(f"{prefix}.runs").read_bytes()
    found = 0
    rng = random.Random(1)
    cut = [(i, row) for i, row in rows_of(prefix, "document") if runs.sample(i)[row].start > 0 and row > 0]
    for i, row in rng.sample(cut, 12):
        assert not list(untie(runs, i))
        start = runs.sample(i)[row].start
        change(prefix, i, row, start=start - 1)
        found += any(True for _ in untie(read_runs(prefix), i))
        Path(f"{prefix}.runs").write_bytes(saved)
    assert found == 12
    if how.type == "utk":
        names = {
            "knot head1": "label and no knot|knot and no label|goes on where|where none can be",
            "backtrace": "loss flag False on a run of kind id",
        }
        i, row = rows_of(prefix, "label")[3]
        change(prefix, i, row, loss=1)
        assert any(f"sample {i}: loss flag True on a run of kind label" in fault for fault in check_data(prefix)["faults"])
        Path(f"{prefix}.runs").write_bytes(saved)
        ids = rows_of(prefix, "backtrace")
        (i, row) = next((i, row) for i, row in ids if runs.sample(i)[row].loss)
        change(prefix, i, row, loss=0)
        assert re.search(names["backtrace"], " ".join(untie(read_runs(prefix), i)))
        Path(f"{prefix}.runs").write_bytes(saved)
        labels = rows_of(prefix, "label")
        i, row = labels[0]
        other = next(row for j, row in labels[1:] if j == i)
        change(prefix, i, row, start=int(runs.start[runs.first_run[i] + other]))
        assert "two pieces have one label" in " ".join(untie(read_runs(prefix), i))


def test_show_names_pieces_and_labels(corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = build(corpus, tokenizer, tmp_path / "out", UTK)
    i, _ = rows_of(prefix, "label")[0]
    assert main(["data", "show", str(prefix.parent), "--sample", str(i)]) == 0
    printed = capsys.readouterr().out
    label = re.search(r"---- label ----  no loss\n +'<D>(.{6})</D>'", printed)
    assert label is not None
    assert re.search(r"---- knot tail1 ----  no loss\n +'<tail1>'", printed)
    assert re.search(r"---- backtrace ----  no loss\n +'<S>'", printed)
    assert printed.count(label[1]) >= 1
    assert main(["data", "stats", str(prefix.parent)]) == 0
    assert "labels and knots" in capsys.readouterr().out


def test_the_command_line_plans_the_same(
    corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    asked = ["--augment", "utk", "--augment-chunks", "2,3", "--augment-probability", "0.7"]
    assert main(["data", "tokenize", out, "--tokenizer", str(tokenizer), "--vocab-size", "512", f"docs={corpus}"]) == 0
    assert main(["data", "plan", out, "--seq-length", "512", "--seed", "7", *asked]) == 0
    assert "utk: documents of 70 % of the samples in 2 or 3 pieces, " in capsys.readouterr().out
    assert main(["data", "pack", out, "--name", "text"]) == 0
    prefix = build(corpus, tokenizer, tmp_path / "other", UTK)
    assert bytes_of(tmp_path / "out" / "text")[:2] == bytes_of(prefix)[:2]
    capsys.readouterr()
    for wrong, line in (
        (["--augment-chunks", "2"], "options of --augment, and no --augment"),
        (["--augment", "cip", "--augment-chunks", "2,x"], "--augment-chunks 2,x: expected numbers"),
        (["--augment", "cip", "--augment-chunks", "2,3"], "cip takes one number"),
        (["--augment", "cip", "--augment-any-order"], "keep_order and backtrace belong to utk"),
        (["--augment", "utk", "--augment-group", "3"], "documents_per_group belongs to cip"),
        (["--augment", "utk", "--augment-probability", "0"], "probability is 0.0, expected more than 0"),
        (["--augment", "utk", "--packing", "single"], "augment utk mixes the documents of a sample, packing single fills"),
    ):
        assert main(["data", "plan", out, "--seq-length", "512", *wrong]) == 2
        assert line in capsys.readouterr().err


def test_another_augment_is_another_plan(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    build(corpus, tokenizer, tmp_path / "out", UTK)
    for how in (None, CIP, AugmentSection(type="utk", chunks=(2, 3), probability=0.7, backtrace=False)):
        with pytest.raises(ConfigError, match="made by a plan with other settings"):
            build(corpus, tokenizer, tmp_path / "out", how)
    first = bytes_of(tmp_path / "out" / "text")
    assert bytes_of(build(corpus, tokenizer, tmp_path / "out", UTK)) == first


def test_a_plan_that_was_killed_is_made_again(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bytes_of(build(corpus, tokenizer, tmp_path / "whole", UTK))
    calls = iter(range(100))

    def dies(*_: object) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(augmenting, "_ROWS", 30)
    with monkeypatch.context() as patch:
        patch.setattr(augmenting, "release", dies)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, tokenizer, tmp_path / "out", UTK)
    assert [path.name for path in (tmp_path / "out" / "plan").iterdir()] == []
    assert bytes_of(build(corpus, tokenizer, tmp_path / "out", UTK)) == whole


def test_merged_data_of_one_kind_can_be_untied_and_of_two_kinds_is_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    one = build(corpus, tokenizer, tmp_path / "one", UTK)
    merge_indexed([one, one], tmp_path / "all")
    assert "pieces" in verify_data(tmp_path / "all")["checked"]
    two = build(corpus, tokenizer, tmp_path / "two", CIP)
    with pytest.raises(DataError, match="was made with another augment, or none"):
        merge_indexed([one, two], tmp_path / "both")


def test_chunks_and_chats_are_refused(corpus: Path, tokenizer: Path, tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    chunks = (ChunkSet(length=SEQ_LENGTH),)
    with pytest.raises(ValueError, match="augment cip mixes the documents of a sample, chunks fill samples with one document"):
        DataSection(sources=(DocumentSource(name="a", path=corpus, chunks=chunks),), mode="prolong", augment=CIP)
    section = DataSection(sources=(DocumentSource(name="a", path=corpus),), augment=CIP)
    how = SimpleNamespace(chats=True, tokenizer=tokenizer, model_vocab_size=512, seq_length=64, num_samples=None, seed=1)
    with pytest.raises(ConfigError, match=r"data.x.augment: has no meaning for chats"):
        build_module.build(section, "x", out=tmp_path / "out", **vars(how))
