"""Token shards: tables that come back as written, documents of one id told apart by content, hashes that do not move."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files.shards import ShardWriter, hash64, read_shard, read_table
from mcore_longctx.data.inspect.verify import verify_data
from mcore_longctx.data.pack import pack
from mcore_longctx.data.planning.plan import make_plan
from mcore_longctx.data.planning.separator import make_separator
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.job import prepare_job, read_documents_table
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.schema import DataSection, DocumentSource
from tests.data.limits import few_descriptors

Document = tuple[str, list[tuple[int, bool]]]  # id, segments: length and loss


def write(folder: Path, number: int, documents: list[Document], source: str = "s", *, count_up: bool = True) -> None:
    """Tokens count up through the shard, or from 0 in each segment."""
    start = 0
    with ShardWriter(folder, number, np.dtype("<i4"), source) as shard:
        for name, segments in documents:
            made = []
            for length, loss in segments:
                made.append((np.arange(start, start + length, dtype=np.int32), loss))
                start += length if count_up else 0
            shard.add(name, made)
        shard.publish({"task": number})


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the reference generator with seed 0 (Vigna's splitmix64.c): the decisions of all plans rest on them."""
    state = np.array([0], np.uint64)
    assert hash64(state).tolist() == [0xE220A8397B1DCDAF]
    # the second output is the finaliser of twice the increment
    assert hash64(np.array([0x9E3779B97F4A7C15], np.uint64)).tolist() == [0x6E789E6AA1B965F4]
    assert hash64(3, np.array([5, 6], np.uint64)).tolist() != hash64(4, np.array([5, 6], np.uint64)).tolist()
    assert hash64(-1, np.array([5])).tolist() == hash64((1 << 64) - 1, np.array([5])).tolist()


def test_a_shard_comes_back_as_written(tmp_path: Path) -> None:
    write(tmp_path, 7, [("é", [(3, True)]), ("", [(2, False), (4, True)]), ("gone", [(0, True)]), ("b", [(1, False)])])
    shard = read_shard(tmp_path, 7)
    assert shard.length.tolist() == [3, 6, 1]
    assert [shard.document_id(row) for row in range(3)] == ["é", "", "b"]
    assert shard.tokens().tolist() == list(range(10))
    assert shard.loss_document.tolist() == [1, 1, 2]
    assert shard.loss_stop.tolist() == [2, 6, 1]
    assert shard.loss_flag.tolist() == [False, True, False]
    assert (shard.facts["task"], shard.facts["tokens"], shard.facts["dtype"]) == (7, 10, "int32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000007.docs", "000007.tokens"]


def test_a_table_joins_shards_of_all_sources(tmp_path: Path) -> None:
    write(tmp_path, 0, [("a", [(2, True)]), ("b", [(3, False)])], source="x")
    write(tmp_path, 1, [], source="x")
    write(tmp_path, 2, [("a", [(4, True)]), ("c", [(1, True), (1, False)])], source="y")
    table = read_table(tmp_path, ["x", "y"], [0, 0, 1])
    assert table.source.tolist() == [0, 0, 1, 1]
    assert table.shard_first.tolist() == [0, 2, 2, 4]
    assert table.token_offset.tolist() == [0, 2, 0, 4]
    assert table.loss_document.tolist() == [1, 3, 3]
    assert [table.document_id(row) for row in range(4)] == ["a", "b", "a", "c"]
    assert len(set(table.key.tolist())) == 4  # one id in two sources is two documents


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_documents_of_one_id_have_keys_that_depend_on_nothing_but_their_content(tmp_path_factory, data) -> None:
    ids = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
    documents: list[Document] = [(name, [(index + 1, index % 3 > 0)]) for index, name in enumerate(ids)]
    tables = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("shards")
        order = data.draw(st.permutations(documents))
        cut = data.draw(st.integers(0, len(order)))
        write(folder, 0, order[:cut], count_up=False)
        write(folder, 1, order[cut:], count_up=False)
        table = read_table(folder, ["s"], [0, 0])
        assert len(set(table.key.tolist())) == len(documents)
        tables.append(dict(zip(table.length.tolist(), table.key.tolist(), strict=True)))
    assert tables[0] == tables[1]


def test_a_cut_table_and_missing_tokens_are_named(tmp_path: Path) -> None:
    write(tmp_path, 0, [("a", [(5, True)])])
    path = tmp_path / "000000.docs"
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"000000\.docs: damaged"):
            read_shard(tmp_path, 0)
    path.write_bytes(whole)
    (tmp_path / "000000.tokens").unlink()
    with pytest.raises(DataError, match=r"000000\.tokens: no such file, though its table is there"):
        read_shard(tmp_path, 0).tokens()


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write(tmp_path, 0, [("a", [(5, True)]), ("b", None)])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_more_shards_than_a_process_may_open_files(tmp_path: Path, tokenizer_folder: Path) -> None:
    """600 shards and 128 descriptors: a large corpus has more of both. Planned, packed and verified, the tokens of every shard read."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": f"{i}", "text": f"{i} the whale"}) + "\n" for i in range(600)))
    out, tools = tmp_path / "out", load_tokenizer(tokenizer_folder)
    section = DataSection(sources=(DocumentSource(name="a", path=tmp_path / "a.jsonl"),), separator_kind="none")
    job = prepare_job(out, section.sources, tools, vocab_size=512, range_bytes=30)
    run_job(job, tools)
    assert len(job.tasks) >= 600
    with few_descriptors(128):
        table = read_documents_table(job)
        make_plan(out / "plan", table, section, name="x", seed=1, seq_length=96, separator=make_separator(section, job))
        report = pack(out, "x")
        verify_data(out)
    length = sum(len(tools.encode(f"{i} the whale")) for i in range(600))
    assert len(table) == 600
    assert report.samples == length // 96


def test_documents_that_differ_only_in_the_middle_are_told_apart_too(tmp_path: Path) -> None:
    """The digest in the table covers the ends; where that is not enough the tokens are read."""
    rng = np.random.default_rng(0)
    ends = rng.integers(0, 99, 64, dtype=np.int32)
    contents = [np.concatenate([ends, rng.integers(0, 99, 50, dtype=np.int32), ends]) for _ in range(5)]
    keys = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        folder = tmp_path / "".join(map(str, order))
        folder.mkdir()
        with ShardWriter(folder, 0, np.dtype("<i4"), "s") as shard:
            for index in order:
                shard.add("one", [(contents[index], True)])
            shard.publish({})
        table = read_table(folder, ["s"], [0])
        keys.append(dict(zip(order, table.key.tolist(), strict=True)))
    assert keys[0] == keys[1]
    assert len(set(keys[0].values())) == 5
