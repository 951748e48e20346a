"""Thousands of damaged files through the public functions: refused in one line of ours, or read rightly. Memory and time are bounded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.convert.fuzz_cases import TARGETS, prepare
from tests.convert.hf_folders import LLAMA3_ROPE, llama_config, random_weights, write_folder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CASES = 1000  # of each target
PARTS = 4
SECONDS = 1.0  # CPU, of the slowest case; a file here has some kilobytes
GROWTH = 96 << 20  # of the resident memory, over a thousand cases
STOPPED = """
import os, sys
from pathlib import Path
from mcore_longctx.convert import Execution, import_hf
from mcore_longctx.convert.copying import kernels, units
from tests.convert.fuzz_cases import UNIT_BYTES
units.UNIT_BYTES = UNIT_BYTES
copy = kernels.Copier.copy
done = []
def stop(self, unit):
    if len(done) == {after}: os._exit(9)
    done.append(unit)
    return copy(self, unit)
kernels.Copier.copy = stop
import_hf(Path(sys.argv[1]), Path(sys.argv[2]), how=Execution(fsync=False))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    config = llama_config(rope_scaling=LLAMA3_ROPE, max_position_embeddings=65536)
    weights = random_weights(config)
    write_folder(folder / "hf", config, weights)
    write_folder(folder / "sharded", config, weights, shards=3)
    prepare(folder)
    stopped = [sys.executable, "-c", STOPPED.format(after=3), str(folder / "hf"), str(folder / "half")]
    assert subprocess.run(stopped, check=False, cwd=ROOT, env=ENVIRONMENT, timeout=60).returncode == 9
    assert (folder / "half.partial" / "journal-0.jsonl").read_text().count('"unit"') == 3
    return folder


def judged(folder: Path, target: str, seed: int, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.convert.fuzz_cases", target, str(folder), str(seed), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=100, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_refused_in_a_line_or_read_rightly(folder: Path, target: str, part: int) -> None:
    count = CASES // PARTS
    report = judged(folder, target, seed=1000 + part, count=count)
    assert not report["wrong"], report["wrong"][:5]
    assert report["refused"] + report["accepted"] == count
    assert report["slowest"] < SECONDS
    assert report["grown"] < GROWTH
    if target not in ("common", "items", "journal"):  # hardly anything of these is needed
        assert report["refused"] > count // 4


def test_the_fuzzer_notices_what_is_accepted_wrongly(folder: Path, tmp_path: Path) -> None:
    for name in ("hf", "sharded", "megatron", "half.partial"):
        shutil.copytree(folder / name, tmp_path / name)
    original = json.loads((folder / "original.json").read_text())
    changed = {name: digest[::-1] for name, digest in original.items()}
    (tmp_path / "original.json").write_text(json.dumps(changed))
    report = judged(tmp_path, "index", seed=1, count=100)
    assert any("accepted, with another" in wrong for wrong in report["wrong"])
