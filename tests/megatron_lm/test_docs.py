"""`docs/megatron_lm.md`: its commands work, and it names every flag that is refused."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_longctx.megatron_lm import launcher
from tests.megatron_lm.program import losses, needs_program

pytestmark = needs_program

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "megatron_lm.md").read_text(encoding="utf-8")
SCRIPT, ULTRALONG = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.multiproc
@pytest.mark.timeout(600)
def test_the_example_trains_and_goes_on(tmp_path: Path) -> None:
    for name in ("examples", "mcore_longctx"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def steps(command: list[str]) -> list[int]:
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=250)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
        assert process.returncode == 0, printed
        return list(losses(printed))

    command = shlex.split(SCRIPT)
    assert steps(command) == [1, 3, 4]
    assert steps([*command[:-1], "5", "--override-opt_param-scheduler"]) == [5]


def test_the_command_for_4m_tokens_is_not_refused() -> None:
    words = shlex.split(ULTRALONG.replace("\\\n", " "))
    line = launcher.read_arguments(words[words.index("mcore_longctx.megatron_lm") + 1 :])
    assert (line.args.seq_length, line.args.rope_scaling_factor, line.args.longctx_mlp_tile) == (4_194_304, 512.0, 8192)


def test_every_flag_of_ours_and_every_one_that_is_refused_by_name_is_on_the_page() -> None:
    source = "".join(
        (ROOT / "mcore_longctx" / "megatron_lm" / name).read_text() for name in ("flags.py", "refusals.py", "rope.py")
    )
    ours = set(re.findall(r'"(--(?:longctx|megatron)-[a-z-]+)"', source))
    assert len(ours) == 7
    refused = {"--yaml-cfg", *re.findall(r'_refuse\(\s*f?"(--[a-z-]+)', source)}
    assert not [flag for flag in ours | refused if flag not in PAGE]
