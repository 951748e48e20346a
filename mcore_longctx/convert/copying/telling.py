"""A rank that fails before it has a journal tells rank 0, which would wait for its share."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from mcore_longctx.convert.copying.journal import Journal, journal_name, record_in
from mcore_longctx.convert.copying.step import Step
from mcore_longctx.errors import InUseError, LongctxError, StoppedBySignal, StorageError

__all__ = ["failures_told"]

TELL_SECONDS = 60.0  # to wait for rank 0
POLL_SECONDS = 0.2


@contextmanager
def failures_told(out: Path, step: Step) -> Iterator[None]:
    """Tell rank 0 that we do not come, where the block fails before we have a journal: it would wait for our share.

    Nothing is made for that: a rank that fails waits up to TELL_SECONDS until rank 0 has made our journal. Where rank 0 fails,
    too, it never does.
    """
    try:
        yield
    except Exception as error:
        # what all ranks get, what cannot be written, and what rank 0 is to blame for needs no telling
        if step.rank > 0 and not isinstance(error, (StoppedBySignal, StorageError, InUseError)):
            with contextlib.suppress(LongctxError, OSError):
                _tell(out, step, str(error))
        raise


def _tell(out: Path, step: Step, what: str) -> None:
    folder, aside = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial-journal")
    end = time.monotonic() + TELL_SECONDS
    while time.monotonic() < end and not os.path.lexists(out) and not os.path.lexists(aside):
        record = record_in(folder / journal_name(0), step.name)
        if record.ready and record.facts is not None:
            journal = Journal(folder / journal_name(step.rank), step.name, fsync=True, make=False)
            with closing(journal):
                journal.begin(record.facts)
                journal.add({"failed": what})
            return
        time.sleep(POLL_SECONDS)
