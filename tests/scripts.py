"""Job scripts before their judges."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["check_scripts"]


def check_scripts(*scripts: Path) -> None:
    """Assert that bash can read each script and that shellcheck, of the test environment, finds nothing in any."""
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
    beside = Path(sys.executable).with_name("shellcheck")
    judge = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert judge is not None, "no shellcheck: pip install -e '.[dev]'"
    # SC1091: what a site sources is not here
    found = subprocess.run(
        [judge, "--shell=bash", "--exclude=SC1091", *scripts], capture_output=True, text=True, check=False, timeout=240
    )
    assert found.returncode == 0, found.stdout + found.stderr
