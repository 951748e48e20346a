import mmap
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import DataError, StorageError
from mcore_longctx.tasks import Haystack, cached_haystack, make_needle_sample, open_haystack
from mcore_longctx.tasks.tokens import encode_after, encode_lines
from tests.tasks.texts import PROSE, TEXT, TOKENIZERS, Bytes

DOCUMENTS = [PROSE[: len(PROSE) // 2], PROSE[len(PROSE) // 2 :]]
KEY = {"tokenizer_sha256": "a" * 64}


def cached(folder, documents=DOCUMENTS, tokenizer=TOKENIZERS["llama3"], **changes):
    return cached_haystack(documents, tokenizer, folder=folder, **{**KEY, **changes})


def equal(first, second):
    fields = ("tokens", "line_starts", "sentence_starts")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in fields)


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from("ab. \n"), min_size=1, max_size=40).map("".join),
    start=st.integers(0, 10**6),
    count=st.integers(1, 150),
)
def test_a_cut_is_the_ring_token_by_token_and_ends_with_a_line(text, start, count):
    haystack = Haystack.from_documents(["x" + text], Bytes())
    whole = "x" + text if text.endswith("\n") else "x" + text + "\n"
    ring, start = whole * (3 + count // len(whole) + 1), start % len(whole)
    end = ring.index("\n", start + count - 1) + 1
    cut = haystack.cut(start, count)
    stretch = ring[end - count : end] if end - count >= 0 else ring[len(whole) + end - count : len(whole) + end]
    assert bytes(cut.tokens.tolist()).decode() == stretch
    assert cut.line_starts.tolist() == [0, *[i + 1 for i in range(count) if stretch[i] == "\n"]]
    assert cut.sentence_starts.tolist() == [i for i in range(1, count) if stretch[i - 1 : i + 1] == ". "]


@pytest.mark.parametrize("name", ["bytes", "merges", "llama3"])
def test_tokens_put_at_a_border_are_those_of_the_edited_text(name):
    tokenizer = TOKENIZERS[name]
    haystack = Haystack.from_documents([PROSE], tokenizer)
    tokens = haystack.tokens.tolist()
    sentence = "The secret number of dolu-zeka is 4829137."
    kinds = {" " + sentence: (haystack.sentence_starts, "."), sentence + "\n": (haystack.line_starts, "\n")}
    for text, (borders, before) in kinds.items():
        run = encode_after(tokenizer, before, text).tolist()
        assert len(borders) > 100
        for place in borders[:: max(1, len(borders) // 80)].tolist():
            around = slice(max(0, place - 400), place), slice(place, place + 400)
            left, right = tokenizer.decode(tokens[around[0]]), tokenizer.decode(tokens[around[1]])
            if tokenizer.encode(left) + tokenizer.encode(right) != tokens[around[0].start : around[1].stop]:
                continue  # the window cuts a word
            assert tokenizer.encode(left + text + right) == tokens[around[0]] + run + tokens[around[1]]


def test_llama_2_needs_no_borders_of_sentences_and_reads_right():
    """Its tokenizer puts a space before every text: pieces are encoded behind what they follow."""
    tokenizer = TOKENIZERS["llama2"]
    run = encode_after(tokenizer, "\n", "The next line.\n").tolist()
    assert tokenizer.decode([*tokenizer.encode("One line.\n"), *run]) == "One line.\nThe next line.\n"


def test_lines_are_taken_apart_where_they_end():
    lines = ["one", "two words.", "3 and 4", "x"] * 50
    for tokenizer in TOKENIZERS.values():
        found = encode_lines(tokenizer, lines)
        for i, line in enumerate(lines[:8]):
            run = found.tokens[found.starts[i] : found.ends[i]].tolist()
            assert run == encode_after(tokenizer, "\n", line + "\n").tolist()


def test_a_tokenizer_that_joins_lines_is_refused():
    class Joins(Bytes):
        def encode(self, text):
            return [{10: 300}.get(byte, byte) for byte in text.replace("\n", "\n~").encode()][
                : -1 if text.endswith("\n") else None
            ]

        def decode(self, ids):
            return "".join("|" if token == 300 else chr(token) for token in ids)

    with pytest.raises(DataError, match="0 ends of line of 2 lines: lines cannot be taken apart"):
        encode_lines(Joins(), ["a", "b"])


# ------------------------------------------------------------------------------------------------------------------ the cache


def test_the_cached_haystack_is_the_one_made_in_memory_mapped_and_made_once(tmp_path):
    class Once:
        encoded = 0

        def encode(self, text):
            self.encoded += len(text)
            return TOKENIZERS["llama3"].encode(text)

        decode = TOKENIZERS["llama3"].decode

    tokenizer = Once()
    first = cached(tmp_path, tokenizer=tokenizer)
    assert tokenizer.encoded >= len(PROSE)
    tokenizer.encoded = 0
    second = cached(tmp_path, tokenizer=tokenizer)
    assert tokenizer.encoded == 0
    fresh = Haystack.from_documents(DOCUMENTS, TOKENIZERS["llama3"])
    assert equal(first, fresh)
    assert equal(second, fresh)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("haystack-")
    assert isinstance(second.tokens.base.obj, mmap.mmap)
    assert not second.tokens.flags.writeable
    for kind in ("passkey", "sentence"):
        wanted = {"seed": 1, "length": 900, "depth": 0.5, "index": 0, "digits": 7, "kind": kind}
        made = [make_needle_sample(each, TOKENIZERS["llama3"], **wanted).tokens for each in (fresh, second)]
        assert np.array_equal(*made)


def test_another_text_another_cut_into_documents_or_another_tokenizer_is_another_file(tmp_path):
    cached(tmp_path)
    for documents in ([PROSE], DOCUMENTS[::-1], [*DOCUMENTS, "more"]):
        before = len(list(tmp_path.iterdir()))
        cached(tmp_path, documents)
        assert len(list(tmp_path.iterdir())) == before + 1
    cached(tmp_path, tokenizer_sha256="b" * 64)
    assert len(list(tmp_path.iterdir())) == 5


def damages(raw):
    half = len(raw) // 2
    flips = [0, 9, 13, 17, 25, 33, 41, 50, 64, 70, half, len(raw) - 9, len(raw) - 1]
    yield from (raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :] for at in flips)
    yield from (b"", raw[:30], raw[:64], raw[:half], raw[:-1], raw + b"\0", bytes(len(raw)))


def test_any_damage_is_noticed_and_the_file_is_made_again(tmp_path):
    whole = cached(tmp_path)
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    for bad in damages(raw):
        path.unlink()  # the mapping keeps the old file
        path.write_bytes(bad)
        with pytest.raises(DataError, match="damaged: "):
            open_haystack(path)
        said = []
        assert equal(cached(tmp_path, say=said.append), whole)
        assert len(said) == 1
        assert said[0].startswith(f"{path}: damaged: ")
        assert said[0].endswith("; it is made again")
        assert path.read_bytes() == raw
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_of_another_haystack_is_noticed(tmp_path):
    cached(tmp_path)
    (path,) = tmp_path.iterdir()
    cached(tmp_path, [TEXT])
    (other,) = set(tmp_path.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=f"damaged: it is a copy of {other.name}"):
        open_haystack(path)


def test_processes_that_make_it_at_once_make_one_file(tmp_path):
    program = (
        "import sys, pathlib, time\n"
        "from tests.tasks.test_haystack import cached\n"
        "go = pathlib.Path(sys.argv[1]) / 'go'\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): time.sleep(0.002)\n"
        "print(len(cached(pathlib.Path(sys.argv[1]) / 'cache').tokens))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = str(Path(__file__).parents[2])
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(3)]
    try:
        assert [process.stdout.readline() for process in running] == ["ready\n"] * 3
        (tmp_path / "go").touch()
        found = [process.communicate(timeout=60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
            process.stdout.close()
    whole = Haystack.from_documents(DOCUMENTS, TOKENIZERS["llama3"])
    assert found == [f"{len(whole.tokens)}\n"] * 3
    (path,) = (tmp_path / "cache").iterdir()
    assert equal(open_haystack(path), whole)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: cannot be written \(File exists\)"):
        cached(tmp_path / "file")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    cached(tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=r"\.tokens: cannot be read \(Is a directory\)"):
        cached(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device\)"):
        cached(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stem", ["The pass key for", "The secret number of", "The secret code of"])
def test_a_text_with_sentences_of_a_task_is_refused(stem):
    with pytest.raises(DataError, match=f"corpus: the haystack holds the words '{stem}': its answers would not be unique"):
        Haystack.from_documents(["fine\n", f"a line\n{stem} dolu is 1.\n"], Bytes(), where="corpus")


def test_four_million_tokens_take_a_copy_and_little_memory(tmp_path):
    """The target is 2 s and 200 MB. CPU-seconds and traced bytes, so that a busy machine does not decide."""
    unit = np.frombuffer((PROSE[:5000].rsplit("\n", 1)[0] + "\n").encode(), np.uint8).astype(np.int32)
    once = Haystack.from_documents([bytes(unit.tolist()).decode()], Bytes())
    turns = 1_500_000 // len(unit)  # the ring is shorter than the sample: it goes round
    shifts = np.arange(turns)[:, None] * len(unit)
    haystack = Haystack(np.tile(unit, turns), (shifts + once.line_starts).ravel(), (shifts + once.sentence_starts).ravel())
    tracemalloc.start()
    began = time.process_time()
    sample = make_needle_sample(haystack, Bytes(), seed=1, length=1 << 22, depth=0.37, index=0, digits=7, kind="sentence")
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(sample.tokens) == 1 << 22
    assert abs(sample.depth - 0.37) < 1e-4
    assert sample.unique_share == pytest.approx(len(haystack.tokens) / (1 << 22), rel=1e-3)
    assert seconds < 2
    assert peak < 200e6
