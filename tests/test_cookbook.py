"""Every command of the cookbook, in the order of its page, on small stand-ins; and every line that the page says one sees."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "cookbook").glob("*.md"))
BLOCK = re.compile(r"```(bash|text)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the pages name: a Llama with Llama-3.1's rope, what Megatron-LM would save of it, a model of another kind."""
    folder = tmp_path_factory.mktemp("models")
    hf = folder / "Llama-3.1-8B"
    make = [sys.executable, str(ROOT / "tools" / "bench" / "random_llama.py"), "tiny", str(hf)]
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    assert len(list(hf.glob("*.safetensors"))) > 1
    run = folder / "megatron-lm-run"
    assert cli("convert", "import", str(hf), str(run / "iter_0000100"), folder=folder)[0] == 0
    for name in ("mcore_longctx.json", "manifest.json"):
        (run / "iter_0000100" / name).unlink()
    shutil.rmtree(run / "iter_0000100" / "hf")
    (run / "latest_checkpointed_iteration.txt").write_text("100")
    shutil.copytree(hf, folder / "Other-7B")
    config = json.loads((hf / "config.json").read_text())
    (folder / "Other-7B" / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
    return folder


def cli(*arguments: str, folder: Path) -> tuple[int, str]:
    """Exit code, and all that is seen."""
    command = [sys.executable, "-m", "mcore_longctx", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", [path for path in PAGES if path.stem != "README"], ids=lambda path: path.stem)
def test_every_command_of_the_page_shows_what_the_page_says(page: Path, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    shutil.copytree(models, folder)
    seen = ""
    commands = lines = 0
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "bash":
            for line in text.splitlines():
                command, _, remark = line.partition("#")
                program, *arguments = shlex.split(command)
                assert program == "mcore-longctx"
                code, seen = cli(*arguments, folder=folder)
                expected = int(remark.split()[-1]) if remark else 0
                assert code == expected, f"{line}\n{seen}"
                commands += 1
        else:
            for line in text.splitlines():
                assert shown(line, seen), f"{line!r} is not in\n{seen}"
                lines += 1
    assert commands
    assert lines


def shown(line: str, seen: str) -> bool:
    """Whether a line of `seen` is this one; `...` stands for anything."""
    pattern = r"\s*" + ".*".join(re.escape(part) for part in line.strip().split("..."))
    return any(re.fullmatch(pattern, other) for other in seen.splitlines())


def test_a_line_that_is_not_shown_is_noticed() -> None:
    assert shown("equal: ... bytes", "A\n equal: 3 tensors, 5 bytes\n")
    assert not shown("equal: ... bytes", "equal: 3 tensors, 5 bytes more")
    assert not shown("equal", "not equal")


def test_the_index_has_every_page_and_no_other() -> None:
    index = (ROOT / "docs" / "cookbook" / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\(([\w.-]+\.md)\)", index)
    assert sorted(linked) == sorted(path.name for path in PAGES if path.stem != "README")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
