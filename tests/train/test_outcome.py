"""How a job ends: one line, one STATUS, one exit code for all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_longctx.errors import CheckpointError, DataError, StoppedBySignal
from mcore_longctx.train.control import PeerFailed
from mcore_longctx.train.outcome import Outcome


def ranks(folder: Path, count: int = 2) -> list[Outcome]:
    outcomes = [Outcome(folder / "logs", rank) for rank in range(count)]
    outcomes[0].write_running()
    for outcome in outcomes:
        outcome.started()
    return outcomes


def agreed(error: Exception) -> Exception:
    error.agreed = True  # type: ignore[attr-defined]
    return error


def status(folder: Path) -> str:
    return (folder / "logs" / "STATUS").read_text()


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_status_tells_running_and_done(tmp_path: Path) -> None:
    first, second = ranks(tmp_path)
    assert status(tmp_path).startswith("running - process ")
    assert (second.done("36 iterations"), first.done("36 iterations")) == (0, 0)
    assert status(tmp_path) == "done 0 36 iterations\n"


def test_an_error_of_all_ranks_is_said_once_by_rank_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ranks(tmp_path)
    assert second.failed(agreed(CheckpointError("damaged", where="here"))) == 2
    assert capsys.readouterr().err == ""
    assert first.failed(agreed(CheckpointError("damaged", where="here"))) == 2
    assert capsys.readouterr().err == "mcore-longctx: here: damaged\n"
    assert status(tmp_path) == "failed 2 here: damaged\n"


def test_a_stop_is_75(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ranks(tmp_path)
    stop = agreed(StoppedBySignal("SIGTERM at iteration 12, checkpoint saved", fix="start again to go on"))
    assert (first.failed(stop), second.failed(stop)) == (75, 75)
    assert status(tmp_path) == "stopped 75 SIGTERM at iteration 12, checkpoint saved; start again to go on\n"


def test_one_rank_that_fails_speaks_and_the_others_leave_with_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ranks(tmp_path)
    assert second.failed(DataError("sample 7 is broken", where="data")) == 2
    # the connection of rank 0 breaks in consequence
    assert first.failed(raised(RuntimeError("Connection closed by peer\nand more"))) == 2
    assert capsys.readouterr().err == "mcore-longctx: data: sample 7 is broken\n"
    assert status(tmp_path) == "failed 2 data: sample 7 is broken\n"
    assert "Connection closed by peer" in (tmp_path / "logs" / "rank0.log").read_text()


def test_an_unexpected_exception_leaves_its_traceback_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ranks(tmp_path)
    assert second.failed(raised(ZeroDivisionError("by nothing"))) == 1
    assert first.failed(raised(PeerFailed())) == 1
    log = tmp_path / "logs" / "rank1.log"
    assert capsys.readouterr().err == f"mcore-longctx: rank 1: ZeroDivisionError: by nothing (details in {log})\n"
    assert "Traceback" in log.read_text()
    assert not (tmp_path / "logs" / "rank0.log").exists()


def test_what_fails_before_the_folder_is_held_leaves_status_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks(tmp_path)
    running = status(tmp_path)
    late = [Outcome(tmp_path / "logs", rank) for rank in range(2)]
    assert [outcome.failed(CheckpointError("in use")) for outcome in late] == [2, 2]
    assert capsys.readouterr().err == "mcore-longctx: in use\n"
    assert status(tmp_path) == running


def test_a_new_start_forgets_the_old_failure(tmp_path: Path) -> None:
    first, _ = ranks(tmp_path)
    assert first.failed(DataError("old")) == 2
    first, second = ranks(tmp_path)
    assert second.failed(raised(ZeroDivisionError())) == 1
    assert "failed 1 rank 1: ZeroDivisionError (details" in status(tmp_path)
