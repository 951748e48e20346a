"""`examples/megatron_lm` and `docs/args.md`: the script holds what `args` prints, and the commands of the pages work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from tests.scripts import check_scripts

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "megatron_lm"
PAGE = (ROOT / "docs" / "args.md").read_text(encoding="utf-8")
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")
RANKS = {"MASTER_ADDR": "node1", "SLURM_JOB_ID": "77"}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["args", *words]) == 0
    return capsys.readouterr().out


def words_that_torchrun_gets(tmp_path: Path, script: list[str]) -> list[str]:
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "CUDA_DEVICE_MAX_CONNECTIONS=$CUDA_DEVICE_MAX_CONNECTIONS" torchrun "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, **RANKS, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(script, capture_output=True, text=True, check=True, timeout=30, cwd=tmp_path, env=environment)
    return result.stdout.splitlines()


def test_the_script_for_4m_tokens_holds_what_args_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys, "ultralong-8b-4m", "--stage", "extend", "--for", "megatron-lm", "--format", "line")
    expanded = subprocess.run(
        ["bash", "-euc", f'printf "%s\\n" {line}'],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={**os.environ, **RANKS},
    )
    found = words_that_torchrun_gets(tmp_path, ["bash", str(EXAMPLE / "train_ultralong_8b_4m.sh")])
    assert found == expanded.stdout.splitlines()
    assert len(found) > 120


def test_positional_parameters_of_the_script_reach_the_flags(tmp_path: Path) -> None:
    script = ["bash", str(EXAMPLE / "train_ultralong_8b_4m.sh"), "my runs/first", "boards", "tokenizer", "samples/long"]
    found = words_that_torchrun_gets(tmp_path, script)
    for name, value in {
        "--save": "my runs/first/checkpoints",
        "--load": "my runs/first/checkpoints",
        "--pretrained-checkpoint": "my runs/first/start",
        "--tensorboard-dir": "boards",
        "--tokenizer-model": "tokenizer",
        "--longctx-data": "samples/long",
        "--rdzv-endpoint": "node1:29500",
        "--rdzv-id": "77",
    }.items():
        assert found[found.index(name) + 1] == value


def test_bash_and_shellcheck_take_every_script() -> None:
    check_scripts(*EXAMPLE.glob("*.sh"))


def commands(page: str) -> list[str]:
    blocks: list[str] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    return blocks


@pytest.mark.parametrize("block", [*commands(PAGE), *commands(README)], ids=lambda block: block[:60].replace("\n", " "))
def test_the_commands_of_the_pages_work(block: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = f'mcore-longctx() {{ {shlex.quote(sys.executable)} -m mcore_longctx "$@"; }}\nset -eu\n{block}'
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if "--program stock" in block:
        assert result.returncode == 2
        said = next(text.strip() for text in PAGE.splitlines() if text.startswith("    mcore-longctx: "))
        assert result.stderr.strip().endswith(said.split("ultralong-8b-4m.yaml:22", 1)[1])
        assert re.search(r"ultralong-8b-4m\.yaml:22: rope: ", result.stderr)
        return
    assert result.returncode == 0, result.stderr
    shown = re.search(re.escape(block) + r"```\n\nprints, cut short:\n\n```\n(.*?)```", PAGE, re.DOTALL)
    rest = result.stdout.splitlines()
    for text in shown[1].splitlines() if shown else []:
        rest = rest[rest.index(text) + 1 :]  # in this order


def test_steps_of_the_readme_are_those_that_args_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "ultralong-8b-4m", "--stage", "extend", "--for", "megatron-lm")
    once = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith(("#   mkdir", "#   echo"))]
    readme = [line.strip() for line in README.splitlines()]
    for line in " && ".join(once).split(" && "):
        assert line in readme
    assert "--steps import,data-extend" in text
    assert "--steps import,data-extend" in README
