"""tools/install_slurm.sh: installs what is missing where it can, touches nothing else, and never fails a run. apt-get is a stub."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "install_slurm.sh"
APT_GET = """#!/bin/sh
echo "$@" >> "$ASKED"
[ -x "$POLICY_RC_D" ] || { echo "services would start" >> "$ASKED"; }
[ -e "$ASKED.offline" ] && { echo "E: Temporary failure resolving" >&2; exit 100; }
exit 0
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH without SLURM, with an apt-get that notes what it is asked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sh", "env", "mktemp", "rm", "chmod", "tail"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(found)
    for name, text in (("apt-get", APT_GET), ("id", "#!/bin/sh\necho 0\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tmp_path


def install(machine: Path) -> str:
    variables = {"PATH": str(machine / "bin"), "ASKED": str(machine / "asked"), "POLICY_RC_D": str(machine / "policy-rc.d")}
    result = subprocess.run([SCRIPT], env=variables | {"TMPDIR": str(machine)}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not list(machine.glob("tmp.*"))
    assert result.stdout.count("\n") == 1
    return result.stdout


def asked(machine: Path) -> list[str]:
    path = machine / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_what_is_missing_is_installed_and_no_service_starts(machine: Path) -> None:
    assert install(machine) == "slurm: installed munge slurmctld slurmd slurm-client\n"
    assert asked(machine) == ["update", "install -y --no-install-recommends munge slurmctld slurmd slurm-client"]
    assert not (machine / "policy-rc.d").exists()


def test_a_policy_of_the_machine_stays(machine: Path) -> None:
    (machine / "policy-rc.d").write_text("#!/bin/sh\nexit 0\n")
    (machine / "policy-rc.d").chmod(0o755)
    install(machine)
    assert (machine / "policy-rc.d").read_text() == "#!/bin/sh\nexit 0\n"


def test_a_machine_that_has_it_is_not_touched(machine: Path) -> None:
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        (machine / "bin" / name).write_text("#!/bin/sh\n")
        (machine / "bin" / name).chmod(0o755)
    assert install(machine) == "slurm: installed\n"
    assert asked(machine) == []


def test_without_a_network_the_run_goes_on_and_the_tests_will_skip(machine: Path) -> None:
    (machine / "asked.offline").touch()
    assert "apt-get failed (no network?): the tests on a real SLURM will skip" in install(machine)
    assert not (machine / "policy-rc.d").exists()


@pytest.mark.parametrize("lacks", ["root", "apt-get"])
def test_where_nothing_can_be_installed_one_line_says_so(machine: Path, lacks: str) -> None:
    if lacks == "root":
        (machine / "bin" / "id").write_text("#!/bin/sh\necho 1000\n")
    else:
        (machine / "bin" / "apt-get").unlink()
    said = install(machine)
    assert ("only root can install" if lacks == "root" else "no apt-get") in said
    assert said.endswith("the tests on a real SLURM will skip\n")
    assert asked(machine) == []
