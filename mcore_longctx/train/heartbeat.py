"""A sign of life of each rank, and the end of a job in which one no longer moves.

`logs/<stage>/heartbeat/rank<N>` is one line, `TIME BORDER PHASE WHERE`: Unix seconds at which the rank passed its last border, how many it
has passed, what it does since, and where. A thread of each rank writes it, and looks whether the next border is late:

    micro-batch     3 x the median of this start's micro-batches, the exchange of gradients after the last one included
                    (with pipeline parallelism: of its passes over all micro-batches of a step)
    update          3 x the median of what follows: sums of the losses, norm of the gradients, optimizer, metrics
    loading, saving, and everything until the first step is done: nine tenths of the timeout of the process groups

With a mask between documents a micro-batch costs what its documents cost. Its limit is 3 x the median of what those seen would have taken
with its work: seconds x the ratio of the works where it has more of it, which is too much rather than too little, for only a part
of the time grows with the square of a document. A job that is stopped and continued as a whole (`scontrol suspend`) is not late: the
time in which the watching thread did not run either does not count. One rank alone that is stopped is found by the others.

Limits are never less than a sixtieth of that timeout (a minute of an hour), and never more than nine tenths of it: at the timeout itself the process
groups fail too, and can name no place. The rank that finds the job late writes STATUS `hung`, its stacks to `logs/<stage>/rank<N>.stacks`,
and ends its process; the others follow, because they are late too or because their connection breaks.
"""

from __future__ import annotations

import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

__all__ = ["Heartbeat", "Phase"]

Phase = Literal["loading", "micro-batch", "update", "saving"]

_FACTOR = 3
_MEDIAN_OF = 101  # the last ones
_STDERR = 2
_LINE = 160  # bytes: the file never changes its size, so that a reader sees a whole line


@dataclass(frozen=True)
class _Border:
    """The last border that was passed: replaced as one object, so that the other thread needs no lock."""

    number: int
    phase: Phase
    where: str
    clock: float  # time.monotonic()
    unix: float
    work: float = 1.0  # of the micro-batch that begins, in any unit


class Heartbeat:
    """Of one rank of one job.

    Args:
        log_folder: `logs/<stage>`.
        rank: this rank.
        timeout_seconds: of the process groups.
        hung: told once, in one line, what is late; it writes STATUS. Called in another thread.
        end: ends the process.
    """

    def __init__(
        self,
        log_folder: Path,
        rank: int,
        *,
        timeout_seconds: float,
        hung: Callable[[str], None],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.folder, self.rank = log_folder, rank
        self.most, self.least = 0.9 * timeout_seconds, timeout_seconds / 60
        self._hung, self._end = hung, end
        # seconds and work of each
        self._seen: dict[Phase, deque[tuple[float, float]]] = {
            "micro-batch": deque(maxlen=_MEDIAN_OF),
            "update": deque(maxlen=_MEDIAN_OF),
        }
        self._has_done_a_step = False
        self._last = _Border(0, "loading", "", time.monotonic(), time.time())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        folder = self.folder / "heartbeat"
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / f"rank{self.rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        os.close(self._descriptor)

    def passed(self, phase: Phase, where: str, *, work: float = 1.0) -> None:
        """A border is passed; `phase` begins. Costs microseconds: the files are written by the other thread.

        Args:
            phase: what begins.
            where: in words without a line break, such as `iteration 12, micro-batch 3`.
            work: what its slowest part costs, above 0; only ratios matter.
        """
        now, before = time.monotonic(), self._last
        if before.phase in self._seen:
            self._seen[before.phase].append((now - before.clock, before.work))
        self._has_done_a_step |= before.phase == "update"
        self._last = _Border(before.number + 1, phase, where, now, time.time(), work)

    def limit(self, phase: Phase, work: float = 1.0) -> tuple[float, str]:
        """Seconds that `phase` may take, and where the number comes from."""
        known = self._seen.get(phase)
        if not known or not self._has_done_a_step:
            return self.most, "nine tenths of the timeout of the process groups"
        median = statistics.median(seconds * max(1.0, work / before) for seconds, before in tuple(known))
        limit = min(max(_FACTOR * median, self.least), self.most)
        if limit == self.least:
            return limit, f"the least; {_FACTOR} x the median of {median:.2g} s is less"
        return limit, f"{_FACTOR} x the median of {median:.3g} s"

    # ------------------------------------------------------------------ the other thread

    def _watch(self) -> None:
        written, written_at = -1, -self.least
        pause = min(1.0, self.least / 20)
        number, lost, before = 0, 0.0, time.monotonic()
        while not self._stopped.wait(pause):
            last, now = self._last, time.monotonic()
            if last.number != number:
                number, lost = last.number, 0.0
            slept, before = now - max(before, last.clock), now
            if slept > pause + self.least / 4:  # this thread did not run either: the whole process was stopped
                lost += slept - pause
            # hundreds of ranks write to one file server: rarely, but before anybody can be late
            if last.number != written and now - written_at >= self.least / 4:
                self._write(last)
                written, written_at = last.number, now
            limit, reason = self.limit(last.phase, last.work)
            # A thread that holds Python's lock for ever stops this one too; faulthandler's own needs no lock. It only tells: it cannot
            # know whether the job was suspended. The other ranks, or the timeout of the process groups, end the job.
            faulthandler.dump_traceback_later(2 * limit, file=_STDERR)
            if now - last.clock - lost > limit:
                self._give_up(last, now - last.clock - lost, limit, reason)
                break
        faulthandler.cancel_dump_traceback_later()

    def _give_up(self, last: _Border, seconds: float, limit: float, reason: str) -> None:
        stacks = self.folder / f"rank{self.rank}.stacks"
        what = f"no micro-batch for {seconds:.3g} s" if last.phase == "micro-batch" else f"{last.phase} for {seconds:.3g} s"
        line = (
            f"rank {self.rank}: {what} ({reason}) in {last.where or 'the start'}{self._who_is_behind(last)}; stacks in {stacks}"
        )
        try:
            with suppress(OSError):
                self._hung(line)
            with suppress(OSError), stacks.open("w", encoding="utf-8") as file:
                file.write(f"{line}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            # the other ranks that wait are late at this moment too: let them write their stacks before their connections break
            time.sleep(min(5.0, limit / 2))
        finally:  # whatever happens: the job must not stand still for want of a disk
            self._end(1)

    def _who_is_behind(self, last: _Border) -> str:
        """The rank that has passed the fewest borders, where that is another one: the others wait for it."""
        found: list[tuple[int, int, str]] = []
        for path in (self.folder / "heartbeat").glob("rank*"):
            try:
                _, borders, phase, where = path.read_text(encoding="utf-8").split(" ", 3)
                found.append((int(borders), int(path.name.removeprefix("rank")), f"{phase} {where.strip()}"))
            except (OSError, ValueError):
                continue
        fewest, rank, text = min(found, default=(last.number, self.rank, ""))
        return f"; rank {rank} is behind, last seen: {text}" if fewest < last.number else ""

    def _write(self, border: _Border) -> None:
        line = f"{border.unix:.3f} {border.number} {border.phase} {border.where}"[: _LINE - 1]
        try:
            os.pwrite(self._descriptor, f"{line:<{_LINE - 1}}\n".encode(), 0)
        except OSError:  # a full disk is for the next save to tell; a job must not end for want of a sign of life
            return
