import functools
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.tasks import (
    RULER_TASKS,
    Haystack,
    RulerTexts,
    check_ruler_tasks,
    make_ruler_sample,
    ruler_minimum_length,
    score_ruler,
    solve_ruler,
)
from tests.tasks.texts import PROSE, TEXT, TOKENIZERS, Bytes

TEXTS = {name: RulerTexts(Haystack.from_documents([PROSE], tokenizer)) for name, tokenizer in TOKENIZERS.items()}
NEEDLE_TASKS = [task for task in RULER_TASKS if task.startswith("niah")]
TEXT_TASKS = [task for task in NEEDLE_TASKS if task not in ("niah_single_1", "niah_multikey_2", "niah_multikey_3")]
MADE_OF_LINES = ["niah_multikey_2", "niah_multikey_3", "cwe", "fwe", "qa_1", "qa_2"]
RESERVES = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@functools.cache
def least_length(task, name):
    return ruler_minimum_length(task, TOKENIZERS[name])


def make(task, name="bytes", **changes):
    texts = changes.pop("texts", TEXTS[name])
    return make_ruler_sample(task, texts, TOKENIZERS[name], **{"seed": 1234, "length": 4096, "index": 0, **changes})


def read(sample, name="bytes"):
    return TOKENIZERS[name].decode(sample.tokens.tolist())


def digest(sample):
    facts = [sample.expected, sample.match, sample.reserve, sample.needle_starts, sample.haystack_start, sample.unique_share]
    whole = hashlib.sha256(repr(facts).encode())
    whole.update(sample.tokens.astype("<i8").tobytes() + sample.answer.astype("<i8").tobytes())
    return whole.hexdigest()[:16]


def test_there_are_the_13_tasks_of_ruler():
    kinds = ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"]
    assert (*(f"niah_{kind}" for kind in kinds), "vt", "cwe", "fwe", "qa_1", "qa_2") == RULER_TASKS


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize("task", RULER_TASKS)
def test_the_solver_finds_the_reference_in_the_rendered_prompt(task, name):
    rng = random.Random(task + name)
    tokenizer = TOKENIZERS[name]
    for _ in range(8):
        least = least_length(task, name)
        length = round(math.exp(rng.uniform(math.log(least), math.log(24_000))))
        prefix = rng.choice([(), (5,)])
        sample = make(task, name, seed=rng.randrange(2**31), length=length + len(prefix), index=rng.randrange(100), prefix=prefix)
        assert tuple(sample.tokens[: len(prefix)]) == prefix
        assert solve_ruler(task, tokenizer.decode(sample.tokens[len(prefix) :].tolist())) == sample.expected
        assert tokenizer.decode(sample.answer.tolist()).strip() == ", ".join(sample.expected)
        assert len(sample.tokens) + sample.reserve <= length + len(prefix)
        assert sample.reserve >= max(len(sample.answer), RESERVES.get(task, 128))
        assert sample.tokens.dtype == sample.answer.dtype == np.int64
        assert sample.match == ("any" if task.startswith("qa") else "all")


@pytest.mark.parametrize("task", RULER_TASKS)
def test_prompt_and_reserve_fill_the_length(task):
    for name in ("bytes", "llama3"):
        for index in range(2):
            sample = make(task, name, length=32768, index=index)
            assert 0.993 * 32768 <= len(sample.tokens) + sample.reserve <= 32768


@pytest.mark.parametrize("task", RULER_TASKS)
def test_at_its_least_length_every_sample_is_made_and_below_it_the_error_says_it(task):
    for name in ("bytes", "llama3"):
        least = least_length(task, name)
        for index in range(40):
            sample = make(task, name, seed=99, length=least, index=index)
            assert solve_ruler(task, read(sample, name)) == sample.expected
        with pytest.raises(ConfigError) as error:
            make(task, name, length=300)
        line = f"evaluate.ruler.lengths: {task} needs at least {least:,} tokens with this tokenizer, the length is 300; "
        assert str(error.value) == line + "use longer lengths, or leave the task out"
        assert ruler_minimum_length(task, TOKENIZERS[name], (1, 2, 3)) >= least + 3


def test_every_task_fits_the_tiny_model():
    assert max(least_length(task, "bytes") for task in RULER_TASKS) < 2048


@pytest.mark.parametrize(("name", "near"), [("niah_singel_2", "niah_single_2"), ("vt_1", "vt"), ("cwee", "cwe"), ("qa2", "qa_2")])
def test_an_unknown_task_gets_the_nearest_name(name, near):
    for call in (lambda: make(name), lambda: check_ruler_tasks(["vt", name]), lambda: solve_ruler(name, "")):
        with pytest.raises(ConfigError, match=f"evaluate.ruler.tasks: unknown task '{name}'; did you mean '{near}'"):
            call()
    with pytest.raises(ConfigError, match="did you mean"):
        check_ruler_tasks(["\u2603"])


GOLDEN = {
    "niah_single_1": "72ce221a78eea8fd",
    "niah_single_2": "314b7334bc6b24da",
    "niah_single_3": "8612e84eac8ab3e7",
    "niah_multikey_1": "d898aa07024165a3",
    "niah_multikey_2": "66ded80f4d8aae10",
    "niah_multikey_3": "9f330efb13af3d39",
    "niah_multivalue": "fdb2e9b653f378e8",
    "niah_multiquery": "5fbb79f53a5b836a",
    "vt": "66b5ce1985118c51",
    "cwe": "e225251ef2bd4150",
    "fwe": "96aa01e383fa5f76",
    "qa_1": "83a3280192f33455",
    "qa_2": "f1e7801c6c38ef49",
}


@pytest.mark.parametrize("task", RULER_TASKS)
def test_golden_samples_stay_as_they_are(task):
    """Results of different versions compare only while the same arguments give the same sample."""
    assert digest(make(task)) == GOLDEN[task]


def test_two_processes_make_the_same_bytes():
    program = (
        "import json\n"
        "from tests.tasks.test_ruler import RULER_TASKS, digest, make\n"
        "print(json.dumps({t: digest(make(t, n, index=3)) for t in RULER_TASKS for n in ['llama3']}))\n"
    )
    there = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        root = str(Path(__file__).parents[2])
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120, cwd=root, env=environment
        )
        there.append(json.loads(ran.stdout))
    here = {task: digest(make(task, "llama3", index=3)) for task in RULER_TASKS}
    assert there == [here, here]


@pytest.mark.parametrize("task", RULER_TASKS)
def test_a_sample_depends_on_its_arguments_alone_and_on_each(task):
    first = digest(make(task, index=3))
    make(task, index=4)
    assert digest(make(task, index=3)) == first
    others = [digest(make(task, **{"index": 3, **change})) for change in ({"seed": 5}, {"index": 4}, {"length": 4095})]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("task", RULER_TASKS)
def test_no_two_samples_share_needle_and_place(task):
    """Nor needle alone: a model that learned one sample's answer learned no other's."""
    made = [
        make(task, seed=seed, length=length, index=index)
        for seed in (1, 2)
        for length in (least_length(task, "bytes"), 2 * least_length(task, "bytes"))
        for index in range(25)
    ]
    places = {(needle_of(each), each.needle_starts, each.haystack_start) for each in made}
    assert len(places) == len(made)
    assert len({needle_of(each) for each in made}) == len(made)
    if task in TEXT_TASKS:
        assert len({each.haystack_start for each in made}) > 0.95 * len(made)
    if task not in ("vt", "cwe", "fwe"):
        assert max(each.depths[0] for each in made) > 0.6 > 0.4 > min(each.depths[0] for each in made)


def needle_of(sample):
    """What is hidden: the answer, and for a paragraph its first tokens (trades and years are few)."""
    return sample.expected, tuple(tuple(sample.tokens[start : start + 40].tolist()) for start in sample.needle_starts)


# ------------------------------------------------------------------------------------------------------------------ by kind


@settings(max_examples=40, deadline=None)
@given(
    task=st.sampled_from(NEEDLE_TASKS),
    name=st.sampled_from(list(TOKENIZERS)),
    seed=st.integers(0, 2**31),
    length=st.integers(1000, 12_000),
)
def test_needles_stand_where_the_sample_says(task, name, seed, length):
    sample = make(task, name, seed=seed, length=length)
    assert len(sample.needle_starts) == len(sample.depths) == len(sample.expected)
    tokenizer = TOKENIZERS[name]
    for start, depth, value in zip(sample.needle_starts, sample.depths, sample.expected, strict=True):
        after = tokenizer.decode(sample.tokens[start : start + 150].tolist())
        needle = re.match(r" ?The secret (?:number|code) of \S+ is (\S+)\.", after)
        assert needle[1] == value
        assert 0 <= depth <= 1
        assert abs(depth - start / len(sample.tokens)) < 0.45  # instruction, question and other needles are not text
    if task == "niah_multivalue":
        assert list(sample.needle_starts) == sorted(sample.needle_starts)


def test_needles_of_a_text_stand_between_its_sentences():
    """Without the needles the prompt reads as the haystack, and a needle begins where a sentence or a line does."""
    ring = 2 * (PROSE if PROSE.endswith("\n") else PROSE + "\n")
    for task in TEXT_TASKS:
        for index in range(4):
            text = read(make(task, length=6000, index=index))
            body = text[text.index("\n") + 1 : text.index("\nWhich secret") + 1]
            without = re.sub(r" The secret \w+ of \S+ is \S+?\.(?= )|(?<![^\n])The secret \w+ of \S+ is \S+?\.\n", "", body)
            assert "secret" not in without
            assert without in ring
            assert len(without) > 4000


@pytest.mark.parametrize("task", MADE_OF_LINES)
def test_what_is_made_of_pieces_is_tokenized_as_the_whole_text_is(task):
    for name in ("bytes", "merges", "llama3", "llama2"):
        sample = make(task, name, length=8192, index=2)
        assert TOKENIZERS[name].encode(read(sample, name)) == sample.tokens.tolist()


def test_odd_samples_read_code_where_there_is_code():
    code = Haystack.from_documents(["def f(x):\n    return x + 1  # CODE\n" * 400], Bytes())
    texts = RulerTexts(TEXTS["bytes"].haystack, code)
    for task in TEXT_TASKS:
        assert ["CODE" in read(make(task, texts=texts, index=index)) for index in range(4)] == [False, True, False, True]
        assert solve_ruler(task, read(make(task, texts=texts, index=1))) == make(task, texts=texts, index=1).expected
    assert "CODE" not in read(make("qa_1", texts=texts, index=1))


def test_a_haystack_that_is_too_small_repeats_and_says_how_much():
    small = RulerTexts(Haystack.from_documents([TEXT[:1000]], Bytes()))
    sample = make("niah_single_2", texts=small, length=8192)
    text = read(sample)
    body = text[text.index("\n") + 1 : text.index("Which secret")]
    tokens_of_text = len(body) - len(f"The secret number of abcdef-abcdef is {sample.expected[0]}. ")
    assert sample.unique_share == pytest.approx(len(small.haystack.tokens) / tokens_of_text, rel=1e-3)
    assert 0.1 < sample.unique_share < 0.2
    assert make("niah_single_2", length=8192).unique_share == 1
    noise = make("niah_single_1", length=8192)
    line = re.search(r"\n(The rain is soft\.[^\n]*\n)", read(noise))[1]
    assert noise.unique_share == pytest.approx(len(line) / 8192, rel=0.1)


def test_common_words_occur_as_often_as_in_ruler_and_others_less():
    for length, often, seldom in ((32768, 30, 3), (3000, 6, 1)):
        sample = make("cwe", length=length)
        text = read(sample)
        body = text[text.index("Now the list") : text.index("\nWhich", text.index("Now the list"))]
        counts = Counter(line.split()[1] for line in body.splitlines()[1:])
        assert {word: counts.pop(word) for word in sample.expected} == dict.fromkeys(sample.expected, often)
        assert set(counts.values()) == {seldom}
        assert list(sample.expected) == sorted(sample.expected)
        assert len(sample.expected) == 10


def test_coded_words_fall_with_the_square_of_their_rank():
    sample = make("fwe", length=32768)
    counts = Counter(read(sample).split("\nWhich")[0].split("Coded text:")[1].split())
    words = sum(counts.values())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..."
    assert tuple(ranked[1:4]) == sample.expected
    for rank, word in enumerate(ranked[:8], 1):
        assert counts[word] == pytest.approx(words / rank**2 / (math.pi**2 / 6), rel=0.03)
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])


def test_a_chain_is_set_in_its_order_behind_an_example():
    sample = make("vt")
    text = read(sample).split("\n\n")[1]
    names, sources = zip(*re.findall(r"^Set ([A-Z]{5}) to (\w+)\.$", text, re.MULTILINE), strict=True)
    assert names == sample.expected
    assert sources[1:] == names[:-1]
    assert text.splitlines()[-2].startswith(f"Which names stand for {sources[0]} ")
    assert list(sample.needle_starts) == sorted(sample.needle_starts)
    for start, name in zip(sample.needle_starts, names, strict=True):
        assert bytes(sample.tokens[start : start + 9].tolist()).decode() == f"Set {name}"


def test_two_hops_need_two_paragraphs():
    asked = set()
    for index in range(30):
        sample = make("qa_2", index=index)
        text = read(sample)
        who = re.search(r"employer of ([A-Z]\w+ [A-Z]\w+)", text)[1]
        own = re.search(rf"^About {who}: (.*)$", text, re.MULTILINE)[1]
        assert not re.search(rf"\b{sample.expected[0]}\b", own)
        asked.add(text[text.rindex("in a word. ") : text.rindex("employer")])
        assert len(sample.needle_starts) == 2
        for start, name in zip(sample.needle_starts, (who, None), strict=True):
            line = bytes(sample.tokens[start : start + 60].tolist()).decode()
            assert line.startswith(f"About {name}" if name else "About ")
    assert len(asked) == 3


def test_a_question_shares_no_words_with_its_paragraph_but_the_name():
    for index in range(30):
        text = read(make("qa_1", index=index))
        question = text[text.rindex("in a word. ") + 11 : text.rindex("\n")]
        who = re.search(r"[A-Z]\w+ [A-Z]\w+", question)[0]
        paragraph = re.search(rf"^About {who}: (.*)$", text, re.MULTILINE)[1]
        little = {"is", "the", "of", "in", "a", "was", *who.split()}
        assert not (set(re.findall(r"\w+", question)) & set(re.findall(r"\w+", paragraph))) - little


# ------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("niah_single_2", lambda t: t.replace("The secret number", "A secret number"), "0 values of"),
        ("niah_single_2", lambda t: t.replace("\nWhich", " " + re.search(r"The secret.*?\.", t)[0] + "\nWhich"), "2 values of"),
        ("niah_multivalue", lambda t: re.sub(r"The secret number of \S+ is \d+\.", "", t, count=1), "3 values of"),
        ("niah_multikey_3", lambda t: t[:-5], "does not end in a question"),
        ("vt", lambda t: t[:-5], "does not end in a question"),
        ("vt", lambda t: t.replace("\nWhich", "\n" + re.findall(r"Set \w{5} to .*", t)[0] + "\nWhich"), "is set twice"),
        ("cwe", lambda t: t[:-5], "does not end in the question"),
        ("cwe", lambda t: re.sub(r"\n7 (\w+)(?=\n8 )", r"\n6 \1", t), "not numbered from 1 on"),
        ("fwe", lambda t: t[:-5], "does not end in the question"),
        ("qa_1", lambda t: t[:-5], "does not end in a question"),
        ("qa_2", lambda t: t.replace("About ", "On "), "0 paragraphs about"),
    ],
)
def test_the_solver_refuses_what_has_no_single_answer(task, change, message):
    text = read(make(task))
    with pytest.raises(ValueError, match=message):
        solve_ruler(task, change(text))


def test_the_solver_refuses_words_that_are_equally_frequent():
    text = read(make("fwe"))
    first, second, _ = make("fwe").expected
    counts = Counter(text.split())
    even = text.replace("\nWhich", f" {second}" * (counts[first] - counts[second]) + "\nWhich", 1)
    with pytest.raises(ValueError, match="rank 1 is not more frequent than the next"):
        solve_ruler("fwe", even)
    text = read(make("cwe"))
    word = make("cwe").expected[0]
    head, body = text[: text.index("Now the list")], text[text.index("Now the list") :]
    fresh = iter(f"zzzz{letter}" for letter in "abcdefgh"[: body.count(f" {word}\n") - 1])
    fewer = re.sub(rf" {word}\n", lambda match: f" {next(fresh, word)}\n", body)
    with pytest.raises(ValueError, match="rank 10 is not more frequent than the next"):
        solve_ruler("cwe", head + fewer)


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused():
    class Joins(Bytes):
        def encode(self, text):
            return [1] if re.search(r"(?:is|are|namely|:) [^\n]+$", text) and "Answer" in text else super().encode(text)

    for task in RULER_TASKS:
        with pytest.raises(DataError, match=r"joins the end of .* with the beginning of"):
            make_ruler_sample(task, TEXTS["bytes"], Joins(), seed=1, length=4096, index=0)


def test_answers_that_drift_with_what_stands_before_the_question_are_refused():
    class Drifts(Bytes):
        """Two ids for the digit at the end of a text, by the parity of its length."""

        def encode(self, text):
            ids = super().encode(text)
            if text.startswith("\nWhich") and ids[-1:] and chr(ids[-1]).isdigit():
                ids[-1] += 200
            return ids

        def decode(self, ids):
            return super().decode([token - 200 if token > 240 else token for token in ids])

    with pytest.raises(DataError, match="drift with what stands before the question: the answer cannot be scored"):
        make_ruler_sample("niah_single_2", TEXTS["bytes"], Drifts(), seed=1, length=4096, index=0)


def test_a_tokenizer_that_joins_the_words_of_a_list_is_refused():
    class Pairs(Bytes):
        """Joins a letter with the space and the letter behind it."""

        def encode(self, text):
            return [ord(each) if len(each) == 1 else 300 for each in re.findall(r"(?<=[a-z]) [a-z](?=[a-z]{5} )|[\s\S]", text)]

        def decode(self, ids):
            return "".join("??" if token == 300 else chr(token) for token in ids)

    with pytest.raises(DataError, match=r"joins words of .* the list cannot be made of pieces|joins the end of"):
        make_ruler_sample("fwe", TEXTS["bytes"], Pairs(), seed=1, length=4096, index=0)


@pytest.mark.parametrize(
    ("expected", "match", "output", "score"),
    [
        (("12", "34"), "all", "12 and 34", 1.0),
        (("12", "34"), "all", "12", 0.5),
        (("12", "34"), "all", "", 0.0),
        (("12", "34", "56"), "all", "56 12", 2 / 3),
        (("Tiro", "tiro town"), "any", "in TIRO.", 1.0),
        (("Tiro",), "any", "Tir", 0.0),
        (("kelo-Wa",), "all", "KELO-wa", 1.0),
    ],
)
def test_the_score_is_the_share_of_references_in_the_output(expected, match, output, score):
    assert score_ruler(expected, match, output) == pytest.approx(score)
