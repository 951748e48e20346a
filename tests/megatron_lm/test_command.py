"""The command itself: exit codes, lines on stderr, ranks, checkouts of Megatron-LM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import MEGATRON_VERSION, training_program_context
from mcore_longctx.megatron_lm import launcher
from tests.megatron_lm.program import HAS_PROGRAM, MODEL, PLAIN_ROPE, TRAINING, losses, needs_program, run

RUN = [*MODEL, *TRAINING, *PLAIN_ROPE, "--mock-data", "--train-iters", "3"]


def test_a_refusal_is_one_line_and_exit_code_2() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mcore_longctx.megatron_lm", "--cp-size", "4"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    if HAS_PROGRAM:
        wanted = "command line: unrecognized arguments: --cp-size 4; --help lists all flags"
    else:
        wanted = (
            f"megatron-core {MEGATRON_VERSION} is installed, and Megatron-LM's training program comes with 0.19 or newer;"
            " pip install 'megatron-core>=0.19,<0.20' (Python 3.12), or train with mcore-longctx train"
        )
    assert result.stderr == f"mcore-longctx: {wanted}\n"
    assert result.stdout == ""
    assert result.returncode == 2


@needs_program
def test_help_lists_megatrons_flags_and_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        launcher.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m mcore_longctx.megatron_lm FLAGS\n")
    assert "--rope-scaling-factor" in printed
    assert "--longctx-recompute {none,full,attention_kept}" in printed


def test_only_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", rank), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        assert launcher.main(["--cp-size", "4"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_ranks_that_srun_started_are_told_to_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "4711",
    }
    told = {"RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "14711"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    for name in told:
        monkeypatch.setenv(name, "")  # so that it is taken away again afterwards
        monkeypatch.delenv(name)
    launcher._set_torchrun_variables()
    assert {name: os.environ[name] for name in told} == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirect does nothing where CUDA is available")
def test_the_redirect_of_the_program_leaves_torch_as_it_was() -> None:
    names = ("Stream", "stream", "get_device_properties", "memory_allocated", "current_device")
    before = [getattr(torch.cuda, name) for name in names]
    with training_program_context():
        assert torch.cuda.get_device_properties(0).major == 10
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert [getattr(torch.cuda, name) for name in names] == before


@needs_program
def test_replaced_functions_of_megatron_are_given_back() -> None:
    from megatron.core.datasets import utils
    from megatron.training import training

    from mcore_longctx.megatron_lm.hosting import hosted

    names = ("get_megatron_optimizer", "initialize_megatron", "set_jit_fusion_options")
    before = [*(getattr(training, name) for name in names), utils.compile_helpers]

    def fail_inside() -> None:
        with hosted():
            assert training.get_megatron_optimizer is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [*(getattr(training, name) for name in names), utils.compile_helpers] == before


CHECKOUT = """
from mcore_longctx.megatron_lm.own_program import datasets_provider as train_valid_test_datasets_provider

def forward_step(data_iterator, model):
    from mcore_longctx.megatron_lm import own_program
    print("a forward step of the checkout")
    return own_program.forward_step(data_iterator, model)

def get_embedding_ranks(ranks):
    return sorted({ranks[0], ranks[-1]})
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What is looked at of a Megatron-LM checkout."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    major, minor = MEGATRON_VERSION.split(".")[:2]
    (tmp_path / "megatron" / "core" / "package_info.py").write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = 0\n")
    (tmp_path / "pretrain_gpt.py").write_text(CHECKOUT)
    return tmp_path


@needs_program
@pytest.mark.multiproc
def test_pretrain_gpt_of_a_checkout_is_used_where_there_is_one(checkout: Path) -> None:
    printed = run([*RUN, "--megatron-lm", str(checkout)])
    assert printed.count("a forward step of the checkout") == 3 * 2
    assert f"batches and loss of {checkout / 'pretrain_gpt.py'}" in printed
    assert losses(printed) == losses(run(RUN))


@needs_program
def test_a_checkout_that_does_not_fit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcore_longctx.megatron_lm.programs import OWN_PROGRAM, find_program

    monkeypatch.delenv("MEGATRON_LM_PATH", raising=False)
    assert find_program([]) is OWN_PROGRAM
    info = checkout / "megatron" / "core" / "package_info.py"
    info.write_text(info.read_text().replace("MINOR = ", "MINOR = 1"))
    with pytest.raises(ConfigError, match=r"this Megatron-LM is of version 0\.119, the installed megatron-core of"):
        find_program([f"--megatron-lm={checkout}"])
    monkeypatch.setenv("MEGATRON_LM_PATH", str(checkout))
    with pytest.raises(ConfigError, match=r"version 0\.119"):
        find_program([])
    monkeypatch.delenv("MEGATRON_LM_PATH")
    monkeypatch.syspath_prepend(str(checkout))
    with pytest.raises(ConfigError, match=r"version 0\.119"):
        find_program([])
    (checkout / "pretrain_gpt.py").unlink()
    with pytest.raises(ConfigError, match=r"--megatron-lm: there is no pretrain_gpt\.py in .*; give the folder of"):
        find_program(["--megatron-lm", str(checkout)])
