"""No file of a checkpoint can make a reader wait for ever, fill the memory or crash: it is refused in one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.convert import import_hf
from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.common_state import read_common_state
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.formats.safetensors_io import read_folder, read_json
from mcore_longctx.formats.torch_bin import read_bin_folder
from mcore_longctx.manifest import read_manifest, write_manifest
from mcore_longctx.reading import read_json_object
from mcore_longctx.recipe import read_card
from tests.convert.hf_folders import llama_config, write_folder

READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda folder: read_json(folder / "config.json"),
    "model.safetensors": read_folder,
    "model.safetensors.index.json": read_folder,
    "pytorch_model.bin": read_bin_folder,
    "pytorch_model.bin.index.json": read_bin_folder,
    ".metadata": read_torch_dist,
    "metadata.json": read_torch_dist,
    "__0_0.distcp": read_torch_dist,
    "common.pt": read_common_state,
    "mcore_longctx.json": read_card,
    "manifest.json": lambda folder: read_manifest(folder, "checkpoint"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    import_hf(write_folder(folder / "hf", llama_config()), folder / "megatron")
    return folder / "megatron"


def folder_with(name: str, saved: Path, folder: Path) -> Path:
    """What is read before `name`, and where it goes."""
    folder.mkdir()
    if name in (".metadata", "__0_0.distcp"):
        (folder / "metadata.json").write_bytes((saved / "metadata.json").read_bytes())
    if name == "__0_0.distcp":
        (folder / ".metadata").write_bytes((saved / ".metadata").read_bytes())
        first = min(saved.glob("*.distcp"))
        return folder / first.name
    return folder / name


def in_time(read: Callable[[Path], Any], folder: Path) -> str:
    """The line of the error; a reader that hangs is a failure by the alarm, not a test that never ends."""
    import signal

    def ring(*_: object) -> None:
        raise AssertionError("hung")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    try:
        with pytest.raises(CheckpointError) as caught:
            read(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_a_fifo_is_refused_and_never_opened(name: str, saved: Path, tmp_path: Path) -> None:
    path = folder_with(name, saved, tmp_path / "folder")
    os.mkfifo(tmp_path / "fifo")
    path.symlink_to(tmp_path / "fifo")  # also behind a link
    assert in_time(READERS[name], path.parent).startswith(f"{path}: is a FIFO, expected a file")


@pytest.mark.parametrize("name", READERS)
def test_a_broken_or_looping_link_is_named(name: str, saved: Path, tmp_path: Path) -> None:
    path = folder_with(name, saved, tmp_path / "folder")
    path.symlink_to("nowhere")
    assert in_time(READERS[name], path.parent).startswith(f"{path}: a broken link, to nowhere; copy or download")
    path.unlink()
    path.symlink_to(path.name)
    assert in_time(READERS[name], path.parent).startswith(f"{path}: a link that leads to itself, to {path.name}")


def test_a_socket_a_device_and_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        assert "socket: is a socket, expected a file" in in_time(read_json, Path("socket"))
    assert in_time(read_json, Path("/dev/zero")) == "/dev/zero: is a device, expected a file"
    assert in_time(read_json, tmp_path).endswith("is a folder, expected a file")


@pytest.mark.parametrize("name", ["mcore_longctx.json", "manifest.json", "metadata.json", ".metadata", "config.json"])
def test_a_huge_file_costs_no_memory(name: str, saved: Path, tmp_path: Path) -> None:
    """In a process that may not have that much."""
    path = folder_with(name, saved, tmp_path / "folder")
    with path.open("wb") as file:
        file.truncate(5 << 30)
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from pathlib import Path\n"
        "from mcore_longctx.convert import open_checkpoint\n"
        "from mcore_longctx.manifest import read_manifest\n"
        "from mcore_longctx.recipe import read_card\n"
        "from mcore_longctx.errors import LongctxError\n"
        "name, folder = sys.argv[1], Path(sys.argv[2])\n"
        "read = {'mcore_longctx.json': read_card, 'manifest.json': lambda f: read_manifest(f, 'checkpoint')}\n"
        "try:\n    read.get(name, open_checkpoint)(folder)\n"
        "except LongctxError as error:\n    print(error)\n"
    )
    if name in ("metadata.json", ".metadata"):
        for beside in ("mcore_longctx.json", "hf/config.json"):
            (path.parent / beside).parent.mkdir(exist_ok=True)
            (path.parent / beside).write_bytes((saved / beside).read_bytes())
    command = [sys.executable, "-c", program, name, str(path.parent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"{path}: 5,368,709,120 bytes, too large for a"), done
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_json_has_no_loopholes(text: str, message: str, tmp_path: Path) -> None:
    for name in ("mcore_longctx.json", "metadata.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json_object(tmp_path / "metadata.json", 1 << 20, "a test")
    with pytest.raises(CheckpointError, match=rf"mcore_longctx\.json: .*{message}"):
        read_card(tmp_path)
    with pytest.raises(CheckpointError, match=rf"metadata\.json: .*{message}"):
        read_torch_dist(tmp_path)


@pytest.mark.parametrize("iteration", ["1e999", "1.5", "-1", "true", "null", '"7"'])
def test_a_card_with_an_impossible_iteration_is_damaged(iteration: str, saved: Path, tmp_path: Path) -> None:
    text = (saved / "mcore_longctx.json").read_text().replace('"iteration": 0', f'"iteration": {iteration}')
    (tmp_path / "mcore_longctx.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"mcore_longctx\.json: damaged or of another version"):
        read_card(tmp_path)


def test_a_sealed_manifest_with_an_impossible_size_is_damaged(tmp_path: Path) -> None:
    from mcore_longctx import manifest

    (tmp_path / "x").write_text("x")
    write_manifest(tmp_path, "checkpoint")
    text = json.dumps({"format": 1, "kind": "checkpoint", "files": {"x": {"bytes": 0}}}, indent=1)
    manifest.write_atomic(tmp_path / "manifest.json", manifest._sealed(text.replace('"bytes": 0', '"bytes": 1e999')))
    with pytest.raises(CheckpointError, match="damaged manifest"):
        read_manifest(tmp_path, "checkpoint")
