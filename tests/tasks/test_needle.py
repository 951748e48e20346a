import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.tasks import (
    Haystack,
    make_needle_sample,
    make_shared_needles,
    needle_depths,
    needle_grid,
    solve_needle,
)
from tests.tasks.texts import LINES, PROSE, TEXT, TOKENIZERS, Bytes, farthest

HAYSTACKS = {
    name: Haystack.from_documents(["\n".join(LINES[:150]), "\n".join(LINES[150:])], TOKENIZERS[name])
    for name in ("bytes", "merges")
}
PROSES = {name: Haystack.from_documents([PROSE], tokenizer) for name, tokenizer in TOKENIZERS.items()}
LEFT = 30  # tokens of text in front that fill what the kind of a border leaves
LONGEST_LINE = {name: int(np.diff(h.line_starts).max()) for name, h in HAYSTACKS.items()}


def sample_of(name, **changes):
    wanted = {"seed": 1234, "length": 512, "depth": 0.4, "index": 0, "digits": 7, **changes}
    return make_needle_sample(HAYSTACKS[name], TOKENIZERS[name], **wanted)


def test_golden_sample_stays_as_it_is():
    """Results of different versions compare only while the same arguments give the same sample."""
    sample = sample_of("bytes")
    assert (sample.key, sample.value, sample.needle_start, sample.haystack_start) == ("wirive", "3906782", 140, 20742)
    assert hashlib.sha256(sample.tokens.astype("<i8").tobytes()).hexdigest()[:16] == "d29f637ed00e87a7"


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["bytes", "merges"]),
    seed=st.integers(0, 2**31),
    length=st.integers(120, 60_000),
    depth=st.floats(0, 1),
    index=st.integers(0, 100),
    digits=st.integers(1, 14),
    prefix=st.sampled_from([(), (65,)]),
)
def test_every_sample_is_exact_in_length_solvable_and_near_its_depth(name, seed, length, depth, index, digits, prefix):
    tokenizer = TOKENIZERS[name]
    sample = sample_of(name, seed=seed, length=length, depth=depth, index=index, digits=digits, prefix=prefix)
    assert sample.tokens.shape == (length,)
    assert tuple(sample.tokens[: len(prefix)]) == prefix

    prompt = tokenizer.decode(sample.tokens[: sample.answer_start].tolist())
    assert solve_needle(prompt) == sample.value
    assert tokenizer.decode(sample.answer.tolist()) == f" {sample.value}"
    assert len(sample.value) == digits
    assert digits > 10 or len(set(sample.value)) == digits

    needle = f"The pass key for {sample.key} is {sample.value}.\n"
    ids = tokenizer.encode(needle)
    assert sample.tokens[sample.needle_start :][: len(ids)].tolist() == ids
    before = tokenizer.decode(sample.tokens[len(prefix) : sample.needle_start].tolist())
    assert before == "" or before.endswith("\n")
    room = (
        length
        - len(prefix)
        - len(ids)
        - (length - sample.answer_start)
        - len(tokenizer.encode(f"The pass key for {sample.key} is"))
    )
    assert sample.depth == pytest.approx((sample.needle_start - len(prefix)) / room)
    assert abs(sample.depth - depth) * room <= LONGEST_LINE[name] / 2 + 1
    assert sample.unique_share == pytest.approx(min(1, len(HAYSTACKS[name].tokens) / room))


def test_a_sample_depends_on_its_arguments_alone():
    first = sample_of("bytes", index=3)
    sample_of("bytes", index=4)
    assert np.array_equal(first.tokens, sample_of("bytes", index=3).tokens)
    for change in ({"seed": 5}, {"index": 4}, {"depth": 0.6}, {"length": 511}):
        other = sample_of("bytes", **{"index": 3, **change})
        assert other.value != first.value
        assert other.haystack_start != first.haystack_start


def test_the_text_of_a_sample_runs_on_without_a_gap_and_wraps_at_the_end_of_the_haystack():
    sample = sample_of("bytes", length=len(TEXT) + 300)
    text = bytes(sample.tokens.tolist()).decode()
    needle = re.search(r"The pass key for \w+ is \d+\.\n", text)[0]
    question = text.rindex("The pass key")
    around = text.replace(needle, "", 1)[: question - len(needle)]
    assert around in TEXT * 3
    assert sample.unique_share < 1


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(TOKENIZERS)),
    seed=st.integers(0, 2**31),
    length=st.integers(400, 20_000),
    depth=st.floats(0, 1),
    index=st.integers(0, 100),
)
def test_a_sentence_needle_is_exact_in_length_solvable_and_near_its_depth(name, seed, length, depth, index):
    tokenizer, wanted = TOKENIZERS[name], {"seed": seed, "length": length, "depth": depth, "index": index, "digits": 7}
    sample = make_needle_sample(PROSES[name], tokenizer, kind="sentence", **wanted)
    assert sample.tokens.shape == (length,)
    prompt = tokenizer.decode(sample.tokens[: sample.answer_start].tolist())
    assert solve_needle(prompt) == sample.value
    assert prompt.endswith(".") is False
    assert tokenizer.decode(sample.answer.tolist()).strip() == sample.value
    assert prompt.count(sample.key) == 2
    assert abs(sample.depth - depth) * length <= farthest(PROSES[name], length, lines_only=False) + LEFT
    run = tokenizer.decode(sample.tokens[sample.needle_start : sample.needle_start + 60].tolist())
    assert run.lstrip(" ").startswith(sample.key)


def test_a_sentence_needle_stands_between_two_sentences_and_leaves_the_text_as_it_was():
    places = set()
    for index in range(60):
        wanted = {"seed": 2, "length": 3000, "depth": 0.3 + index / 200, "index": index, "digits": 7}
        sample = make_needle_sample(PROSES["bytes"], Bytes(), kind="sentence", **wanted)
        text = bytes(sample.tokens.tolist()).decode()
        fact = re.search(rf"( ?){sample.key}[a-z ]+ {sample.value}\.(\n?)", text)
        assert (fact[1], fact[2]) in ((" ", ""), ("", "\n"))
        assert text[: fact.start()].endswith("." if fact[1] else "\n")
        places.add(fact[1])
        question = text.rindex(sample.key)
        assert text[: fact.start()] + text[fact.end() : question] in PROSE * 2
    assert " " in places


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(TOKENIZERS)),
    kind=st.sampled_from(["passkey", "sentence"]),
    seed=st.integers(0, 2**31),
    length=st.integers(1800, 20_000),
    count=st.integers(1, 11),
    prefix=st.sampled_from([(), (65,)]),
)
def test_shared_needles_share_a_text_and_each_is_answered_in_it_once(name, kind, seed, length, count, prefix):
    tokenizer = TOKENIZERS[name]
    depths = needle_depths(count)
    room = 45 * count + LEFT  # the needles are tokens, too, and depths are those of the text alone
    wanted = {"seed": seed, "length": length, "index": 0, "digits": 5, "kind": kind, "prefix": prefix}
    shared = make_shared_needles(PROSES[name], tokenizer, depths=depths, **wanted)
    assert len(shared.tokens) + max(len(needle.suffix) for needle in shared.needles) == length
    assert tuple(shared.tokens[: len(prefix)]) == prefix
    assert len({needle.key for needle in shared.needles}) == len({needle.value for needle in shared.needles}) == count
    for needle, depth in zip(shared.needles, depths, strict=True):
        asked = tokenizer.decode([*shared.tokens.tolist(), *needle.suffix[: needle.answer_start].tolist()])
        assert solve_needle(asked) == needle.value
        assert tokenizer.decode(needle.answer.tolist()).strip() == needle.value
        assert (
            abs(needle.depth - depth) * len(shared.tokens) <= farthest(PROSES[name], length, lines_only=kind == "passkey") + room
        )
        after = tokenizer.decode(shared.tokens[needle.needle_start : needle.needle_start + 80].tolist())
        assert needle.value in after
        assert after.index(needle.key) < after.index(needle.value)
    starts = [needle.needle_start for needle in shared.needles]
    assert starts == sorted(starts)
    assert len(set(starts)) == count


def test_no_two_needle_samples_share_needle_and_place():
    for kind in ("passkey", "sentence"):
        made = [
            make_needle_sample(PROSES["bytes"], Bytes(), seed=seed, length=600, depth=depth, index=index, digits=7, kind=kind)
            for seed in (1, 2)
            for depth in needle_depths(5)
            for index in range(40)
        ]
        assert len({(each.key, each.value, each.needle_start, each.haystack_start) for each in made}) == len(made)
        assert len({(each.key, each.value) for each in made}) == len(made)


def test_what_does_not_fit_is_refused():
    wanted = {"seed": 1, "index": 0, "kind": "passkey"}
    with pytest.raises(
        ConfigError, match=r"one text with 11 needles of 7 digits needs more than [\d,]+ tokens, the length is 300"
    ):
        make_shared_needles(PROSES["bytes"], Bytes(), length=300, depths=needle_depths(11), digits=7, **wanted)
    with pytest.raises(ConfigError, match="1 digits are too few for 11 needles with different values"):
        make_shared_needles(PROSES["bytes"], Bytes(), length=9000, depths=needle_depths(11), digits=1, **wanted)
    with pytest.raises(ConfigError, match=r"a needle sample needs more than \d+ tokens, the length is 60; use longer lengths$"):
        make_needle_sample(PROSES["bytes"], Bytes(), seed=1, length=60, depth=0, index=0, digits=7, kind="sentence")


def test_a_tokenizer_that_loses_a_needle_is_refused():
    class Swallows(Bytes):
        def decode(self, ids):
            return super().decode(ids).replace("The pass key", "the pass key")

    with pytest.raises(DataError, match=r"the tokenizer reads .* where 'The pass key for"):
        make_needle_sample(HAYSTACKS["bytes"], Swallows(), seed=1, length=512, depth=0.5, index=0, digits=3)


def test_the_question_begins_a_line():
    for index in range(20):
        sample = sample_of("merges", index=index)
        prompt = TOKENIZERS["merges"].decode(sample.tokens[: sample.answer_start].tolist())
        assert prompt[: prompt.rindex("The pass key")].endswith("\n")


def test_depths_and_grid_go_from_start_to_end_and_from_short_to_long():
    assert needle_depths(6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert needle_depths(1) == [0.5]
    grid = list(needle_grid([1024, 512], 2, 2))
    assert grid[:4] == [(512, 0.0, 0), (512, 0.0, 1), (512, 1.0, 0), (512, 1.0, 1)]
    assert len(grid) == len(set(grid)) == 8


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("no question", "does not end in a question"),
        ("The pass key for dolu is 12.\nThe pass key for doli is", "0 answers for 'doli'"),
        ("The pass key for dolu is 12.\nThe pass key for dolu is 13.\nThe pass key for dolu is", "2 answers for 'dolu'"),
    ],
)
def test_the_solver_refuses_what_has_no_single_answer(prompt, message):
    with pytest.raises(ValueError, match=message):
        solve_needle(prompt)


def test_too_short_a_length_is_refused():
    with pytest.raises(ConfigError, match=r"a needle sample of 7 digits needs more than \d+ tokens, the length is 40"):
        sample_of("bytes", length=40)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "holds no text"),
        (["", "\n"], "holds no text"),
        (["a line\nThe pass key for dolu is 1.\n"], "answers would not be unique"),
    ],
)
def test_a_useless_haystack_is_refused(documents, message):
    with pytest.raises(DataError, match=message):
        Haystack.from_documents(documents, Bytes(), where="held-out.txt")


def test_a_tokenizer_that_joins_question_and_answer_is_refused():
    class Joins(Bytes):
        def encode(self, text):
            return [1] if re.search(r" is \d+$", text) else super().encode(text)

    with pytest.raises(DataError, match=r"joins the end of .* with the beginning of"):
        make_needle_sample(HAYSTACKS["bytes"], Joins(), seed=1, length=512, depth=0.5, index=0, digits=3)


def test_a_tokenizer_without_newlines_is_refused():
    class NoLines(Bytes):
        def decode(self, ids):
            return super().decode(ids).replace("\n", " ")

    with pytest.raises(DataError, match="needles need line starts"):
        Haystack.from_documents(["one\ntwo\n"], NoLines())
