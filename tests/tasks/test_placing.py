import random
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.tasks import Haystack
from mcore_longctx.tasks.placing import Insert, place_sentences
from tests.tasks.texts import PROSE, TOKENIZERS, Bytes, farthest

HAYSTACK = Haystack.from_documents([PROSE], Bytes())
RING = 3 * (PROSE if PROSE.endswith("\n") else PROSE + "\n")
NEEDLE = re.compile(r" NEEDLE\d+\.(?= |$)|NEEDLE\d+\.\n~*")


def insert(number, more):
    """`more` tokens longer at the start of a line than behind a full stop, as with tokenizers that join a stop and a newline."""
    text = f"NEEDLE{number}."
    line, sentence = f"{text}\n{'~' * more}", f" {text}"
    return Insert(text, np.array(list(line.encode())), np.array(list(sentence.encode())))


@settings(max_examples=80, deadline=None)
@given(
    depths=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    more=st.integers(0, 3),
    start=st.integers(0, len(HAYSTACK.tokens) - 1),
    room=st.integers(600, 6000),
)
def test_the_room_is_filled_to_the_token_whichever_borders_are_taken(depths, more, start, room):
    inserts = [insert(number, more) for number in range(len(depths))]
    placed = place_sentences(HAYSTACK, Bytes(), inserts, depths, start=start, room=room)
    text = bytes(placed.tokens.tolist()).decode()
    assert len(text) == room
    assert text.endswith(("\n", "~"))
    found = list(NEEDLE.finditer(text))
    assert sorted(match.start() for match in found) == sorted(placed.starts)
    without = NEEDLE.sub("", text)
    assert without in RING
    assert without.endswith("\n")
    assert len(without) == placed.text_tokens
    for number, (at, depth, wanted) in enumerate(zip(placed.starts, placed.depths, depths, strict=True)):
        assert text[at:].lstrip(" ").startswith(f"NEEDLE{number}.")
        before = NEEDLE.sub("", text[:at])
        assert len(before) == round(depth * placed.text_tokens)
        assert before == "" or before.endswith("." if text[at] == " " else "\n")
        left = more * len(depths)
        assert abs(depth - wanted) * placed.text_tokens <= farthest(HAYSTACK, room, lines_only=False) + left


def test_needles_that_come_to_one_place_stay_in_their_order():
    inserts = [insert(number, 0) for number in range(5)]
    placed = place_sentences(HAYSTACK, Bytes(), inserts, [0.5] * 5, start=5, room=2000)
    assert re.search(r"( NEEDLE\d\.){5}", bytes(placed.tokens.tolist()).decode())
    assert list(placed.starts) == sorted(placed.starts)


def test_every_tokenizer_has_borders_of_sentences():
    rng = random.Random(3)
    for tokenizer in TOKENIZERS.values():
        haystack = Haystack.from_documents([PROSE], tokenizer)
        assert len(haystack.sentence_starts) > 300
        tokens = haystack.tokens.tolist()
        for place in rng.sample(haystack.sentence_starts.tolist(), 40):
            around = tokenizer.decode(tokens[place - 3 : place]), tokenizer.decode(tokens[place - 3 : place + 3])
            assert around[0].endswith(".")
            assert around[1].startswith(around[0] + " ")
