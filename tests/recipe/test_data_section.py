"""Data sections that cannot be planned are refused where they are written, from a recipe and from the command line alike."""

import math
from pathlib import Path

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.data import AugmentSection
from mcore_longctx.recipe.load import load_recipe
from mcore_longctx.recipe.schema import DataSection, DocumentSource, LengthSampling, TokenCount


def source(name: str = "books", share: float | None = None) -> DocumentSource:
    return DocumentSource(name=name, path=Path("books"), share=share)


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_a_share_is_a_positive_number(share: float) -> None:
    with pytest.raises(ValueError, match="give every source a positive share, or none"):
        DataSection(sources=(source(share=share),))


@pytest.mark.parametrize("repetition", [math.nan, math.inf, 1e10, 3e9, 1_000_001, 0.5, 0.0, -1.0])
def test_a_repetition_is_a_number_of_copies_that_can_be_held(repetition: float) -> None:
    with pytest.raises(ValueError, match=r"repetition is .*, expected 1 to 1,000,000"):
        LengthSampling(repetition=repetition)
    assert LengthSampling(repetition=1_000_000).repetition == 1_000_000


@pytest.mark.parametrize("name", ["short_below", "long_above", "min_length"])
def test_a_length_is_not_negative(name: str) -> None:
    lengths = {"short_below": TokenCount(-2), "long_above": TokenCount(9)} if name == "short_below" else {}
    if name == "long_above":
        lengths = {"short_below": TokenCount(-2), "long_above": TokenCount(-1)}
    if name == "min_length":
        lengths = {"min_length": TokenCount(-1)}
    with pytest.raises(ValueError, match=r"is -[12], expected 0 or more"):
        LengthSampling(**lengths)


@pytest.mark.parametrize("probability", [math.nan, -0.1, 1.1])
def test_a_probability_is_one(probability: float) -> None:
    with pytest.raises(ValueError, match=r"keep_probability is .*, expected 0 to 1"):
        LengthSampling(keep_probability=probability)


@pytest.mark.parametrize("name", ["", "b\udcff", "a\nb", "a\x1bb"])
def test_a_source_has_a_name_that_can_be_written(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a source"):
        source(name)
    assert source("théses 2/a$").name == "théses 2/a$"


@pytest.mark.parametrize(("kind", "chunks"), [("utk", (2, 1_000_000_000)), ("utk", (1025,)), ("cip", (1025,))])
def test_a_document_is_cut_in_a_number_of_pieces_that_labels_can_be_made_for(kind: str, chunks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"chunks is \[.*\], expected at most 1,024 pieces of a document"):
        AugmentSection(type=kind, chunks=chunks)
    assert AugmentSection(type=kind, chunks=(1024,)).chunks == (1024,)


@pytest.mark.parametrize("kind", ["text", "token"])
def test_an_empty_separator_is_called_none(kind: str) -> None:
    with pytest.raises(ValueError, match="separator is empty; for nothing between documents use separator_kind none"):
        DataSection(sources=(source(),), separator="", separator_kind=kind)
    assert DataSection(sources=(source(),), separator="", separator_kind="none").separator_text == "nothing"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        (
            "data.long-documents.prompt_loss=all",
            "stage extend: prompt_loss is for chats, data set 'long-documents' holds documents",
        ),
        (
            "data.chats.sentences={rule: digits}",
            "stage instruct: sentences are chosen from documents, data set 'chats' holds chats",
        ),
        ("data.chats.augment={type: cip}", "stage instruct: augment cip is for documents, data set 'chats' holds chats"),
    ],
)
def test_what_belongs_to_the_other_kind_of_data_is_refused_with_the_recipe(override: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_recipe("tiny-cpu", [override])
