"""Folders appear whole or not at all, and a manifest notices what formats do not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.manifest import read_manifest, sha256_file, staged_folder, verify_manifest, write_atomic, write_manifest
from tests.data.mutations import mutations


def make(folder: Path) -> Path:
    with staged_folder(folder) as part:
        (part / "sub").mkdir()
        (part / "a.bin").write_bytes(bytes(range(256)) * 16)
        (part / "sub" / "b.txt").write_text("text")
        write_manifest(part, "checkpoint", seed=3)
    return folder


def test_a_finished_folder_verifies_and_names_its_facts(tmp_path: Path) -> None:
    manifest = verify_manifest(make(tmp_path / "done"), "checkpoint")
    assert manifest["seed"] == 3
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt"}
    assert manifest["versions"]["numpy"]
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_shares_look_at_every_file_once_and_name_the_first_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged_folder(tmp_path / "done") as part:
        for number in range(11):
            (part / f"{number:02d}").write_bytes(bytes([number]) * 100)
        write_manifest(part, "checkpoint")
    seen: list[str] = []
    monkeypatch.setattr("mcore_longctx.manifest.sha256_file", lambda path: seen.append(path.name) or sha256_file(path))
    for rank in range(3):
        verify_manifest(tmp_path / "done", "checkpoint", share=(rank, 3))
    assert sorted(seen) == [f"{number:02d}" for number in range(11)]
    for number in (10, 4):
        (tmp_path / "done" / f"{number:02d}").write_bytes(b"x" * 100)
    for rank in (0, 2):  # theirs are whole
        verify_manifest(tmp_path / "done", "checkpoint", share=(rank, 3))
    with pytest.raises(CheckpointError, match="done/04: contents differ"):
        verify_manifest(tmp_path / "done", "checkpoint", share=(1, 3))


@settings(max_examples=40, deadline=None)
@given(offset=st.integers(0, 4095), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int) -> None:
    folder = make(tmp_path_factory.mktemp("flip") / "done")
    data = bytearray((folder / "a.bin").read_bytes())
    data[offset] ^= 1 << bit
    (folder / "a.bin").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"a\.bin: contents differ from the manifest's sha256; the checkpoint is damaged"):
        verify_manifest(folder, "checkpoint")
    verify_manifest(folder, "checkpoint", hashes=False)  # sizes are unchanged


def test_what_is_missing_cut_or_foreign_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "done")
    with pytest.raises(CheckpointError, match="is a folder of kind 'checkpoint', expected data"):
        verify_manifest(folder, "data")
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.bin: 5 bytes, the manifest says 4,096"):
        verify_manifest(folder, "checkpoint")
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin: listed in the manifest but missing"):
        verify_manifest(folder, "checkpoint")
    (folder / "manifest.json").write_text(json.dumps({"files": 3}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged manifest"):
        verify_manifest(folder, "checkpoint")
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json: this checkpoint was not finished"):
        verify_manifest(folder, "checkpoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        verify_manifest(tmp_path / "empty", "checkpoint")


def refusal(folder: Path) -> str:
    try:
        verify_manifest(folder, "checkpoint")
    except CheckpointError as error:
        return str(error)
    return ""


def test_every_one_of_1500_mutations_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path / "done")
    raw = (folder / "manifest.json").read_bytes()
    for what, changed in mutations(raw, 1500, seed=6):
        (folder / "manifest.json").write_bytes(changed)
        assert "damaged manifest" in refusal(folder), what


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"seed": 3', b'"seed": 4'),
        (b'"seed": 3', b'"seed":  3'),  # the same JSON
        (b'"a.bin"', b'"a.bim"'),
        (b'"bytes": 4096', b'"bytes": 4097'),
        (b"\n}\n", b"\n}"),
        (b"\n}\n", b"\n}\n\n"),
        (b"\n}\n", b"\r\n}\r\n"),
    ],
)
def test_a_manifest_that_was_edited_is_refused_though_it_is_valid_json(tmp_path: Path, old: bytes, new: bytes) -> None:
    folder = make(tmp_path / "done")
    raw = (folder / "manifest.json").read_bytes()
    assert raw.count(old) == 1
    json.loads(raw.replace(old, new))
    (folder / "manifest.json").write_bytes(raw.replace(old, new))
    assert r"manifest.json: damaged manifest (its checksum differs); restore this checkpoint from a copy" in refusal(folder)


def test_a_manifest_without_its_own_checksum_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "done")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest)[-1] == "sha256"
    del manifest["sha256"]
    text = json.dumps(manifest, indent=1)
    (folder / "manifest.json").write_text(text + "\n")
    assert "damaged manifest" in refusal(folder)
    digest = hashlib.sha256(text.encode()).hexdigest()  # what it is: the sha256 of all the rest
    (folder / "manifest.json").write_text(f'{text.removesuffix("}").rstrip()},\n "sha256": "{digest}"\n}}\n')
    assert refusal(folder) == ""


def test_only_the_files_that_are_named_are_listed_and_known_hashes_are_not_taken_again(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "left-out").write_text("x")
    (tmp_path / "big").write_bytes(b"abc")
    (tmp_path / "small").write_bytes(b"de")
    known = hashlib.sha256(b"what was written").hexdigest()
    write_manifest(tmp_path, "data", files=("small", "big"), sha256={"big": known, "elsewhere": "00"}, seed=1)
    rows = read_manifest(tmp_path, "data", "export")["files"]
    assert rows == {
        "big": {"bytes": 3, "sha256": known},
        "small": {"bytes": 2, "sha256": hashlib.sha256(b"de").hexdigest()},
    }
    with pytest.raises(CheckpointError, match="big: contents differ from the manifest's sha256"):
        verify_manifest(tmp_path, "data")
    write_manifest(tmp_path, "tokens", files=())
    assert verify_manifest(tmp_path, "tokens")["files"] == {}


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staged_folder(tmp_path / "out") as part:
            (part / "a").write_text("x")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="output folder is already there"), staged_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_after_kill_9_only_a_partial_folder_is_left_and_the_next_run_removes_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mcore_longctx.manifest import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as part:\n    (part / 'a').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(ConfigError, match=f"process {child.pid} is writing this folder"), staged_folder(tmp_path / "out"):
            pass
        os.kill(child.pid, signal.SIGKILL)
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["out.partial"]
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_atomic_replaces_the_whole_text(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "long old text")
    write_atomic(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1
