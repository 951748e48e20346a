"""The command line: help worth reading, quick starts without torch, one line per error."""

import subprocess
import sys
import time

import pytest

from mcore_longctx.cli.main import VERBS, build_parser, main, parse

NO_TORCH = [["--help"], *([verb, "--help"] for verb in VERBS), ["run", "ultralong-8b-4m", "--dry-run"]]


@pytest.mark.parametrize("arguments", NO_TORCH, ids=" ".join)
def test_verbs_that_need_no_torch_do_not_import_it(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mcore_longctx.cli.main import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert code == 0, code\n"
    )
    started = time.process_time(), time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert time.monotonic() - started[1] < 10  # half a second is the promise (docs/benchmarks.md); a busy machine gets room


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_says_what_it_is_for(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: mcore-longctx {verb}" in text
    assert len(text.split()) > 40


def test_an_error_is_one_line_on_stderr_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny-cpu", "rope.factr=2"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "mcore-longctx: override 'rope.factr=2': rope.factr: unknown name; did you mean 'factor'?\n"
    assert not captured.out


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["rnu"])
    assert end.value.code == 2
    assert "invalid choice: 'rnu'" in capsys.readouterr().err


def test_overrides_may_stand_behind_options() -> None:
    args = parse(["run", "tiny-cpu", "seed=1", "--dry-run", "rope.factor=2", "--until", "import", "name=x"])
    assert (args.overrides, args.dry_run, args.until) == (["seed=1", "rope.factor=2", "name=x"], True, "import")


@pytest.mark.parametrize(
    "arguments", [["run", "tiny-cpu", "--x=1"], ["run", "tiny-cpu", "--nope"], ["report", "runs/a", "b=c"]], ids=" ".join
)
def test_what_is_no_override_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_an_internal_error_where_no_log_can_be_written_is_told_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/proc")  # where nobody, not even root, can make a file
    monkeypatch.setattr("mcore_longctx.cli.doctor.run", lambda _: 1 // 0)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("mcore-longctx: ZeroDivisionError: integer division or modulo by zero (no log here: ")
    assert lines[0] == "Traceback (most recent call last):"
    assert sum(line == lines[0] for line in lines) == 1  # not one of the log as well
