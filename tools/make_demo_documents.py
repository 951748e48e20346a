"""Write the documents of the demo: `examples/documents`.

    python tools/make_demo_documents.py --work build/tiny --out examples/documents --seed 0      # 2 seconds

  books/*.txt        long documents: whole books of the King James Bible, one verse a line
  dictionary.jsonl   short documents: entries of the Devil's Dictionary
  practice.jsonl     pass keys stated and later asked in text; only the answers carry loss
  chat.jsonl         conversations for the fine-tuning, each shorter than 512 tokens of the tiny model
  heldout/*.txt      text on which neither the tiny model nor the demo is trained

The same folder of texts and the same seed give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import tiny_texts
from tiny_texts import NEEDLE, QUESTION, Texts

BOOKS = {  # 9,000 to 62,000 characters: every one is long beside the trained context of 512
    "Ruth": "ruth",
    "Est": "esther",
    "Eccl": "ecclesiastes",
    "Lam": "lamentations",
    "Dan": "daniel",
    "Hos": "hosea",
    "Joel": "joel",
    "Amos": "amos",
    "Mic": "micah",
    "Mal": "malachi",
    "Rom": "romans",
    "Gal": "galatians",
    "Heb": "hebrews",
    "Jas": "james",
    "1Pet": "peter-1",
    "Rev": "revelation",
}
HELDOUT = {"Job": "job", "Acts": "acts"}
PRACTICE_LENGTH = 4093  # with the separator "<s>" one sample of 4,096
PRACTICE_DOCUMENTS, PRACTICE_KEYS = 60, 14
CHATS, CHAT_LENGTH = 200, 460

Segments = list[dict[str, object]]


# ---------------------------------------------------------------- practice
def practice_document(rng: random.Random, text: str, length: int, keys: int) -> Segments:
    """`keys` pass keys at random lines of a slice of `text`, each asked at a later line; `length` characters.

    Only the digits of the answers carry loss. Half of the questions stand in a block at the end, as in the
    measurement; the others are spread, so that a document that is cut still has questions with their statement.
    """
    names = tiny_texts.new_keys(rng, keys)
    values = [tiny_texts.new_value(rng) for _ in names]
    stated = [NEEDLE.format(key=n, value=v) for n, v in zip(names, values, strict=True)]
    lines = text_lines(rng, text, length - 2 * sum(map(len, stated)))
    events: list[tuple[float, int, bool]] = []  # place, key, is a question
    for i in range(keys):
        place = rng.random()
        asked = 1.0 + rng.random() if i % 2 else rng.uniform(place, 1.0)
        events += [(place * len(lines), i, False), (asked * len(lines), i, True)]
    pieces: list[tuple[str, bool]] = []
    done = 0
    for place, i, question in sorted(events):
        upto = min(int(place), len(lines))
        pieces += [(line, False) for line in lines[done:upto]]
        done = max(done, upto)
        if question:
            pieces += [(QUESTION.format(key=names[i]), False), (f" {values[i]}", True), (".\n", False)]
        else:
            pieces.append((stated[i], False))
    return merge([*pieces, *((line, False) for line in lines[done:])])


def text_lines(rng: random.Random, text: str, length: int) -> list[str]:
    """Lines of `text` from a random line on, `length` characters in all: the first line is cut to fit."""
    start = rng.randrange(len(text) - 2 * length)
    end = text.index("\n", start + length) + 1
    return text[end - length : end].splitlines(keepends=True)


def merge(pieces: Iterable[tuple[str, bool]]) -> Segments:
    """Neighbours with the same flag become one segment."""
    segments: Segments = []
    for text, loss in pieces:
        if segments and segments[-1]["loss"] == loss:
            segments[-1]["text"] = f"{segments[-1]['text']}{text}"
        else:
            segments.append({"text": text, "loss": loss})
    return segments


# ------------------------------------------------------------------- chats
def chat(*turns: str) -> dict[str, object]:
    """Turns of user and assistant, alternating, as one conversation."""
    roles = ("user", "assistant") * (len(turns) // 2)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}


def pass_key_chat(rng: random.Random, text: str) -> dict[str, object]:
    """A short text with two pass keys, which are asked one after the other."""
    names = tiny_texts.new_keys(rng, 2)
    stated = [NEEDLE.format(key=name, value=tiny_texts.new_value(rng)) for name in names]
    asked = [f"What is the pass key for {name}?" for name in names]
    lines = text_lines(rng, text, rng.randint(60, CHAT_LENGTH - 3 * sum(map(len, asked))))
    for line in stated:
        lines.insert(rng.randint(0, len(lines)), line)
    return chat("".join(lines) + asked[0], stated[0].strip(), asked[1], stated[1].strip())


def definition_chat(entry: str) -> dict[str, object]:
    """The question for a word of the dictionary, answered by the first paragraph of its entry."""
    word, _, rest = entry.partition(",")
    paragraph = " ".join(rest.split("\n\n")[0].split(".", 1)[-1].split())
    return chat(f"What does {word.lower()} mean?", paragraph)


def chats(rng: random.Random, texts: Texts, text: str) -> list[dict[str, object]]:
    """Seven conversations about pass keys to one about a word, in random order."""
    words = [definition_chat(entry) for entry in rng.sample(texts.entries, len(texts.entries))]
    words = [c for c in words if 20 < len(c["messages"][1]["content"]) < CHAT_LENGTH - 80][: CHATS // 8]
    both = [pass_key_chat(rng, text) for _ in range(CHATS - len(words))] + words
    rng.shuffle(both)
    return both


# ------------------------------------------------------------------- files
def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """One record a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_documents(texts: Texts, folder: Path, seed: int) -> None:
    """All files of the module's list, overwriting what is there."""
    rng = random.Random(seed)
    for name in ("books", "heldout"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for short, name in BOOKS.items():
        (folder / "books" / f"{name}.txt").write_text(texts.books[short], encoding="utf-8")
    for short, name in HELDOUT.items():
        (folder / "heldout" / f"{name}.txt").write_text(texts.heldout_books[short], encoding="utf-8")
    (folder / "heldout" / "dictionary.txt").write_text("\n".join(texts.heldout_entries), encoding="utf-8")
    write_jsonl(folder / "dictionary.jsonl", ({"id": f"devil-{i:04}", "text": entry} for i, entry in enumerate(texts.entries)))
    haystack = "".join(text for short, text in texts.books.items() if short not in BOOKS)
    write_jsonl(
        folder / "practice.jsonl",
        (
            {"id": f"practice-{i:04}", "segments": practice_document(rng, haystack, PRACTICE_LENGTH, PRACTICE_KEYS)}
            for i in range(PRACTICE_DOCUMENTS)
        ),
    )
    write_jsonl(folder / "chat.jsonl", chats(rng, texts, haystack))


def main() -> None:
    """Fetch the texts if needed, write the documents, list them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of kjv.txt and devil.txt, fetched if absent")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tiny_texts.fetch_texts(options.work)
    write_documents(tiny_texts.read_texts(options.work), options.out, options.seed)
    for path in sorted(p for p in options.out.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size:>9,}  {path}")


if __name__ == "__main__":
    main()
