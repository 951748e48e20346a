"""Plans are carried out to the byte, by any number of workers."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcore_longctx.convert.copying import execute as module
from mcore_longctx.convert.copying import kernels, units
from mcore_longctx.convert.plans.plan import Fill, Plan, SourceFile, TargetFile
from mcore_longctx.convert.views import TensorRows
from mcore_longctx.errors import CheckpointError, ConfigError, InUseError, StorageError
from tests.convert.made_plans import BF16, FP32, Made, Sources, forked, hashes, make_plan, run, wait, wait_for


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 300)
    monkeypatch.setattr(module, "SYNC_BYTES", 700)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 3),
    unit_bytes=st.sampled_from([1, 100, 1000, 1 << 20]),
    band_bytes=st.sampled_from([1, 64, 500, 1 << 20]),
    fsync=st.booleans(),
)
def test_any_plan_gives_its_bytes_with_any_workers(tmp_path_factory, seed, workers, unit_bytes, band_bytes, fsync) -> None:
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", unit_bytes)
        patch.setattr(kernels, "BAND_BYTES", band_bytes)
        made = make_plan(folder, seed)
        assert run(made.plan, folder / "out", workers=workers, fsync=fsync)
    made.check(folder / "out")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("out")) == ["out"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted([*made.expected, "config.json"])


@pytest.mark.parametrize("workers", [1, 3])
def test_sums_and_hashes_reach_finish_and_do_not_depend_on_workers(tmp_path: Path, workers: int) -> None:
    made = make_plan(tmp_path, 7, tensors=12)
    assert any(fill.scales for fill in made.plan.fills)
    seen = []
    for number, count in enumerate((1, workers)):
        out = tmp_path / f"out{number}"
        module.execute(made.plan, out, lambda _, written: seen.append(written), module.Execution(count, checksum=True))
        assert dict(seen[-1].sha256) == hashes(out)
    assert seen[0] == seen[1]
    rows = {fill.name: fill.rows for fill in made.plan.fills if fill.scales}
    assert {entry.name: entry.rows for entry in seen[0].quantized} == rows
    assert all(entry.squared > entry.squared_error > 0 for entry in seen[0].quantized if entry.rows > 3)


def test_one_large_region_is_shared_by_workers(tmp_path: Path) -> None:
    sources = Sources(tmp_path, random.Random(0))
    tensor, data = sources.tensor(500, 8, BF16)
    plan = Plan(
        "export",
        {},
        sources.write(),
        (TargetFile("w", len(data)),),
        (Fill(0, 0, tensor, 0, 500, 0, 8, BF16, "t"),),
        lambda: iter(()),
    )
    cut = units.cut(plan)
    assert len(cut) == 28  # 8000 bytes in units of at most 300, rows of 16
    assert max(sum(part.bytes for part in unit) for unit in cut) <= 300
    assert run(plan, tmp_path / "out", workers=3)
    assert (tmp_path / "out" / "w").read_bytes() == data


def test_offsets_beyond_four_gigabytes_and_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 64 << 20)
    rows, columns, marks = 3_000_000, 1024, {0: b"first", 5 << 30: b"middle", 6_144_000_000 - 4: b"last"}
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(100 + rows * columns * 2)
        for at, mark in marks.items():
            os.pwrite(file.fileno(), mark, 100 + at)
    tensor = TensorRows.stored(BF16, (rows, columns), source, 100)
    state = source.stat()
    fills = (Fill(0, 7, tensor, 0, rows, 0, columns, BF16, "t"),)
    plan = Plan(
        "import",
        {},
        (SourceFile(source, state.st_size, state.st_mtime_ns),),
        (TargetFile("w", 7 + rows * columns * 2),),
        fills,
        lambda: iter([(0, 0, b"header.")]),
    )
    assert run(plan, tmp_path / "out", workers=2)
    result = tmp_path / "out" / "w"
    assert result.stat().st_size == 7 + rows * columns * 2
    assert result.stat().st_blocks * 512 < 1 << 20  # holes stay holes
    with result.open("rb") as file:
        assert file.read(7) == b"header."
        for at, mark in marks.items():
            assert os.pread(file.fileno(), len(mark) + 2, 7 + at).rstrip(b"\0") == mark


def test_copy_file_range_that_is_refused_or_stops_short_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(tmp_path, 3, plain=True)
    real, calls = os.copy_file_range, []

    def short(source: int, target: int, count: int, *offsets: int) -> int:
        calls.append(count)
        if len(calls) % 3 == 0:
            raise OSError(18, "Invalid cross-device link")
        return 0 if len(calls) % 3 == 1 else real(source, target, min(count, 5), *offsets)

    monkeypatch.setattr(os, "copy_file_range", short)
    monkeypatch.setattr(kernels, "_PAGE", 1)  # every place is the beginning of a page
    assert run(made.plan, tmp_path / "out")
    assert len(calls) > 6
    made.check(tmp_path / "out")


def test_a_bar_on_a_terminal_and_silence_elsewhere(tmp_path: Path, capfd, monkeypatch) -> None:
    made = make_plan(tmp_path, 3)
    assert run(made.plan, tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run(made.plan, tmp_path / "again")
    assert f"0.00/{sum(fill.bytes for fill in made.plan.fills)} [" in capfd.readouterr().err


# ------------------------------------------------------------------ refused
def refused(kind: type[Exception], made: Made, out: Path, text: str, **how: object) -> None:
    with pytest.raises(kind, match=text) as caught:
        run(made.plan, out, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_an_output_that_is_there_is_refused(tmp_path: Path, what: str) -> None:
    made, out = make_plan(tmp_path, 1), tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[what]()
    refused(ConfigError, made, out, "out: output is already there")
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    made, out = make_plan(tmp_path, 1), tmp_path / "out"

    def slow(folder: Path, _written: object) -> None:
        (out / "kept").mkdir(parents=True)

    with pytest.raises(ConfigError, match="output is already there"):
        module.execute(made.plan, out, slow, module.Execution())
    assert [path.name for path in out.iterdir()] == ["kept"]
    (out / "kept").rmdir()
    out.rmdir()
    assert run(made.plan, out)
    made.check(out)


@pytest.mark.parametrize("what", ["file", "folder", "link", "journal of somebody else"])
def test_something_else_at_the_partial_name_is_refused_and_kept(tmp_path: Path, what: str) -> None:
    made, partial = make_plan(tmp_path, 1), tmp_path / "out.partial"
    if what == "file":
        partial.write_text("mine")
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to("elsewhere")
    else:
        partial.mkdir()
        (partial / "thesis.tex").write_text("mine")
        if what != "folder":
            (partial / "journal-0.jsonl").write_text("Dear diary\n")
    refused(ConfigError, made, tmp_path / "out", "out.partial: is in the way: not what an unfinished conversion leaves; move it")
    assert partial.is_symlink() or partial.is_file() or (partial / "thesis.tex").read_text() == "mine"
    assert not list((tmp_path / "elsewhere").iterdir()) if what == "link" else True


def test_a_file_that_somebody_put_into_the_partial_folder_is_named(tmp_path: Path) -> None:
    made, partial = make_plan(tmp_path, 1), tmp_path / "out.partial"
    stop_after(made, tmp_path / "out", 1)
    (partial / "notes.txt").write_text("mine")
    refused(ConfigError, made, tmp_path / "out", r"out.partial: holds notes.txt, which no conversion put there; move it away")
    (partial / "notes.txt").unlink()
    assert run(made.plan, tmp_path / "out")


def stop_after(made: Made, out: Path, calls: int) -> None:
    """Kill a run after so many of its units."""

    def killed() -> None:
        real, seen = kernels.Copier.copy, []

        def copy(self: kernels.Copier, unit: units.Unit) -> object:
            if len(seen) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(unit)
            return real(self, unit)

        kernels.Copier.copy = copy
        run(made.plan, out)

    assert wait(forked(killed)) == -signal.SIGKILL


def test_a_second_run_on_the_same_output_is_refused_while_the_first_lives(tmp_path: Path, monkeypatch) -> None:
    made, out = make_plan(tmp_path, 1), tmp_path / "out"
    real = kernels.Copier.copy

    def slow(self: kernels.Copier, unit: units.Unit) -> object:
        wait_for((tmp_path / "go").exists)
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", slow)
    first = forked(lambda: run(made.plan, out, workers=2))
    wait_for((tmp_path / "out.partial" / "journal-0.jsonl").exists)
    wait_for(lambda: "ready" in (tmp_path / "out.partial" / "journal-0.jsonl").read_text())
    refused(InUseError, made, out, "out: another run writes this output; wait for it or stop it")
    refused(InUseError, make_plan(tmp_path / "other", 2), out, "another run writes this output")
    (tmp_path / "go").touch()
    assert wait(first) == 0
    made.check(out)


def test_two_runs_at_the_same_moment_make_one_output(tmp_path: Path) -> None:
    for number in range(40):
        made, out = make_plan(tmp_path / str(number), number), tmp_path / f"out{number}"
        codes = sorted(wait(pid) for pid in [forked(lambda made=made, out=out: run(made.plan, out)) for _ in range(3)])
        assert codes[0] == 0
        assert set(codes[1:]) <= {2}
        made.check(out)


# ------------------------------------------------------------------ sources and space
def test_a_source_that_ends_too_early_is_one_line(tmp_path: Path) -> None:
    for seed in range(4):
        made = make_plan(tmp_path / str(seed), seed, tensors=10, plain=seed % 2 == 0)
        for source in made.plan.sources:
            os.truncate(source.path, source.bytes // 2)
        refused(CheckpointError, made, tmp_path / "out", r"source-\d.bin: ended while it was read; it changed or is damaged")
        assert not (tmp_path / "out").exists()
        (tmp_path / "out.partial").rename(tmp_path / str(seed) / "kept")


def test_a_source_that_vanished_is_one_line(tmp_path: Path) -> None:
    made = make_plan(tmp_path, 1, plain=True)
    made.plan.sources[0].path.rename(tmp_path / "elsewhere")
    refused(CheckpointError, made, tmp_path / "out", r"source-0.bin: (cannot be opened \()?No such file", workers=2)


def test_a_source_that_changes_meanwhile_is_noticed_at_the_end(tmp_path: Path) -> None:
    made = make_plan(tmp_path, 1)
    os.utime(made.plan.sources[0].path)
    refused(CheckpointError, made, tmp_path / "out", "source-0.bin: changed while it was read")
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(tmp_path, 1)
    real = os.statvfs(tmp_path)
    free = made.plan.bytes - 1
    monkeypatch.setattr(os, "statvfs", lambda _: type("S", (), {"f_bavail": free, "f_frsize": 1, "f_bsize": real.f_bsize}))
    for out in (tmp_path / "out", tmp_path / "new" / "folder" / "out"):
        before = sorted(tmp_path.rglob("*"))
        refused(StorageError, made, out, "out: needs .* are free on its file system; free some space")
        assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert run(made.plan, tmp_path / "out")


def test_too_little_space_to_go_on_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(tmp_path, 1)
    stop_after(made, tmp_path / "out", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: type("S", (), {"f_bavail": -1, "f_frsize": 1}))
        refused(StorageError, made, tmp_path / "out", "out: needs .* are free on its file system; free some space")
    assert {path: path.read_bytes() for path in (tmp_path / "out.partial").iterdir()} == before
    assert run(made.plan, tmp_path / "out")


def test_numbers_that_do_not_fit_name_the_tensor(tmp_path: Path) -> None:
    from mcore_longctx.errors import ConversionError
    from tests.convert.made_plans import FP16

    source = tmp_path / "s"
    source.write_bytes(b"\0\0\x80\x47" * 3)  # 65536.0
    fills = (Fill(0, 0, TensorRows.stored(FP32, (3, 1), source, 0), 0, 3, 0, 1, FP16, "lm_head.weight"),)
    plan = Plan("export", {}, (), (TargetFile("w", 6),), fills, lambda: iter(()))
    for workers in (1, 2):
        with pytest.raises(
            ConversionError, match=r"^lm_head.weight: 3 of 3 numbers looked at are too large for float16"
        ) as caught:
            run(plan, tmp_path / "out", workers=workers)
        assert caught.value.exit_code == 2


# ------------------------------------------------------------------ memory
COPY = """
import resource, sys
if len(sys.argv) > 1:
    from pathlib import Path
    from mcore_longctx.convert.copying.execute import Execution, execute
    from mcore_longctx.convert.plans.plan import Fill, Plan, TargetFile
    from mcore_longctx.convert.views import TensorRows
    from mcore_longctx.formats.dtypes import BY_TORCH
    source, out, rows, wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), BY_TORCH[sys.argv[4]]
    tensor = TensorRows.stored(BY_TORCH["bfloat16"], (rows, 1024), source, 0)
    fills = (Fill(0, 0, tensor, 0, rows, 0, 1024, wanted, "t"),)
    plan = Plan("import", {}, (), (TargetFile("w", fills[0].bytes),), fills, lambda: iter(()))
    execute(plan, out, lambda *_: None, Execution(fsync=False))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(("wanted", "megabytes"), [("bfloat16", 48), ("float32", 64)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, wanted: str, megabytes: int) -> None:
    rows, source = 100_000, tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(rows // 1000):
            file.write(random.Random(0).randbytes(2_048_000))

    def peak(*arguments: object) -> int:
        command = [sys.executable, "-c", COPY, *map(str, arguments)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)

    assert peak(source, tmp_path / "out", rows, wanted) - peak() < megabytes << 10  # 205 MB are read


# ------------------------------------------------------------------ ranges
def ranges(tmp_path: Path, *, cut: int = 0) -> tuple[Plan, bytes]:
    """Three neighbours of a source with a hole, of which the last two change places."""
    size, source = 1 << 21, tmp_path / "source"
    data = random.Random(0).randbytes(size) + bytes(size) + random.Random(1).randbytes(size)
    with source.open("wb") as file:
        for at in (0, 2 * size):
            os.pwrite(file.fileno(), data[at : at + size], at)
    os.truncate(source, 3 * size - cut)
    tensor = TensorRows.stored(BF16, (3072, 1024), source, 0)
    places = ((0, 0), (1024, 2 * size), (2048, size))
    fills = tuple(Fill(0, offset, tensor, row, 1024, 0, 1024, BF16, "t") for row, offset in sorted(places, key=lambda p: p[1]))
    return Plan("import", {}, (), (TargetFile("w", 3 * size),), fills, lambda: iter(())), data[:size] + data[2 * size :] + bytes(
        size
    )


def test_ranges_that_are_neighbours_on_one_side_alone_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for unit_bytes in (1 << 16, 3 << 20, 64 << 20):
        monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
        plan, expected = ranges(tmp_path)
        assert run(plan, tmp_path / f"out{unit_bytes}", fsync=False)
        assert (tmp_path / f"out{unit_bytes}" / "w").read_bytes() == expected


def test_neighbours_in_the_source_do_not_become_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 64 << 20)
    source = tmp_path / "s"
    source.write_bytes(bytes(range(200)))
    tensor = TensorRows.stored(BF16, (100,), source, 0)
    fills = (Fill(0, 0, tensor, 0, 50, 0, 1, BF16, "a"), Fill(0, 150, tensor, 50, 50, 0, 1, BF16, "b"))
    assert run(Plan("import", {}, (), (TargetFile("w", 250),), fills, lambda: iter(())), tmp_path / "out")
    assert (tmp_path / "out" / "w").read_bytes() == bytes(range(100)) + bytes(50) + bytes(range(100, 200))


def test_the_missing_end_of_a_source_is_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 64 << 20)
    plan, _ = ranges(tmp_path, cut=1 << 21)
    with pytest.raises(CheckpointError, match="source: ended while it was read; it changed or is damaged"):
        run(plan, tmp_path / "out", fsync=False)
