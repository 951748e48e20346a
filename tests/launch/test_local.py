"""Starting ranks: one rank directly, several under torchrun, srun inside a SLURM allocation; the truth about how they ended."""

import sys
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.errors import LayoutError, LongctxError, StoppedBySignal, TrainingError
from mcore_longctx.launch import local


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_keeps_its_line_and_its_exit_code(tmp_path: Path, ranks: int) -> None:
    with pytest.raises(LongctxError, match=r"no such recipe file, and no preset of this name; did you mean 'tiny-cpu'") as caught:
        local.launch_ranks(["train", "tiny-cup"], ranks, log=tmp_path / "logs")
    assert caught.value.exit_code == 2
    # the line itself, or, where rank 0 was stopped before it, the note of the other rank
    assert any("tiny-cup" in (tmp_path / "logs" / name).read_text() for name in ("stderr.log", "error"))


def test_the_rank_that_fails_first_leaves_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun stops the other ranks at once: rank 0 may never come to say its line."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(local.ERROR_NOTE, str(tmp_path / "error"))
    assert main(["train", "tiny-cup"]) == 2
    assert (tmp_path / "error").read_text().startswith("failed 2 tiny-cup: no such recipe file")
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["error"]


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        ("stopped 75 SIGTERM at iteration 12, checkpoint saved\n", StoppedBySignal, "SIGTERM at iteration 12, checkpoint saved"),
        ("failed 2 checkpoints/base: no checkpoint here\n", LongctxError, "checkpoints/base: no checkpoint here"),
        ("failed 1 loss is nan\n", TrainingError, "loss is nan"),
    ],
)
def test_the_status_file_tells_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, kind: type, text: str
) -> None:
    file = tmp_path / "STATUS"
    code = f"import pathlib, sys; pathlib.Path({str(file)!r}).write_text({status!r}); sys.exit(1)"
    monkeypatch.setattr(local, "_command", lambda arguments, ranks: [sys.executable, "-c", code])
    with pytest.raises(kind, match=text) as caught:
        local.launch_ranks(["train"], 2, log=tmp_path, status=file)
    assert str(caught.value) == text


def test_a_killed_verb_is_a_failure_with_a_place_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "STATUS").write_text("done 0 old\n")
    monkeypatch.setattr(local, "_command", lambda arguments, ranks: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(TrainingError, match=r"train ended with code -9 .details in .*stderr\.log"):
        local.launch_ranks(["train"], 1, log=tmp_path, status=tmp_path / "STATUS")


def test_more_ranks_than_a_machine_can_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LayoutError,
        match=r"train wants 256,000 ranks, this machine starts at most .*; start `run` inside a SLURM allocation of 256,000 tasks",
    ):
        local.launch_ranks(["train"], 256_000, log=tmp_path)


def test_inside_a_slurm_allocation_srun_starts_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert local._command(["train", "r.yaml"], 256)[:3] == ["srun", "--ntasks=256", "--kill-on-bad-exit=1"]
    assert local._command(["convert"], 1)[0] == sys.executable
