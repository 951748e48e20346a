"""Documents of a sample cut and spread over it: CIP and UtK, against a slow second implementation and by their laws."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.data.files.sidecar import LITERAL, PADDING
from mcore_longctx.data.methods.augment import Augmenter, is_chosen
from mcore_longctx.data.methods.labels import LabelLayout, make_labels
from mcore_longctx.errors import DataError
from mcore_longctx.recipe.data import AugmentSection
from tests.data.reference_augment import Token, parts_of, reference_augment


class Characters:
    """A tokenizer of one id a character, with some reserved tokens."""

    def __init__(self, reserved: int = 0) -> None:
        self.reserved = reserved

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) for letter in text], np.int32)

    def control_id(self, text: str) -> int | None:
        number = text.removeprefix("<|reserved_special_token_").removesuffix("|>")
        return 1000 + int(number) if number.isdigit() and int(number) < self.reserved else None


def labels_of(how: AugmentSection, base: int, count: int = 1024, reserved: int = 0) -> tuple[LabelLayout, list[int]]:
    layout, literals = make_labels(Characters(reserved), cuts=max(how.chunks) - 1, count=count, base=base, where="here")
    return layout, literals.tolist()


def columns_of(samples: Sequence[Sequence[Token]], rng: random.Random | None = None) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Tokens as runs; some runs are cut in two for no reason."""
    rows, first = [], [0]
    for sample in samples:
        last = None
        for token in sample:
            if token[0] == "document":
                row = (token[1], token[2], token[3])
            else:
                row = (LITERAL, token[1], token[2]) if token[0] == "literal" else (PADDING, 0, False)
            ongoing = last is not None and row[0] == last[0] and row[2] == last[2]
            ongoing = (
                ongoing and (row[0] == PADDING or row[1] == last[1] + 1) and not (rng and row[0] >= 0 and rng.random() < 0.1)
            )
            if ongoing:
                rows[-1][2] += 1
            else:
                rows.append([row[0], row[1], 1, row[2]])
            last = row
        first.append(len(rows))
    document, start, length, loss = zip(*rows, strict=True)
    columns = (np.array(document), np.array(start), np.array(length, np.int32), np.array(loss, np.bool_))
    return columns, np.array(first)


def tokens_of(columns: tuple[np.ndarray, ...], first_run: np.ndarray) -> list[list[Token]]:
    samples = []
    for low, high in zip(first_run[:-1].tolist(), first_run[1:].tolist(), strict=True):
        tokens: list[Token] = []
        for document, start, length, loss in zip(*(column[low:high].tolist() for column in columns), strict=True):
            assert length > 0
            if document >= 0:
                tokens += [("document", document, start + i, loss) for i in range(length)]
            elif document == LITERAL:
                tokens += [("literal", start + i, loss) for i in range(length)]
            else:
                assert start == 0
                tokens += [("padding",)] * length
        samples.append(tokens)
    return samples


def make_samples(rng: random.Random, *, samples: int, seq_length: int, begin: int, end: int, padded: bool) -> list[list[Token]]:
    """A stream of documents with what begins and ends them, cut in samples; or whole ones in samples with padding behind them."""
    found: list[list[Token]] = []
    stream: list[Token] = []
    while len(found) < samples:
        start = rng.choice([0, 0, 3])
        number, loss, piece = rng.randrange(6), True, []
        for position in range(start, start + rng.choice([1, 2, 3, 7, 20, 45])):
            loss = not loss if rng.random() < 0.1 else loss
            piece.append(("document", number, position, loss))
        piece = [("literal", i, True) for i in range(begin)] + piece + [("literal", begin + i, True) for i in range(end)]
        if padded and len(stream) + len(piece) > seq_length:
            found.append(stream + [("padding",)] * (seq_length - len(stream)))
            stream = []
            continue
        stream += piece
        while not padded and len(stream) >= seq_length:
            found.append(stream[:seq_length])
            stream = stream[seq_length:]
    return found[:samples]


sections = st.one_of(
    st.builds(
        AugmentSection,
        type=st.just("cip"),
        chunks=st.tuples(st.integers(2, 5)),
        probability=st.sampled_from([1.0, 0.5]),
        documents_per_group=st.sampled_from([None, 2, 3]),
    ),
    st.builds(
        AugmentSection,
        type=st.just("utk"),
        chunks=st.sampled_from([(2,), (2, 3), (1, 2, 4), (3,)]),
        probability=st.sampled_from([1.0, 0.5]),
        keep_order=st.booleans(),
        backtrace=st.booleans(),
    ),
)


@settings(max_examples=120, deadline=None)
@given(
    how=sections,
    seed=st.integers(0, 2**32),
    first_sample=st.sampled_from([0, 100_000]),
    begin=st.sampled_from([0, 1, 2]),
    end=st.sampled_from([0, 1, 3]),
    padded=st.booleans(),
    reserved=st.sampled_from([0, 50]),
)
def test_augment_is_the_slow_one(
    how: AugmentSection, seed: int, first_sample: int, begin: int, end: int, padded: bool, reserved: int
) -> None:
    rng = random.Random(seed)
    seq_length = 150
    samples = make_samples(rng, samples=4, seq_length=seq_length, begin=begin, end=end, padded=padded)
    labels, _ = labels_of(how, begin + end, reserved=reserved)
    columns, first_run = columns_of(samples, rng)
    augmenter = Augmenter(how=how, seed=seed, seq_length=seq_length, begin_tokens=begin, labels=labels)
    changed, first = augmenter(columns, first_run, first_sample)
    got = tokens_of(changed, first)
    asked = {"seed": seed, "begin": begin, "seq_length": seq_length, "labels": labels}
    assert got == [reference_augment(sample, first_sample + i, how, **asked) for i, sample in enumerate(samples)]
    for i in range(4):  # alone it is what it is beside others
        part = columns_of(samples[i : i + 1], rng)
        assert tokens_of(*augmenter(*part, first_sample + i)) == got[i : i + 1]
    for before, after in zip(samples, got, strict=True):
        assert len(after) == seq_length
        check_kept(before, after, how, begin, begin + end)


def check_kept(before: list[Token], after: list[Token], how: AugmentSection, begin: int, separators: int) -> None:
    """Tokens of documents and separators: cip keeps them all, utk those that stay inside; each document's in order."""
    own = [token for token in after if token[0] != "literal" or token[1] < separators]
    if how.type == "cip":
        assert Counter(own) == Counter(before)
        assert own == after
    else:
        assert not Counter(token for token in own if token[0] != "padding") - Counter(before)
    if how.keep_order:
        units = parts_of(before, begin)[1]
        if max(Counter(unit["body"][0][1] for unit in units).values(), default=0) == 1:
            places = defaultdict(list)
            for token in own:
                if token[0] == "document":
                    places[token[1]].append(token[2])
            assert all(found == sorted(found) for found in places.values())
            if how.type == "cip":
                assert {number: len(found) for number, found in places.items()} == {
                    unit["body"][0][1]: len(unit["body"]) for unit in units
                }


def documents(*lengths: int, loss: bool = True) -> list[Token]:
    return [("document", number, at, loss) for number, length in enumerate(lengths) for at in range(length)]


def words(sample: list[Token], literals: list[int]) -> str:
    """A0 A1 B0 ...; literal tokens as characters in brackets, lower case where they are not learned."""
    found, text = [], ""
    for token in [*sample, ("end",)]:
        if token[0] == "literal":
            text += chr(literals[token[1]]) if token[2] else chr(literals[token[1]]).lower()
            continue
        if text:
            found.append(f"[{text}]")
            text = ""
        if token[0] == "document":
            found.append("ABCDEF"[token[1]] + str(token[2]))
        elif token[0] == "padding":
            found.append(".")
    return " ".join(found)


def test_cip_deals_pieces_round_robin() -> None:
    sample = [
        *documents(4),
        ("literal", 0, True),
        *[("document", 1, i, True) for i in range(5)],
        ("literal", 0, True),
        *documents(0, 0, 3),
    ]
    for how, expected in (
        ({"chunks": (2,)}, "A0 A1 B0 B1 C0 A2 A3 [|] B2 B3 B4 [|] C1 C2"),
        ({"chunks": (4,)}, "A0 B0 C0 A1 B1 C1 A2 B2 C2 A3 [|] B3 B4 [|]"),  # C has three tokens, so three pieces
        ({"chunks": (2,), "documents_per_group": 2}, "A0 A1 B0 B1 A2 A3 [|] B2 B3 B4 [|] C0 C1 C2"),
    ):
        augmenter = Augmenter(how=AugmentSection(type="cip", **how), seed=1, seq_length=14)
        assert words(tokens_of(*augmenter(*columns_of([sample]), 0))[0], [ord("|")]) == expected


def test_what_no_document_owns_stays_and_bos_and_eos_go_with_their_ends() -> None:
    literal = [("literal", i, True) for i in range(3)]  # b begins, e ends, f is the rest of an end
    sample = [literal[2], literal[0], *documents(2), literal[1], literal[0], *documents(0, 4)[-4:], literal[1], literal[0]]
    sample += [("padding",)] * 2
    augmenter = Augmenter(how=AugmentSection(type="cip"), seed=1, seq_length=len(sample), begin_tokens=1)
    got = tokens_of(*augmenter(*columns_of([sample]), 0))[0]
    assert words(got, [ord(letter) for letter in "BEF"]) == "[FB] A0 [B] B0 B1 A1 [E] B2 B3 [EB] . ."


def test_utk_by_hand() -> None:
    how = AugmentSection(type="utk", chunks=(2,))
    labels, literals = labels_of(how, 1)
    literals = [ord("|"), *literals]
    sample = [*documents(3), ("literal", 0, True), *documents(0, 3), *[("padding",)] * 163]
    augmenter = Augmenter(how=how, seed=1, seq_length=170, labels=labels)
    got = tokens_of(*augmenter(*columns_of([sample]), 0))[0]
    text = words(got, literals)
    b1, a1, a2, b2 = re.findall("<d>(.{6})</d>", text)
    assert len({b1, a1, a2, b2}) == 4
    # not learned, so small: labels, knots and <S>; the separator | belongs to the end of its document A
    assert text.replace(" .", "") == (
        f"[<d>{b1}</d>] B0 B1 [<tail1><d>{a1}</d>] A0 [<tail1><d>{a2}</d><head1>] A1 A2 [|<s>{a1}<,>{a2}</S>"
        f"<d>{b2}</d><head1>] B2 [<s>{b1}<,>{b2}</S>]"
    )
    learned = "".join(chr(literals[token[1]]) for token in got if token[0] == "literal" and token[2])
    assert learned == f"|{a1}<,>{a2}</S>{b1}<,>{b2}</S>"
    (cut,) = tokens_of(*Augmenter(how=how, seed=1, seq_length=20, labels=labels)(*columns_of([sample[:20]]), 0))
    assert cut == got[:20]


def test_cip_of_equal_documents_keeps_one_distance() -> None:
    """methods.md 1.5: the distance between neighbouring pieces of a document is the same for all."""
    for pieces in (2, 3, 4):
        lengths = [60] * 7
        augmenter = Augmenter(how=AugmentSection(type="cip", chunks=(pieces,)), seed=1, seq_length=sum(lengths))
        sample = [("document", number, at, True) for number, length in enumerate(lengths) for at in range(length)]
        (got,) = tokens_of(*augmenter(*columns_of([sample]), 0))
        place = {token[1:3]: at for at, token in enumerate(got)}
        gaps = {place[number, at + 1] - place[number, at] - 1 for number in range(7) for at in range(59)}
        assert gaps == {0, 6 * 60 // pieces}


def test_the_share_of_samples_is_the_probability() -> None:
    numbers = np.arange(20_000)
    for probability in (0.3, 0.8):
        share = is_chosen(7, numbers, probability).mean()
        assert abs(share - probability) < 5 * (probability * (1 - probability) / 20_000) ** 0.5  # 5 sigma
    assert is_chosen(7, numbers, 1.0).all()
    # the released code draws sample 100,000 of seed s as sample 0 of seed s + 1
    assert (is_chosen(7, numbers + 100_000, 0.5) != is_chosen(8, numbers, 0.5)).any()


def test_labels_are_different_in_a_sample_and_of_one_length() -> None:
    how = AugmentSection(type="utk", chunks=(2,))
    labels, literals = labels_of(how, 5, count=4096)
    size = labels.stride
    ids = {tuple(literals[at : at + labels.id_tokens]) for at in range(labels.first - 5 + 3, len(literals), size)}
    assert len(ids) == 4096
    sample = [("document", number, at, True) for number in range(400) for at in range(2)]
    augmenter = Augmenter(how=how, seed=1, seq_length=100_000, labels=labels)
    changed, _ = augmenter(*columns_of([sample]), 9)
    starts = changed[1][(changed[0] == LITERAL) & (changed[2] == labels.label_length) & (changed[1] >= labels.first)]
    assert len(set(starts.tolist())) == len(starts) == 800


def test_reserved_tokens_are_markers_where_there_are_enough() -> None:
    how = AugmentSection(type="utk", chunks=(2, 3))
    text, _ = labels_of(how, 0, reserved=8)
    assert text.markers["ask"].text == "<S>"
    reserved, literals = labels_of(how, 0, reserved=9)
    assert reserved.markers["open"].text == "<|reserved_special_token_0|>"
    assert all(marker.length == 1 for marker in reserved.markers.values())
    assert sorted({token for token in literals if token >= 1000}) == list(range(1000, 1009))
    assert LabelLayout.from_dict(reserved.as_dict()) == reserved


@pytest.mark.parametrize("ids", [[5], []])
def test_a_tokenizer_without_tokens_for_markers_is_refused(ids: list[int]) -> None:
    blind = SimpleNamespace(encode=lambda text: np.array(ids, np.int32), control_id=lambda text: None)
    with pytest.raises(DataError, match="no different tokens for the markers of augment utk"):
        make_labels(blind, cuts=1, count=1024, base=0, where="here")
    letters = SimpleNamespace(
        encode=lambda text: np.array([len(text)] if text.isalnum() else Characters().encode(text)), control_id=lambda text: None
    )
    with pytest.raises(DataError, match="no 1,024 different ids"):
        make_labels(letters, cuts=1, count=1024, base=0, where="here")
