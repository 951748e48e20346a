"""examples/tiny_slurm: scripts as they are rendered today, and a README whose commands work in the order in which they stand."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from mcore_longctx.launch.chain import build_chain
from mcore_longctx.recipe.load import open_recipe
from tests.scripts import check_scripts
from tests.slurm.cluster import REPOSITORY, Cluster, wait_until

EXAMPLE = REPOSITORY / "examples" / "tiny_slurm"
SCRIPTS = sorted((EXAMPLE / "slurm").iterdir())


def test_rendered_again_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    fresh = build_chain(open_recipe("examples/tiny_slurm/recipe.yaml", [])).scripts
    assert list(fresh) == [path.name for path in SCRIPTS]
    different = [path.name for path in SCRIPTS if fresh[path.name] != path.read_text()]
    assert not different, f"`mcore-longctx launch examples/tiny_slurm/recipe.yaml` writes these otherwise: {different}"


def test_bash_and_shellcheck_take_every_script() -> None:
    check_scripts(*SCRIPTS)


def test_the_commands_of_the_readme_one_after_the_other(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    run, logs = tmp_path / "runs" / "tiny-slurm", tmp_path / "runs" / "tiny-slurm" / "logs" / "extend"

    def shell(block: str) -> str:
        # every block in a shell of its own, so the first one goes before each
        program = f"set -e\n{blocks[0]}\n{block}"
        variables = cluster.environment(stub=True, SLURM_SANDBOX_DIR=str(cluster.folder))
        del variables["SLURM_CONF"]  # the README's own command finds it
        result = subprocess.run(["bash", "-c", program], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
        return result.stdout

    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 7
    start, launch, watch, stop_it, preempt, read, end = blocks
    assert "tools/slurm_sandbox.sh start" in start
    assert end == "tools/slurm_sandbox.sh stop\n"  # the sandbox of these tests is stopped by another hand

    jobs = {name: int(job) for job, name in re.findall(r"^job (\d+): (\S+)$", shell(launch), re.MULTILINE)}
    assert list(jobs) == ["00-prepare", "20-extend", "90-finish"]
    train = jobs["20-extend"]

    def trained(steps: int, slices: int) -> None:
        log = run / "stub.log"
        wait_until(lambda: log.exists() and log.read_text().count("step") >= steps, 90, lambda: cluster.story(train))
        assert log.read_text().count("start at") == slices

    trained(2, slices=1)
    (run / "metrics").mkdir()
    (run / "metrics" / "extend.jsonl").write_text('{"step": 1}\n')  # the stub measures nothing
    assert str(train) in shell(watch).split()
    shell(stop_it)
    wait_until((logs / "slices.jsonl").exists, 60, lambda: cluster.story(train))
    trained(5, slices=2)
    shell(preempt)
    assert cluster.end_of(jobs["90-finish"]) == ("COMPLETED", "0:0"), cluster.story(train)
    lines = [json.loads(line) for line in shell(read).splitlines() if '"verdict"' in line]
    assert [(one["asked"], one["state"], one["verdict"]) for one in lines[:1]] == [("USR1", "stopped", "requeue")]
    assert [one["verdict"] for one in lines] == ["requeue", "requeue", "done"]


def test_the_table_of_the_readme_is_of_this_recipe() -> None:
    recipe = open_recipe(str(EXAMPLE / "recipe.yaml"), []).recipe
    (stage,) = recipe.stages
    text = (EXAMPLE / "README.md").read_text()
    micro_batches = f"{stage.num_microbatches} micro-batches of {stage.seq_length:,} tokens"
    assert f"{stage.iterations} steps of\n{micro_batches}" in text
    rows = re.findall(r"^\| (\d+) \| (\d\.\d{4}) \|", text, re.MULTILINE)
    assert [int(step) for step, _ in rows] == [1, 4, 8, 12]
