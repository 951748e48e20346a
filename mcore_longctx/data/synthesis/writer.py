"""Asking a writer: a command that reads requests as JSON lines and prints answers as JSON lines, or the one built in.

Every answer is on disk before the next one is looked at, under a hash of the writer and the request, so nothing is asked twice however
often the work is killed. An answer that cannot be used is kept aside with the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import re
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mcore_longctx.data.synthesis.offline_writer import answer_offline
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import write_atomic

__all__ = ["Answers", "Rejected", "Writer"]

_LINE = 1 << 24  # bytes of an answer at most
_SHOWN = 200  # characters of a bad line
_PIECE = 1 << 16  # bytes read at once
_LEAVING = 5.0  # seconds that a command has to end by itself when it has nothing more to say
_ENDING = 2.0  # seconds for what reads and writes the pipes of a command that was ended
_ALWAYS = 3  # failures that are fine whatever the share
_NOWHERE = re.compile(r"(?!)")
_FIELDS = {"summary": ("summary",), "closed_book": ("answer",)}  # all others: question and answer
_QUESTION = ("question", "answer")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who answers.

    command: program and arguments, started without a shell; empty: the writer that is built in.
    timeout: seconds without any answer after which the command is ended.
    """

    command: tuple[str, ...] = ()
    timeout: float = 600.0

    def request_id(self, request: Mapping[str, Any]) -> str:
        """A hash of who is asked and what: the name of the answer."""
        text = json.dumps([self.command, request], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Rejected:
    """An item without a usable answer, or a line that belongs to none."""

    reason: str
    request: Mapping[str, Any] | None = None
    line: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """A line of OUT.rejected.jsonl."""
        row: dict[str, Any] = {"reason": self.reason}
        if self.request is not None:
            row |= {"id": self.request["id"], "kind": self.request["kind"]}
        return row if self.line is None else row | {"line": self.line}


@dataclass
class Answers:
    """All answers so far, and the file that holds them.

    A question, answer or summary in which `forbidden` is found is none; from an earlier start, it is asked for again. What a
    closed-book command answers is compared and never learned, so it may hold anything.

    Raises:
        DataError: the file is damaged; a last line that a kill has cut is none.
    """

    path: Path
    forbidden: re.Pattern[str] = _NOWHERE
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: int = 0  # in this process
    rejected: list[Rejected] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        for number, line in enumerate(kept.splitlines(), 1):
            try:
                answer = json.loads(line)
                if self._fault(answer) is None:
                    self.known[answer["id"]] = answer
            except (ValueError, KeyError, TypeError, RecursionError):
                raise DataError(
                    "damaged", where=f"{self.path}:{number}", fix="remove the line: its question is asked again"
                ) from None
        if len(kept) < len(whole):
            os.truncate(self.path, len(kept))

    def ask(
        self,
        requests: Sequence[Mapping[str, Any]],
        writer: Writer,
        *,
        max_rejected: float,
        on_answer: Callable[[], None] = lambda: None,
    ) -> None:
        """Ask for what is not known yet; each request has an `id` (`Writer.request_id`).

        Args:
            requests: any; one that is given twice is asked once.
            writer: who answers.
            max_rejected: share of these requests that may stay without a usable answer; three always may.
            on_answer: called for every answer.

        Raises:
            DataError: more than that, or all of them, stay without; or the command cannot be started.
        """
        missing = {request["id"]: request for request in requests if request["id"] not in self.known}
        if not missing:
            return
        self.asked += len(missing)
        allowed = max(_ALWAYS, max_rejected * len(missing))
        before, failed, waiting = len(self.rejected), 0, dict(missing)
        said = _offline(missing) if not writer.command else _Command(writer, self.path).run(missing, waiting)
        with self.path.open("a", encoding="utf-8") as file, closing(said) as lines:
            for line, why in lines:
                answer, reason = (None, why) if line is None else _understood(line, waiting)
                if answer is not None and (fault := self._fault(answer)) is not None:
                    answer, reason = None, fault
                if answer is not None:
                    del waiting[answer["id"]]
                    self.known[answer["id"]] = answer
                    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    file.flush()
                    on_answer()
                    continue
                failed += 1
                self.rejected.append(self._reject(line, reason, waiting))
                if failed > allowed:
                    break
            os.fsync(file.fileno())
        if failed <= allowed:
            self.rejected += [Rejected("no answer", request) for request in waiting.values()]
        without = max(failed, sum(1 for name in missing if name not in self.known))
        if without > allowed or without == len(missing):
            first = self.rejected[before].reason
            aside = self.path.with_name("rejected.jsonl")
            write_atomic(aside, "".join(json.dumps(one.as_dict()) + "\n" for one in self.rejected))
            who = "the built-in writer" if not writer.command else f"the command {writer.command[0]}"
            raise DataError(
                f"{without:,} of {len(missing):,} items have no usable answer of {who}, the first: {first}",
                where=aside,
                fix="repair it and start the same command again: what is answered is kept (or raise --max-rejected)",
            )

    def _fault(self, answer: Mapping[str, Any]) -> str | None:
        """What keeps an answer out of a chat."""
        if "question" not in answer and "summary" not in answer:
            return None
        for name in ("question", "answer", "summary"):
            if found := self.forbidden.search(answer.get(name, "")):
                return f"{name!r} holds {found[0]!r}, the text of a control token"
        return None

    @staticmethod
    def _reject(line: str | None, reason: str, waiting: dict[str, Mapping[str, Any]]) -> Rejected:
        """With its item, if the line says which it is: then it is not waited for any more."""
        if line is None:
            return Rejected(reason)
        try:
            request = waiting.pop(json.loads(line)["id"], None)
        except (ValueError, KeyError, TypeError, RecursionError):
            request = None
        return Rejected(reason, request, line[:_SHOWN])


_Said = tuple[str | None, str]  # a line of the writer, or None and what went wrong


def _offline(requests: Mapping[str, Mapping[str, Any]]) -> Generator[_Said, None, None]:
    for request in requests.values():
        yield json.dumps(answer_offline(request)), ""


def _understood(line: str, waiting: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any] | None, str]:
    """The answer in a line, or None and what is wrong with it."""
    try:
        answer = json.loads(line)
    except ValueError as error:
        return None, f"not JSON ({error})"
    except RecursionError:
        return None, "JSON that is nested too deeply"
    if not isinstance(answer, dict) or not isinstance(answer.get("id"), str):
        return None, "not an object with an id"
    request = waiting.get(answer["id"])
    if request is None:
        return None, f"id {answer['id'][:40]!r} was not asked, or is answered already"
    if "error" in answer:
        return None, f"the writer says: {_shown(answer['error'])}"
    wanted = _FIELDS.get(request["kind"], _QUESTION)
    for name in wanted:
        if not isinstance(answer.get(name), str) or not answer[name].strip():
            return None, f"no text {name!r}"
        if not answer[name].isprintable() and any("\ud800" <= letter <= "\udfff" for letter in answer[name]):
            return None, f"{name!r} holds half of a surrogate pair"
    quotes = answer.get("quotes", [])
    if not isinstance(quotes, list) or not all(isinstance(quote, str) and quote for quote in quotes):
        return None, "quotes is not a list of texts"
    return {name: answer[name] for name in ("id", *wanted)} | ({"quotes": quotes} if quotes else {}), ""


def _shown(error: Any) -> str:
    """The beginning of what a writer gave as error, fit for a file in UTF-8."""
    try:
        text = error if isinstance(error, str) else json.dumps(error)
    except RecursionError:
        text = "nested too deeply"
    return text[:_SHOWN].encode("utf-8", "backslashreplace").decode()


class _Command:
    """One run of a writer's command over some requests."""

    def __init__(self, writer: Writer, beside: Path) -> None:
        self._writer, self._errors = writer, beside.with_name("writer.stderr")

    def run(
        self, requests: Mapping[str, Mapping[str, Any]], waiting: Mapping[str, Mapping[str, Any]]
    ) -> Generator[_Said, None, None]:
        """Its lines as they come. What goes wrong with the command itself is said last.

        It is over when the command has ended, whoever else holds its pipes. One that has closed its stdout, or that nothing is
        waited for any more, has a moment to end by itself. What it started ends with it.

        Args:
            requests: what it is asked.
            waiting: those of them without an answer; the caller takes out what it gets.

        Raises:
            ConfigError: it cannot be started.
        """
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        lines: queue.Queue[bytes | None] = queue.Queue(maxsize=64)
        over, ended = threading.Event(), _Ended(process)
        threads = [
            threading.Thread(target=_feed, args=(process.stdin, requests), daemon=True),
            threading.Thread(target=_read, args=(process.stdout, ended.pipe, lines, over), daemon=True),
            threading.Thread(target=ended.watch, daemon=True),
        ]
        for thread in threads:
            thread.start()
        patience = self._writer.timeout
        try:
            leave = None  # when a command that has answered everything is ended
            while True:
                if not waiting and leave is None:
                    leave = time.monotonic() + min(_LEAVING, patience)
                try:
                    raw = lines.get(timeout=patience if leave is None else max(0.0, leave - time.monotonic()))
                except queue.Empty:
                    if leave is None:
                        yield None, f"no line of the command for {patience:g} s"
                    return
                if raw is None:
                    break
                if raw.strip():
                    yield raw.decode("utf-8", "replace").rstrip("\r\n"), ""
            # it has ended, or has closed its stdout: what it did not answer is known without its end
            if ended.event.wait(min(_LEAVING, patience)) and (code := process.wait()):
                yield None, f"the command ended with exit code {code}{self._last_words()}"
        finally:
            over.set()
            _end_group(process)
            process.wait()
            for thread in threads:  # each closes its pipe; a stdin that a child in a session of its own holds is not waited for
                thread.join(_ENDING)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._errors.open("wb") as errors:
            try:
                return subprocess.Popen(
                    self._writer.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,  # so that what it starts ends with it
                )
            except OSError as error:
                raise ConfigError(
                    f"cannot be started ({error.strerror})", where=self._writer.command[0], fix="give a program and its arguments"
                ) from None

    def _last_words(self) -> str:
        lines = self._errors.read_text("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:_SHOWN]}" if lines else ""


class _Ended:
    """The end of a process, as an event and as a pipe that is closed then. What it started is ended first."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.event = process, threading.Event()
        self.pipe, self._other_end = os.pipe()

    def watch(self) -> None:
        """Wait for it, without taking its exit code: as long as nobody has, no other process gets its number."""
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        _end_group(self._process)
        self.event.set()
        os.close(self._other_end)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started in its session; nothing where its exit code was taken: then that was done before."""
    if process.returncode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _feed(stdin: IO[bytes], requests: Mapping[str, Mapping[str, Any]]) -> None:
    with suppress(BrokenPipeError), stdin:  # it ended early: its exit code or the missing answers tell
        for request in requests.values():
            stdin.write(json.dumps(request, ensure_ascii=False).encode() + b"\n")


def _read(stdout: IO[bytes], ended: int, lines: queue.Queue[bytes | None], over: threading.Event) -> None:
    """Put the lines of `stdout` into the queue, then None. Closes both files."""

    def put(line: bytes | None) -> None:
        while not over.is_set():
            try:
                lines.put(line, timeout=0.1)
            except queue.Full:
                continue
            return

    with stdout:
        for line in _lines_of(_pieces(stdout.fileno(), ended)):
            put(line)
        put(None)
    os.close(ended)


def _pieces(stdout: int, ended: int) -> Iterator[bytes]:
    """What can be read of `stdout` until it is closed, or until `ended` is: then what stands in the pipe, and no more."""
    poll = select.poll()
    for file in (stdout, ended):
        poll.register(file, select.POLLIN)
    while ended not in (file for file, _ in poll.poll()):
        piece = os.read(stdout, _PIECE)
        if not piece:
            return
        yield piece
    left: int = struct.unpack("i", fcntl.ioctl(stdout, termios.FIONREAD, bytes(4)))[0]
    while left > 0 and (piece := os.read(stdout, min(left, _PIECE))):
        left -= len(piece)
        yield piece


def _lines_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their ends; one that is longer than `_LINE` in several."""
    line = bytearray()
    for piece in pieces:
        first, *others = piece.split(b"\n")
        line += first
        for other in others:
            yield bytes(line)
            line = bytearray(other)
        if len(line) >= _LINE:
            yield bytes(line)
            line.clear()
    if line:
        yield bytes(line)
