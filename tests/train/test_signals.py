"""SIGTERM and SIGUSR1 are remembered, whichever comes first and however often, and handed back at the end."""

from __future__ import annotations

import os
import signal

import pytest

from mcore_longctx.train.signals import StopRequest


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGUSR1), (signal.SIGUSR1, signal.SIGTERM)])
def test_the_first_signal_is_remembered(first: signal.Signals, second: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in (first, second)]
    with StopRequest() as stop:
        assert stop.number == 0
        for number in (first, first, second):
            os.kill(os.getpid(), number)
        assert stop.number == first
        assert StopRequest.name(stop.number) == first.name
    assert [signal.getsignal(number) for number in (first, second)] == before
