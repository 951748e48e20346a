"""Texts of the tiny model and of the demo: where they come from, how they are cut, the pass key sentence.

Two texts out of copyright, taken from Debian packages:

  King James Bible     `bible-kjv-text` (the data) and `bible-kjv` (the program that prints it), one verse a line
  Devil's Dictionary   `dict-devil`, Ambrose Bierce 1911, one entry a document

`fetch_texts` downloads the packages with apt-get (nothing is installed) and keeps `kjv.txt` and `devil.txt` in a
folder; when the two files are there already, nothing is downloaded. Everything after that is a pure function of
them. The books in HELDOUT_BOOKS and the entries from HELDOUT_FROM on are never trained on.
"""

from __future__ import annotations

import gzip
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HELDOUT_BOOKS", "NEEDLE", "QUESTION", "Texts", "fetch_texts", "new_keys", "new_value", "read_texts"]

PACKAGES = ("bible-kjv-text", "bible-kjv", "dict-devil")
HELDOUT_BOOKS = ("Job", "Acts")  # no near copy elsewhere, unlike a gospel or a book of Kings
HELDOUT_FROM = "T"  # entries of the dictionary from this letter on
NEEDLE = "The pass key for {key} is {value}.\n"
QUESTION = "The pass key for {key} is"
CONSONANTS, VOWELS = "bcdfghjklmnprstvw", "aeiou"

VERSE = re.compile(r"^([1-3]?[A-Z][a-z]*)(\d+):(\d+) (.*)$")
ENTRY = re.compile(r"^[A-Z][A-Z'\- ]+, (n|adj|v|adv|pp|p|prep|interj|x)\b")


@dataclass(frozen=True)
class Texts:
    """Training and held-out documents. `books`: abbreviated name -> text, one verse a line, no digits."""

    books: dict[str, str]
    entries: list[str]
    heldout_books: dict[str, str]
    heldout_entries: list[str]

    def training_text(self) -> bytes:
        """All training documents joined by a blank line; pure ASCII."""
        return "\n".join([*self.books.values(), "\n".join(self.entries)]).encode("ascii")

    def heldout_text(self) -> bytes:
        """All held-out documents joined in the same way."""
        return "\n".join([*self.heldout_books.values(), "\n".join(self.heldout_entries)]).encode("ascii")


def fetch_texts(folder: Path) -> None:
    """Write `kjv.txt` (reference and verse a line) and `devil.txt` to `folder` unless both are there.

    Needs apt-get and dpkg-deb (Debian, Ubuntu); elsewhere put the two files there by hand.
    """
    kjv, devil = folder / "kjv.txt", folder / "devil.txt"
    if kjv.exists() and devil.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / "packages"
    root.mkdir(exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=root, check=True)
    for package in sorted(root.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=root, check=True)
    whole = subprocess.run(
        [str(root.resolve() / "usr/bin/bible"), "-f", "-p", "."],
        cwd=root / "usr/lib",
        input="gen1:1-rev22:21\n",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kjv.write_text(whole, encoding="ascii")
    devil.write_bytes(gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()))


def read_texts(folder: Path) -> Texts:
    """Parse the two files of `fetch_texts` and cut off what is held out."""
    books = parse_bible((folder / "kjv.txt").read_text(encoding="ascii"))
    entries = parse_dictionary((folder / "devil.txt").read_text(encoding="ascii", errors="replace"))
    return Texts(
        books={name: text for name, text in books.items() if name not in HELDOUT_BOOKS},
        entries=[entry for entry in entries if entry < HELDOUT_FROM],
        heldout_books={name: books[name] for name in HELDOUT_BOOKS},
        heldout_entries=[entry for entry in entries if entry >= HELDOUT_FROM],
    )


def parse_bible(printed: str) -> dict[str, str]:
    """Output of the `bible` program -> abbreviated book name -> verses a line, a blank line before a chapter."""
    books: dict[str, list[str]] = {}
    seen: set[tuple[str, ...]] = set()
    for line in printed.splitlines():
        match = VERSE.match(line)
        if not match or match.group(1, 2, 3) in seen:  # the program greets with Genesis 1:1
            continue
        name, _, verse, words = match.groups()
        seen.add(match.group(1, 2, 3))
        verses = books.setdefault(name, [])
        if verse == "1" and verses:
            verses.append("")
        verses.append(words.strip())
    return {name: "\n".join(verses) + "\n" for name, verses in books.items()}


def parse_dictionary(printed: str) -> list[str]:
    """Entries of the Devil's Dictionary, each ending in one newline; digits and non-ASCII entries dropped."""
    entries: list[list[str]] = []
    for line in printed.splitlines():
        if ENTRY.match(line):
            entries.append([])
        if entries:
            entries[-1].append(line.rstrip())
    texts = ["\n".join(lines).strip() + "\n" for lines in entries]
    return [text for text in texts if text.isascii() and not re.search(r"\d", text)]


def new_keys(rng: random.Random, count: int) -> list[str]:
    """Different made-up names of two or three syllables."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 3))))] = None
    return list(keys)


def new_value(rng: random.Random, digits: int = 3) -> str:
    """Distinct digits, so that right digits in a wrong order are never right by chance."""
    return "".join(rng.sample("0123456789", digits))
