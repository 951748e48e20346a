"""The evaluate section: what a level means, what is asked of which file."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import load_recipe, preset_names
from mcore_longctx.recipe.schema import (
    EvaluateSection,
    LossByPositionSection,
    NeedleSection,
    RulerSection,
    ShortSuiteSection,
    TokenCount,
)

counts = st.integers(1, 300)
lengths = st.lists(st.integers(64, 1 << 22).map(TokenCount), min_size=1, max_size=5).map(tuple)
needles = st.builds(
    NeedleSection, haystack=st.just(Path("text")), lengths=lengths, depths=counts, samples=counts, shared=st.booleans()
)
rulers = st.builds(
    RulerSection,
    haystack=st.just(Path("text")),
    lengths=lengths,
    samples=counts,
    scoring=st.sampled_from(["teacher_forced", "greedy"]),
)
losses = st.builds(
    LossByPositionSection,
    path=st.just(Path("text")),
    seq_length=st.just(TokenCount(1 << 20)),
    short_length=st.just(TokenCount(8192)),
    windows=counts,
    short_windows=counts,
)
sections = st.builds(
    EvaluateSection,
    needle=st.none() | needles,
    ruler=st.none() | rulers,
    loss_by_position=st.none() | losses,
    short_suite=st.none() | st.builds(ShortSuiteSection, questions=counts),
    level=st.sampled_from(["quick", "standard", "publish"]),
)


@given(sections)
def test_a_level_is_taken_once(section: EvaluateSection) -> None:
    assert section.at_level().at_level() == section.at_level()
    assert section.at_level().measures == section.measures
    if section.level == "standard":
        assert section.at_level() == section


@given(sections)
def test_a_quick_look_is_one_text_and_twenty_questions(section: EvaluateSection) -> None:
    seen = section.at_level()
    if section.level != "quick":
        return
    if section.needle is not None and seen.needle is not None:
        longest = max(section.needle.lengths)
        assert (seen.needle.lengths, seen.needle.samples, seen.needle.shared) == ((longest,), 1, True)
        assert seen.needle.depths == (20 if longest >= 20 * 128 else max(1, longest // 128))
    if section.loss_by_position is not None and seen.loss_by_position is not None:
        assert seen.loss_by_position.windows == min(section.loss_by_position.windows, 2)
        assert seen.loss_by_position.short_windows == min(section.loss_by_position.short_windows, 16)
    if seen.short_suite is not None:
        assert seen.short_suite.questions <= 20
    alone = (section.needle, section.loss_by_position, section.short_suite) == (None, None, None)
    assert (seen.ruler is not None) == (section.ruler is not None and alone)
    if section.ruler is not None and seen.ruler is not None:
        assert (seen.ruler.lengths, seen.ruler.samples) == ((max(section.ruler.lengths),), 1)


@given(sections)
def test_what_is_published_has_a_hundred_samples_a_cell_and_is_decoded(section: EvaluateSection) -> None:
    seen = section.at_level()
    if section.level != "publish":
        return
    if section.needle is not None and seen.needle is not None:
        assert seen.needle.samples == max(section.needle.samples, 100)
        assert (seen.needle.lengths, seen.needle.depths) == (section.needle.lengths, section.needle.depths)
    if section.ruler is not None and seen.ruler is not None:
        assert seen.ruler.samples == max(section.ruler.samples, 100)
        assert (seen.ruler.lengths, seen.ruler.scoring) == (section.ruler.lengths, "greedy")
    assert (seen.loss_by_position, seen.short_suite) == (section.loss_by_position, section.short_suite)


def test_every_text_and_length_is_named_by_its_key() -> None:
    section = EvaluateSection(
        needle=NeedleSection(haystack=Path("a"), lengths=(TokenCount(128), TokenCount(256))),
        ruler=RulerSection(haystack=Path("b"), code=Path("c"), lengths=(TokenCount(512),)),
        loss_by_position=LossByPositionSection(path=Path("d"), seq_length=TokenCount(256), short_length=TokenCount(64)),
        short_suite=ShortSuiteSection(choices=Path("e")),
    )
    assert section.texts == {
        "needle.haystack": Path("a"),
        "ruler.haystack": Path("b"),
        "ruler.code": Path("c"),
        "loss_by_position.path": Path("d"),
        "short_suite.choices": Path("e"),
    }
    assert section.lengths == (
        ("needle.lengths", 128),
        ("needle.lengths", 256),
        ("ruler.lengths", 512),
        ("loss_by_position.seq_length", 256),
        ("loss_by_position.short_length", 64),
    )
    assert not EvaluateSection().measures
    assert EvaluateSection(short_suite=ShortSuiteSection()).texts == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.level=fast", "'fast' is not one of quick, standard, publish"),
        ("evaluate.max_budget_share=0", "max_budget_share is a share of the training's hours"),
        ("evaluate.max_budget_share=-0.5", "max_budget_share is a share"),
        ("evaluate={max_budget_share: 0.5}", "max_budget_share has no effect where nothing is measured"),
        ("evaluate.needle.samples=0", "evaluate.needle: give at least one length, depth, sample and digit"),
        ("evaluate.needle.lengths=[]", "evaluate.needle: give at least one length, depth, sample and digit"),
        ("evaluate.loss_by_position.windows=0", "evaluate.loss_by_position: give at least one window"),
        ("evaluate.short_suite={questions: 0}", "evaluate.short_suite: give at least one question"),
        ("evaluate.ruler={haystack: a, lengths: [1024], tasks: [vt, vt]}", "evaluate.ruler: a task is named twice"),
        ("evaluate.ruler={haystack: a, lengths: []}", "evaluate.ruler: give at least one length and one sample"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny-cpu", [override])


def test_digits_are_those_of_a_pass_key_alone() -> None:
    section = "evaluate.needle={{haystack: a, lengths: [512], kind: {kind}}}"
    for kind in ("passkey", "sentence"):
        recipe = load_recipe("tiny-cpu", [section.format(kind=kind)])
        assert recipe.evaluate.needle is not None
        assert (recipe.evaluate.needle.digits, recipe.evaluate.needle.key_digits) == (None, 7)
    refused = r": evaluate.needle: digits 3 are those of a pass key, kind is sentence; leave digits out \(digits: null\)"
    with pytest.raises(ConfigError, match=r"tiny-cpu.yaml:\d+" + refused):
        load_recipe("tiny-cpu", ["evaluate.needle.kind=sentence"])
    with pytest.raises(ConfigError, match=r"override 'evaluate.needle=.*'" + refused):
        load_recipe("tiny-cpu", [section.format(kind="sentence, digits: 3")])
    assert load_recipe("tiny-cpu", ["evaluate.needle.kind=sentence", "evaluate.needle.digits=null"]).evaluate.needle is not None


@pytest.mark.parametrize("name", ["tiny-cpu", *(name for name in preset_names() if name.startswith("ultralong"))])
def test_presets_measure_retrieval_loss_and_short_skills(name: str) -> None:
    evaluate = load_recipe(name).evaluate
    assert None not in (evaluate.needle, evaluate.ruler, evaluate.loss_by_position, evaluate.short_suite)
