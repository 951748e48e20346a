"""Damage anywhere is found, and named by sequence, source and document."""

import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.build import build
from mcore_longctx.data.files.arrays import map_arrays, write_arrays
from mcore_longctx.data.files.index_file import IndexColumns, write_index
from mcore_longctx.data.files.indexed import IndexedWriter
from mcore_longctx.data.files.shards import ShardWriter
from mcore_longctx.data.files.sidecar import read_runs
from mcore_longctx.data.inspect import scan
from mcore_longctx.data.inspect.verify import check_data, verify_data, verify_tokens
from mcore_longctx.errors import CheckpointError, DataError, DifferenceFound
from mcore_longctx.manifest import write_manifest
from mcore_longctx.recipe.schema import DataSection, DocumentSource
from tests.data.conftest import words
from tests.data.packed import PAD, VOCABULARY, Packed, make_packed


def make_folder(folder: Path, samples: int = 6, **facts) -> Packed:
    """What `data pack` leaves: samples, sidecar, manifest."""
    folder.mkdir(exist_ok=True)
    packed = make_packed(folder / "set", samples, **facts)
    total = sum(map(len, packed.samples))
    write_manifest(folder, "data", name="set", samples=samples, seq_length=len(packed.samples[0]), tokens=total)
    return packed


def put(path: Path, token: int, value: int, width: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(token * width)
        file.write(value.to_bytes(width, "little", signed=value < 0))


def where(packed: Packed, what: str) -> tuple[int, int]:
    """Sample and position of a token of the first run of this kind that is not in the first sample."""
    for sample, runs in enumerate(packed.runs):
        begin = 0
        for kind, _, _, length in runs:
            if sample and kind == what and length > 1:
                return sample, begin + 1
            begin += length
    raise AssertionError(what)


def named(packed: Packed, sample: int, position: int) -> str:
    """How a token of a document is to be named."""
    begin = 0
    for what, document, start, length in packed.runs[sample]:
        if begin <= position < begin + length:
            assert what == "document"
            source, name = packed.names[document]
            return (
                f"sample {sample}, token {position} (token {start + position - begin} of document {name!r} of source {source!r})"
            )
        begin += length
    raise AssertionError(position)


def test_whole_data_passes_and_says_what_was_compared(tmp_path: Path) -> None:
    make_folder(tmp_path)
    facts = verify_data(tmp_path, separator=[7, 8])
    assert facts["faults"] == []
    checked = {"sizes", "pointers", "documents", "ids", "checksums", "runs", "separators", "sha256", "manifest"}
    assert set(facts["checked"]) == checked
    assert (facts["samples"], facts["seq_length"], facts["tokens"], facts["vocab_size"]) == (6, 64, 384, VOCABULARY)
    assert set(verify_data(tmp_path / "set")["checked"]) == checked - {"sha256", "manifest"}
    for suffix in (".runs", ".bin"):
        (tmp_path / "set.runs").unlink(missing_ok=True)
        assert set(verify_data(tmp_path / f"set{suffix}")["checked"]) == {"sizes", "pointers", "documents", "ids"}


@settings(max_examples=60, deadline=None)
@given(byte=st.integers(0, 6 * 64 * 4 - 1), bit=st.integers(0, 7))
def test_every_flipped_bit_of_the_tokens_is_found_in_its_sample(
    tmp_path_factory: pytest.TempPathFactory, byte: int, bit: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    packed = make_folder(folder)
    raw = bytearray((folder / "set.bin").read_bytes())
    raw[byte] ^= 1 << bit
    (folder / "set.bin").write_bytes(raw)
    sample = byte // 256
    for path in (folder, folder / "set"):
        with pytest.raises(DifferenceFound, match=f"sample {sample}: its checksum differs from the sidecar's") as caught:
            verify_data(path)
        documents = [packed.names[document] for what, document, _, _ in packed.runs[sample] if what == "document"]
        for source, name in documents[:3]:
            assert f"{name!r} of source {source!r}" in str(caught.value)


def test_an_id_past_the_vocabulary_is_named_with_its_document(tmp_path: Path) -> None:
    packed = make_folder(tmp_path)
    sample, position = where(packed, "document")
    put(tmp_path / "set.bin", sample * 64 + position, VOCABULARY)
    facts = check_data(tmp_path)
    assert f"{named(packed, sample, position)} is id 1,000, the vocabulary ends at 1,000" in facts["faults"][0]
    assert check_data(tmp_path, vocab_size=VOCABULARY + 1)["fault_count"] == 1  # its checksum
    put(tmp_path / "set.bin", sample * 64 + position, -5)
    assert f"{named(packed, sample, position)} is id -5, " in check_data(tmp_path, vocab_size=VOCABULARY + 1)["faults"][0]


def reseal(prefix: Path) -> None:
    """Checksums that are right for what .bin holds: what a broken writer would leave."""
    arrays, facts = map_arrays(Path(f"{prefix}.runs"))
    changed = {name: np.array(column) for name, column in arrays.items()}
    raw, size = Path(f"{prefix}.bin").read_bytes(), facts["seq_length"] * 4
    changed["crc32"] = np.array([crc32(raw[at : at + size]) for at in range(0, len(raw), size)], np.uint32)
    write_arrays(Path(f"{prefix}.runs"), changed, facts)


@pytest.mark.parametrize("block", [1 << 20, 64, 20, 4])
@pytest.mark.parametrize("rows", [1 << 18, 3, 1])
def test_separators_and_padding_must_be_the_tokens_they_are_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, rows: int
) -> None:
    monkeypatch.setattr(scan, "_READ", block)
    monkeypatch.setattr(scan, "_ROWS", rows)
    packed = make_packed(tmp_path / "x", 12)
    assert verify_data(tmp_path / "x", separator=[7, 8])["fault_count"] == 0
    for what, right in (("separator", 8), ("padding", PAD)):
        sample, position = where(packed, what)
        put(tmp_path / "x.bin", sample * 64 + position, 555)
        reseal(tmp_path / "x")
        (fault,) = check_data(tmp_path / "x")["faults"]
        says = "the sidecar says 8" if what == "separator" else "padding is 3"
        kind = "a separator" if what == "separator" else "padding"
        assert fault == f"{tmp_path}/x.bin: sample {sample}, token {position} ({kind}) is id 555, {says}"
        put(tmp_path / "x.bin", sample * 64 + position, right)
    reseal(tmp_path / "x")
    assert check_data(tmp_path / "x")["fault_count"] == 0
    assert "its separators are [7, 8], not [7, 9]" in check_data(tmp_path / "x", separator=[7, 9])["faults"][0]


@pytest.mark.parametrize("block", [1 << 20, 24, 4])
def test_blocks_of_tokens_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scan, "_READ", block)
    packed = make_folder(tmp_path)
    assert check_data(tmp_path)["fault_count"] == 0
    rng = random.Random(0)
    for _ in range(20):
        token = rng.randrange(6 * 64)
        old = packed.samples[token // 64][token % 64]
        put(tmp_path / "set.bin", token, old ^ 1)
        faults = check_data(tmp_path)["faults"]
        assert any(f"sample {token // 64}: its checksum differs" in fault for fault in faults)
        put(tmp_path / "set.bin", token, old)


def test_a_cut_file_names_the_first_document_that_is_not_whole_and_goes_on_before_it(tmp_path: Path) -> None:
    packed = make_folder(tmp_path)
    sample, position = where(packed, "document")
    put(tmp_path / "set.bin", 3, 999_999)
    with (tmp_path / "set.bin").open("r+b") as file:
        file.truncate((sample * 64 + position) * 4 + 2)
    faults = check_data(tmp_path)["faults"]
    assert f"cut, sequence {sample} of 6 is the first that is not whole: {named(packed, sample, position)}" in faults[0]
    assert "sample 0, token 3" in faults[1]
    (tmp_path / "set.bin").write_bytes(bytes(6 * 256 + 4))
    assert "1,540 bytes, its index says 1,536: 4 bytes too many" in check_data(tmp_path)["faults"][0]


def test_an_overflowed_pointer_is_a_difference_that_names_its_sequence(tmp_path: Path) -> None:
    lengths = np.full(600, 1_000_000, np.int32)
    write_index(tmp_path / "x.idx", np.int32, [IndexColumns(lengths, np.arange(601))])
    (tmp_path / "x.bin").touch()
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    struct.pack_into("<q", raw, 34 + 2400 + 8 * 537, 537 * 4_000_000 - 2**32)
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(DifferenceFound, match=r"x\.idx: sequence 537 starts at byte -2,146,967,296, .* \(it wrapped"):
        verify_data(tmp_path / "x")


def test_faults_are_collected_up_to_a_number_and_counted(tmp_path: Path) -> None:
    make_folder(tmp_path, 30)
    for sample in range(30):
        put(tmp_path / "set.bin", sample * 64, 5000)
    facts = check_data(tmp_path, max_faults=4)
    assert len(facts["faults"]) == 4
    assert facts["fault_count"] == 60  # an id and a checksum each
    with pytest.raises(DifferenceFound, match=r"sample 0, token 0 .*; and 56 more; make the damaged files again") as caught:
        verify_data(tmp_path, max_faults=4)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("suffix", ["idx", "runs"])
def test_files_beside_the_tokens_are_held_against_manifest_and_each_other(tmp_path: Path, suffix: str) -> None:
    make_folder(tmp_path)
    path = tmp_path / f"set.{suffix}"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 4
    path.write_bytes(raw)
    faults = " ".join(check_data(tmp_path)["faults"])
    assert f"set.{suffix}: contents differ from the manifest's sha256" in faults
    assert "set.idx: document indices do not go" in faults if suffix == "idx" else "set.runs: damaged" in faults
    path.unlink()
    with pytest.raises((DataError, DifferenceFound), match=f"set.{suffix}: (no such file|listed in the manifest but missing)"):
        verify_data(tmp_path)


def test_an_index_of_another_build_is_noticed_by_its_sidecar(tmp_path: Path) -> None:
    make_packed(tmp_path / "x", 6)
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[34 + 72 + 8] = 0  # a border of documents
    (tmp_path / "x.idx").write_bytes(raw)
    (fault,) = check_data(tmp_path / "x")["faults"]
    assert "x.idx: is not the index that the sidecar was written with" in fault


def test_a_sidecar_of_other_samples_is_noticed(tmp_path: Path) -> None:
    for name, samples, seq_length in (("x", 6, 64), ("fewer", 5, 64), ("shorter", 6, 32)):
        make_packed(tmp_path / name, samples, seq_length=seq_length)
    (tmp_path / "x.runs").write_bytes((tmp_path / "fewer.runs").read_bytes())
    assert check_data(tmp_path / "x")["faults"][1] == f"{tmp_path}/x.runs: 5 samples, the index has 6 sequences"
    (tmp_path / "x.runs").write_bytes((tmp_path / "shorter.runs").read_bytes())
    facts = check_data(tmp_path / "x")
    assert facts["faults"][1] == f"{tmp_path}/x.idx: sequence 0 has 64 tokens, the sidecar says 32"
    assert facts["fault_count"] == 7


def test_a_manifest_that_tells_of_other_samples_is_noticed(tmp_path: Path) -> None:
    make_packed(tmp_path / "set", 6)
    write_manifest(tmp_path, "data", name="set", samples=7, seq_length=64, tokens=384)
    (fault,) = check_data(tmp_path)["faults"]
    assert fault == f"{tmp_path}/manifest.json: says 7 samples, there are 6"
    write_manifest(tmp_path, "data", name="set", sha256={"set.bin": hashlib.sha256(b"").hexdigest()})
    (fault,) = check_data(tmp_path)["faults"]
    assert fault == f"{tmp_path}/set.bin: contents differ from the manifest's sha256"


def test_what_is_no_data_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.idx: no such file"):
        verify_data(tmp_path / "x")
    with pytest.raises(DataError, match=r"0 \.idx files"):
        verify_data(tmp_path)
    write_manifest(tmp_path, "checkpoint")
    with pytest.raises(CheckpointError, match="is a folder of kind 'checkpoint', expected data"):
        verify_data(tmp_path)


# ------------------------------------------------------------------ anybody's data
def foreign(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(np.array(ids[:2]), ends_document=False)
            writer.add(np.array(ids[2:]))


def test_documents_of_any_dataset_are_held_against_vocabulary_and_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path / "x", [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8, 9]])
    facts = verify_data(tmp_path / "x", vocab_size=10, separator=[9])
    assert set(facts["checked"]) == {"sizes", "pointers", "documents", "ids", "separators"}
    facts = check_data(tmp_path / "x", vocab_size=9)
    places = ("sequence 1, token 1 (document 0)", "sequence 2, token 1 (document 1)", "sequence 5, token 2 (document 2)")
    assert facts["faults"] == [f"{tmp_path}/x.bin: {place} is id 9, the vocabulary ends at 9" for place in places]
    assert facts["fault_count"] == 3
    monkeypatch.setattr(scan, "_ROWS", 2)
    facts = check_data(tmp_path / "x", separator=[8, 9])
    assert facts["faults"] == [f"{tmp_path}/x.bin: document 0 does not end with [8, 9]"]
    assert facts["fault_count"] == 2
    assert check_data(tmp_path / "x", separator=[4, 4, 9])["fault_count"] == 3


def test_a_negative_id_is_never_one(tmp_path: Path) -> None:
    foreign(tmp_path / "x", [[1, 2, -3, 9]])
    (fault,) = check_data(tmp_path / "x")["faults"]
    assert fault == f"{tmp_path}/x.bin: sequence 1, token 0 (document 0) is id -3, ids are not negative"
    foreign(tmp_path / "y", [[1, 2, 65_535]], "uint16")
    assert check_data(tmp_path / "y")["fault_count"] == 0
    assert check_data(tmp_path / "y", vocab_size=65_535)["fault_count"] == 1


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_dataset_is_checked_as_plain_python_would(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    prefix = tmp_path_factory.mktemp("any") / "x"
    documents = data.draw(st.lists(st.lists(st.integers(0, 12), min_size=0, max_size=9), max_size=9))
    foreign(prefix, documents)
    separator = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=2))
    facts = check_data(prefix, vocab_size=10, separator=separator, max_faults=1000)
    bad_ids = sum(token > 9 for ids in documents for token in ids)
    bad_ends = sum(ids[-len(separator) :] != separator for ids in documents)
    assert facts["fault_count"] == bad_ids + bad_ends


# ------------------------------------------------------------------ shards
def make_shards(out: Path, count: int = 3) -> None:
    tokens = out / "tokens"
    tokens.mkdir(parents=True)
    rows = []
    for number in range(count):
        with ShardWriter(tokens, number, np.dtype("<i4"), "books") as writer:
            for document in range(5):
                writer.add(f"d{number}-{document}", [(np.arange(7) + 10 * document, True)])
            writer.publish({"source": "books"})
        facts = map_arrays(tokens / f"{number:06d}.docs")[1]
        rows.append({name: facts[name] for name in ("tokens", "tokens_crc32")})
    write_manifest(tokens, "tokens", files=(), tokenizer={"vocab_size": 60}, shards=rows)


def test_whole_shards_pass(tmp_path: Path) -> None:
    make_shards(tmp_path)
    assert verify_tokens(tmp_path) == {
        "shards": 3,
        "documents": 15,
        "tokens": 105,
        "is_whole": True,
        "plan": False,
        "vocab_size": 60,
        "faults": [],
        "fault_count": 0,
    }
    (tmp_path / "tokens" / "manifest.json").unlink()
    (tmp_path / "tokens" / "000001.docs").unlink()
    assert verify_tokens(tmp_path)["shards"] == 2  # a run that goes on
    with pytest.raises(DataError, match="no shards here; run `data tokenize`"):
        verify_tokens(tmp_path / "elsewhere")


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    make_shards(tmp_path)
    tokens = tmp_path / "tokens"
    put(tokens / "000000.tokens", 3, 1)
    put(tokens / "000001.tokens", 8, 99)
    (tokens / "000002.tokens").write_bytes(bytes(20))
    with pytest.raises(DifferenceFound) as caught:
        verify_tokens(tmp_path)
    text = str(caught.value)
    assert "000000.tokens: its checksum differs from the one in its table" in text
    assert "000001.tokens: document 'd1-1' holds id 99, outside of the vocabulary" in text
    assert "000002.tokens: 20 bytes, its table says 140" in text
    (tokens / "000000.docs").unlink()
    with pytest.raises(DifferenceFound, match=r"000000\.docs: no such file"):
        verify_tokens(tmp_path)


def test_a_shard_of_another_run_is_noticed(tmp_path: Path) -> None:
    make_shards(tmp_path / "a")
    for suffix in ("tokens", "docs"):
        raw = (tmp_path / "a" / "tokens" / f"000001.{suffix}").read_bytes()
        (tmp_path / "a" / "tokens" / f"000000.{suffix}").write_bytes(raw)
    verify_tokens(tmp_path / "a")  # the same tokens
    with ShardWriter(tmp_path / "a" / "tokens", 2, np.dtype("<i4"), "books") as writer:
        writer.add("other", [(np.arange(35), True)])
        writer.publish({})
    with pytest.raises(DifferenceFound, match=r"000002\.tokens: is not the shard that the manifest lists"):
        verify_tokens(tmp_path / "a")


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "plan").mkdir()
    assert not verify_tokens(tmp_path)["plan"]  # begun, not finished
    (tmp_path / "plan" / "plan.json").write_bytes(b"no plan")
    with pytest.raises(DifferenceFound, match=r"plan\.json: damaged"):
        verify_tokens(tmp_path)
    (tmp_path / "plan" / "plan.json").unlink()
    (tmp_path / "tokens" / "settings.json").write_bytes(b"{}")
    with pytest.raises(DifferenceFound, match=r"settings\.json: damaged"):
        verify_tokens(tmp_path)


# ------------------------------------------------------------------ a run folder
def test_in_a_run_folder_the_damaged_token_and_its_document_are_found_by_the_shards(
    tmp_path: Path, tokenizer_folder: Path, jsonl: Callable[..., Path]
) -> None:
    paths = [
        jsonl(f"{name}.jsonl", [{"id": f"{name}{i}", "text": words(i, 1 + 3 * i)} for i in range(30)]) for name in ("a", "b")
    ]
    section = DataSection(sources=tuple(DocumentSource(name=path.stem, path=path) for path in paths), packing="best_fit")
    out = tmp_path / "out"
    settings = {"chats": False, "model_vocab_size": 512, "seq_length": 256, "num_samples": None, "seed": 7}
    build(section, "text", tokenizer=tokenizer_folder, out=out, **settings)
    assert verify_data(out)["fault_count"] == 0
    assert verify_tokens(out)["plan"]
    runs = read_runs(out / "text")
    ids = np.fromfile(out / "text.bin", "<u2")
    rng = random.Random(5)
    documents = 0
    for _ in range(25):
        sample, row, at = rng.randrange(len(runs)), 0, rng.randrange(256)
        position, run = at, runs.sample(sample)[0]
        while position >= run.length:
            position, row = position - run.length, row + 1
            run = runs.sample(sample)[row]
        token = sample * 256 + at
        put(out / "text.bin", token, int(ids[token]) ^ 1, 2)
        faults = check_data(out)["faults"]
        place = f"token {run.start + position:,} of document {run.document!r} of source {run.source!r}"
        expected = f"sample {sample}: its checksum differs from the sidecar's (first at sample {sample}, token {at} ({place}))"
        assert run.document is None or faults == [f"{out}/text.bin: {expected}"]
        assert run.document is not None or any("(padding)" in fault or "(a separator)" in fault for fault in faults)
        documents += run.document is not None
        put(out / "text.bin", token, int(ids[token]), 2)
    assert documents > 10
    put(out / "tokens" / "000000.tokens", 0, 0, 2)  # damaged shards do not make sound samples bad
    assert verify_data(out)["fault_count"] == 0
    with pytest.raises(DifferenceFound, match=r"000000\.tokens: its checksum differs"):
        verify_tokens(out)
    raw = (out / "plan" / "plan.runs").read_bytes()
    (out / "plan" / "plan.runs").write_bytes(raw[:-1])
    with pytest.raises(DifferenceFound, match=r"plan\.runs: damaged"):
        verify_tokens(out)
    (out / "plan" / "plan.json").unlink()  # without a plan the documents are listed
    put(out / "text.bin", 0, int(ids[0]) ^ 1, 2)
    assert "sample 0: its checksum differs from the sidecar's (document" in check_data(out)["faults"][0]
