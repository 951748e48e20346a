"""Pickles that would run something, in every place where a checkpoint has one: refused or left alone, and nothing runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_longctx.convert import Execution, compare, export_hf, import_hf, inspect_folder, open_checkpoint
from mcore_longctx.errors import LongctxError
from tests.convert.fuzz_pickles import archive, hostile_pickles
from tests.convert.hf_folders import llama_config, write_folder

KINDS = list(hostile_pickles(Path("canary")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    import_hf(write_folder(folder / "hf", llama_config()), folder / "megatron", how=Execution(fsync=False))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_is_real(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = hostile_pickles(canary)[kind]
    script = "import pickle, sys, contextlib\nwith contextlib.suppress(Exception): pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", script], input=data, check=True, timeout=60)
    assert canary.exists()


def look_at_everything(folder: Path) -> list[str]:
    """Call all that reads a checkpoint; the messages of what was refused."""
    out, config = folder / "out", folder / "hf"
    calls: list[Callable[[], object]] = [
        lambda: inspect_folder(folder / "megatron"),
        lambda: open_checkpoint(folder / "megatron"),
        lambda: export_hf(folder / "megatron", out / "1", how=Execution(fsync=False)),
        lambda: export_hf(folder / "megatron", out / "2", config=config, how=Execution(fsync=False)),
        lambda: compare(folder / "megatron", folder / "hf"),
        lambda: inspect_folder(folder / "hf"),
        lambda: import_hf(folder / "hf", out / "3", how=Execution(fsync=False)),
    ]
    refused = []
    for call in calls:
        try:
            call()
        except LongctxError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)
    return refused


@pytest.mark.parametrize("card", ["with a card", "of another program"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_wherever_it_stands(good: Path, kind: str, card: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = hostile_pickles(canary)[kind]
    places: dict[str, Callable[[Path], object]] = {
        "metadata": lambda folder: (folder / "megatron" / ".metadata").write_bytes(data),
        "common": lambda folder: (folder / "megatron" / "common.pt").write_bytes(archive(data)),
        "common, bare": lambda folder: (folder / "megatron" / "common.pt").write_bytes(data),
        "items": lambda folder: _replace_items(folder / "megatron" / "__0_0.distcp", data),
        "bin": lambda folder: _as_bin(folder / "hf", data),
    }
    for place, spoil in places.items():
        folder = tmp_path / place
        shutil.copytree(good, folder)
        if card == "of another program":
            for name in ("manifest.json", "mcore_longctx.json"):
                (folder / "megatron" / name).unlink()
            shutil.rmtree(folder / "megatron" / "hf")
        spoil(folder)
        refused = look_at_everything(folder)
        assert not canary.exists()
        if place in ("metadata", "items", "bin"):
            assert refused
        if place == "metadata" and card == "of another program":
            assert any("not allowed in a checkpoint; refused" in message or "opcode" in message for message in refused)
        shutil.rmtree(folder)


def _replace_items(path: Path, data: bytes) -> None:
    """Every item of the file becomes an archive with this pickle, as far as there is room."""
    item = archive(data)
    size = path.stat().st_size
    path.write_bytes((item * (size // len(item) + 1))[:size])


def _as_bin(hf: Path, data: bytes) -> None:
    (hf / "model.safetensors").unlink()
    (hf / "pytorch_model.bin").write_bytes(archive(data))
