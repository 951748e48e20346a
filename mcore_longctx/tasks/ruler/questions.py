"""Questions about invented people, answered by one paragraph or by two.

    About Kelora Vitemu: Kelora Vitemu pays rent for a room in Sadobiku. Kelora Vitemu bakes bread for a living. ...

The question says it in other words than the paragraph ("In which town does Kelora Vitemu live?"), so that no string of it leads there
but the name. For two hops the paragraph names somebody else, whose paragraph answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mcore_longctx.tasks.ruler.draft import Body, Draft, fill_with_lines
from mcore_longctx.tasks.ruler.texts import RulerTexts
from mcore_longctx.tasks.ruler.words import person, place_name
from mcore_longctx.tasks.tokens import TextTokenizer, encode_lines

__all__ = ["draft_question", "solve_question"]

_LEAST_PARAGRAPHS = 4  # beside those that answer
_TOLD = 0.8  # of the facts that nobody asks for: paragraphs differ in length

# how a paragraph says it: {who} and {what}
_HOME = (
    "{who} pays rent for a room in {what}",
    "every night {who} goes to bed in {what}",
    "the letters for {who} are sent to {what}",
)
_BIRTH = ("{who} first saw the light of day in {what}", "{who} was a baby in {what}", "{who} came into the world in {what}")
_TRADE = ("{who} makes a living as a {what}", "{who} was trained as a {what}", "{who} has a sign at the door that says {what}")
_BOSS = ("{who} takes orders from {what}", "{what} signs the pay slips of {who}", "at work {who} answers to {what}")
_TRADES = [
    "baker",
    "barber",
    "beekeeper",
    "brewer",
    "butcher",
    "carpenter",
    "cobbler",
    "cooper",
    "dyer",
    "farrier",
    "ferryman",
    "fisherman",
    "gardener",
    "glazier",
    "goldsmith",
    "hatter",
    "mason",
    "miller",
    "nurse",
    "painter",
    "plumber",
    "porter",
    "potter",
    "printer",
    "roofer",
    "saddler",
    "shepherd",
    "tailor",
    "tanner",
    "teacher",
    "thatcher",
    "weaver",
]


@dataclass(frozen=True)
class _Relation:
    """What can be asked: in the paragraph's words, and in the question's for a person and for that person's employer."""

    said: tuple[str, ...]
    value: str  # pattern
    asked: str
    asked_of_boss: str


_RELATIONS = {
    "home": _Relation(_HOME, r"[A-Z][a-z]+", "In which town does {who} live?", "In which town does the employer of {who} live?"),
    "birth": _Relation(_BIRTH, r"\d{4}", "In which year was {who} born?", "In which year was the employer of {who} born?"),
    "trade": _Relation(_TRADE, r"[a-z]+", "What is the profession of {who}?", "What is the profession of the employer of {who}?"),
}
_PERSON = r"[A-Z][a-z]+ [A-Z][a-z]+"


@dataclass(frozen=True)
class _Person:
    name: str
    facts: dict[str, str]
    boss: str

    def paragraph(self, rng: random.Random, *needed: str) -> str:
        """One line: the needed facts and most of the others in some order, each said in some way."""
        told = [name for name in self.facts if name in needed or rng.random() < _TOLD]
        said = [rng.choice(_RELATIONS[name].said).format(who=self.name, what=self.facts[name]) for name in told]
        if not told or "boss" in needed or rng.random() < _TOLD:
            said.append(rng.choice(_BOSS).format(who=self.name, what=self.boss))
        rng.shuffle(said)
        return self._about(said)

    def longest_paragraph(self) -> str:
        """The most words that a paragraph can take."""
        forms = {name: max(relation.said, key=len) for name, relation in _RELATIONS.items()}
        said = [form.format(who=self.name, what=self.facts[name]) for name, form in forms.items()]
        return self._about([*said, max(_BOSS, key=len).format(who=self.name, what=self.boss)])

    def _about(self, said: list[str]) -> str:
        return f"About {self.name}: " + " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in said)


def draft_question(hops: int, rng: random.Random, texts: RulerTexts, tokenizer: TextTokenizer, index: int) -> Draft:
    """Somebody asked about, for two hops with an employer, among others. Texts are not used."""
    known: set[str] = set()
    boss = _draw(rng, known, _new_name(rng, known))
    who = _draw(rng, known, boss.name)
    if any(who.facts[name] == boss.facts[name] for name in who.facts):  # then one hop would do for two
        who = _Person(who.name, {name: _other(rng, name, boss.facts[name]) for name in who.facts}, boss.name)
    name = rng.choice(list(_RELATIONS))
    relation = _RELATIONS[name]
    ask = (relation.asked if hops == 1 else relation.asked_of_boss).format(who=who.name)
    answer = (who if hops == 1 else boss).facts[name]
    told = [who.paragraph(rng, name)] if hops == 1 else [who.paragraph(rng, "boss"), boss.paragraph(rng, name)]
    gold = encode_lines(tokenizer, told)
    count = len(gold.ends)

    def others() -> Iterator[str]:
        while True:
            yield _draw(rng, known, None).paragraph(rng)

    def fill(room: int) -> Body:
        return fill_with_lines(tokenizer, gold, others(), lambda lines: [rng.randint(0, lines) for _ in range(count)], room)

    least = len(encode_lines(tokenizer, [boss.longest_paragraph()]).tokens) * (count + _LEAST_PARAGRAPHS)
    head = "Read the paragraphs about some people. A question about one of them follows.\n"
    return Draft(
        head, f"Answer from the paragraphs alone, in a word. {ask}\nAnswer:", f" {answer}", (answer,), least, fill, "any"
    )


def _draw(rng: random.Random, known: set[str], boss: str | None) -> _Person:
    """Somebody new with the boss named, or one who is in no other paragraph."""
    name = _new_name(rng, known)
    facts = {relation: _other(rng, relation, "") for relation in _RELATIONS}
    return _Person(name, facts, _new_name(rng, known) if boss is None else boss)


def _new_name(rng: random.Random, known: set[str]) -> str:
    while (name := person(rng)) in known:
        pass
    known.add(name)
    return name


def _other(rng: random.Random, relation: str, value: str) -> str:
    """A value of the relation that is not `value`."""
    while True:
        drawn = {
            "home": lambda: place_name(rng),
            "birth": lambda: str(rng.randrange(1700, 2000)),
            "trade": lambda: rng.choice(_TRADES),
        }
        if (found := drawn[relation]()) != value:
            return found


def solve_question(hops: int, prompt: str) -> tuple[str, ...]:
    """The answer from the paragraphs.

    Raises:
        ValueError: nothing asked, or a paragraph or a fact that is not there exactly once.
    """
    asked = re.search(r"\nAnswer from the paragraphs alone, in a word\. ([^\n]*)\nAnswer:$", prompt)
    for relation in _RELATIONS.values():
        form = relation.asked if hops == 1 else relation.asked_of_boss
        of = re.fullmatch(re.escape(form).replace(r"\{who\}", f"({_PERSON})"), asked[1]) if asked else None
        if of is not None:
            who = of[1]
            if hops == 2:
                who = _look_up(prompt, who, _BOSS, _PERSON)
            return (_look_up(prompt, who, relation.said, relation.value),)
    raise ValueError("the prompt does not end in a question")


def _look_up(prompt: str, who: str, said: tuple[str, ...], value: str) -> str:
    paragraphs = re.findall(rf"^About {who}: (.*)$", prompt, re.MULTILINE)
    if len(paragraphs) != 1:
        raise ValueError(f"{len(paragraphs)} paragraphs about {who}")
    found = []
    for form in said:
        begun = form if form.startswith("{") else form[0].upper() + form[1:]
        pattern = re.escape(begun).replace(r"\{who\}", who).replace(r"\{what\}", f"({value})")
        found += re.findall(rf"(?:^|\. ){pattern}\.", paragraphs[0])
    if len(found) != 1:
        raise ValueError(f"{len(found)} answers in the paragraph about {who}")
    return str(found[0])
