"""Starting ranks: one rank directly, several under torchrun, srun inside a SLURM allocation; the truth about how they ended."""

import os
import signal
import subprocess
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
    monkeypatch.setattr(local, "_command", lambda *asked: [sys.executable, "-c", code])
    with pytest.raises(kind, match=text) as caught:
        local.launch_ranks(["train"], 2, log=tmp_path, status=file)
    assert str(caught.value) == text


def test_a_killed_verb_is_a_failure_with_a_place_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "STATUS").write_text("done 0 old\n")
    monkeypatch.setattr(local, "_command", lambda *asked: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(TrainingError, match=r"train ended with code -9 .details in .*stderr\.log"):
        local.launch_ranks(["train"], 1, log=tmp_path, status=tmp_path / "STATUS")


def test_more_ranks_than_a_machine_can_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        LayoutError,
        match=r"train wants 256,000 ranks, this machine starts at most .*; start `run` inside a SLURM allocation, let `launch` write",
    ):
        local.launch_ranks(["train"], 256_000, log=tmp_path)


STEP = """\
#!/bin/bash
# srun as far as a launcher sees it: every node in turn, with its own number
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
echo "srun ${options[*]}"
for node in 0 1; do SLURM_NODEID=$node SLURM_LAUNCH_NODE_IPADDR=10.0.0.7 "$@" || exit; done
"""
TORCHRUN = """\
#!/bin/bash
echo "torchrun $*"
trap -p
"""


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a batch script on two nodes, with an srun and a torchrun that tell what they are given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", STEP), ("torchrun", TORCHRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in (("JOB_ID", "12345"), ("JOB_NUM_NODES", "2"), ("JOB_NODELIST", "n[0-1]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURMD_NODENAME", "n0")
    return programs


def test_in_an_allocation_each_node_runs_one_torchrun_that_ignores_the_stop_signals(
    allocation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(local.SRUN_OPTIONS, "'--container-image=a b.sqsh'")
    command = local._command(["train", "a recipe.yaml", "--stage", "x"], 16, 8)
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # a suite in the background or under nohup ignores these
    said = [line for line in lines if line not in ("trap -- '' SIGINT", "trap -- '' SIGQUIT", "trap -- '' SIGHUP")]
    assert said[0] == (
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=120 --cpu-bind=none --container-image=a b.sqsh"
    )
    for node in (0, 1):
        line, *traps = said[1 + 3 * node : 4 + 3 * node]
        assert line == (
            f"torchrun --node_rank={node} --master_addr=10.0.0.7 --nproc_per_node=8 --nnodes=2 --master_port=22345 "
            "--signals_to_handle=SIGINT,SIGHUP,SIGQUIT -m mcore_longctx train a recipe.yaml --stage x"
        )
        assert sorted(traps) == ["trap -- '' SIGTERM", "trap -- '' SIGUSR1"]


def test_torchrun_has_the_options_that_are_given_to_it(allocation: Path) -> None:
    """Against the parser of the installed torch: `--signals_to_handle` is not in every version."""
    from torch.distributed.run import get_args_parser

    command = local._command(["train", "r.yaml"], 16, 8)
    options = command[command.index("torchrun") + 1 :]
    args = get_args_parser().parse_args(["--node_rank=1", "--master_addr=10.0.0.7", *options])
    assert (args.nnodes, args.nproc_per_node, args.module, args.training_script) == ("2", "8", True, "mcore_longctx")
    assert args.signals_to_handle == "SIGINT,SIGHUP,SIGQUIT"


def test_ranks_of_one_node_need_no_srun_on_it_and_one_rank_needs_no_torchrun(
    allocation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local._command(["convert"], 1, 8)[0] == sys.executable
    assert local._command(["evaluate"], 8, 8)[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    monkeypatch.delenv("SLURMD_NODENAME")  # salloc's shell on a login node
    monkeypatch.setattr(
        local, "_scontrol", lambda *words: "n0\nn1\n" if "hostnames" in words else "NodeName=n0 NodeAddr=10.9.8.7 x=y"
    )
    command = local._command(["evaluate"], 8, 8)
    assert command[:2] == ["srun", "--nodes=1"]
    assert "--master_addr=10.9.8.7 " in command[command.index("-c") + 1]


def test_an_allocation_that_is_too_small_is_named(allocation: Path) -> None:
    with pytest.raises(LayoutError, match=r"train wants 32 ranks on 4 nodes, this allocation has 2; ask for more nodes"):
        local._command(["train", "r.yaml"], 32, 8)


@pytest.mark.multiproc
def test_the_first_signal_asks_the_ranks_of_a_training_the_second_ends_them(tmp_path: Path) -> None:
    """srun hands SIGUSR1 to the ranks, which save; SIGTERM is for those that do not listen."""
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'asked\\n'))\n"  # print may not be called inside a print
        "os.write(1, b'ready\\n')\n"
        "time.sleep(0.0)\n"
        "while True: time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with local._forwarded_signals(child, saves=True):
            os.kill(os.getpid(), signal.SIGTERM)
            assert child.stdout.readline() == "asked\n"
            os.kill(os.getpid(), signal.SIGTERM)
            assert child.wait(30) == -signal.SIGTERM
    finally:
        child.kill()
        child.communicate()
