"""`.ci/run`: the gate does not open where the proof on a real SLURM could have been made and was not. make and id are stubs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

GATE = Path(__file__).parents[1] / ".ci" / "run"
SLURM = ("sbatch", "slurmctld", "slurmd", "munged")
MAKE = """#!/bin/sh
echo "$1 CI=$CI" >> "$ASKED"
[ "$1" = demo ] && echo "Verdict: the context was extended"
exit 0
"""


def run_gate(
    folder: Path, *, user: int, there: tuple[str, ...], **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (folder / ".ci").mkdir()
    shutil.copy(GATE, folder / ".ci" / "run")
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env", "dirname", "tee", "grep", "rm"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    for name, text in {"make": MAKE, "id": f"#!/bin/sh\necho {user}\n", **dict.fromkeys(there, "#!/bin/sh\n")}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    # the folders of system programs are named in the gate: where they have SLURM, it cannot be taken away
    text = (folder / ".ci" / "run").read_text()
    assert text.count(":/usr/sbin:/sbin") == 1
    (folder / ".ci" / "run").write_text(text.replace(":/usr/sbin:/sbin", ""))
    variables = {"PATH": str(tools), "ASKED": str(folder / "asked"), **environment}
    result = subprocess.run([folder / ".ci" / "run"], env=variables, capture_output=True, text=True, check=False)
    return result, (folder / "asked").read_text().splitlines()


@pytest.mark.parametrize("lacks", ["sbatch", "slurmd"])
def test_root_without_slurm_fails_with_one_line(tmp_path: Path, lacks: str) -> None:
    result, asked = run_gate(tmp_path, user=0, there=tuple(name for name in SLURM if name != lacks))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"root, but no {lacks} after `make slurm`" in result.stderr
    assert [line.split()[0] for line in asked] == ["slurm"]


@pytest.mark.parametrize(("user", "there"), [(0, SLURM), (1000, ())], ids=["root with slurm", "a user without"])
def test_else_everything_is_run(tmp_path: Path, user: int, there: tuple[str, ...]) -> None:
    result, asked = run_gate(tmp_path, user=user, there=there)
    assert result.returncode == 0, result.stderr
    assert {"slurm", "test", "lint", "types", "contract", "test-long", "demo"} == {line.split()[0] for line in asked}


def test_examples_of_hypothesis_are_the_same_everywhere(tmp_path: Path) -> None:
    _, asked = run_gate(tmp_path, user=1000, there=())
    assert {line.split()[1] for line in asked} == {"CI=true"}


def test_the_name_of_a_ci_stays(tmp_path: Path) -> None:
    _, asked = run_gate(tmp_path, user=1000, there=(), CI="woodpecker")
    assert {line.split()[1] for line in asked} == {"CI=woodpecker"}
