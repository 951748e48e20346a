"""Journals: what they say after a kill, what they refuse, and in which words."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcore_longctx.convert.copying import execute as module
from mcore_longctx.convert.copying import journal, kernels, units
from mcore_longctx.convert.copying.journal import Journal, read_record
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.errors import ConfigError, InUseError
from tests.convert.made_plans import Made, forked, hashes, make_plan, run, wait


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    monkeypatch.setattr(module, "SYNC_BYTES", 1)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_plan(tmp_path / "sources", 12, tensors=8, size=60)


def killed_before_unit(made: Made, out: Path, number: int, **how: object) -> None:
    def run_and_die() -> None:
        real, seen = kernels.Copier.copy, []

        def copy(self: kernels.Copier, unit: units.Unit) -> object:
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(unit)
            return real(self, unit)

        kernels.Copier.copy = copy
        run(made.plan, out, **how)

    assert wait(forked(run_and_die)) == -signal.SIGKILL


def units_copied(made: Made, out: Path, patch: pytest.MonkeyPatch, **how: object) -> int:
    """How many units a run to the end copies."""
    real, seen = kernels.Copier.copy, []
    with patch.context() as context:
        context.setattr(kernels.Copier, "copy", lambda self, unit: (seen.append(unit), real(self, unit))[1])
        run(made.plan, out, **how)
    made.check(out)
    return len(seen)


# ------------------------------------------------------------------ torn and damaged
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.floats(0, 1),
    tail=st.sampled_from([b"", b"\0\0\0\0", b"\xff{", b'{"unit": "x"}\n', b'{"unit": 1e400}\n', b'{"unit": 3\n', b"[]\n"]),
)
def test_a_journal_that_ends_anywhere_leads_to_the_same_bytes(part: float, tail: bytes, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("torn")
    made = make_plan(folder / "sources", 12, tensors=8, size=60)
    killed_before_unit(made, folder / "out", 5, fsync=False)
    path = folder / "out.partial" / "journal-0.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    end = first + int(part * (len(whole) - first))
    path.write_bytes(whole[:end] + tail)
    run(made.plan, folder / "out", fsync=False)
    made.check(folder / "out")


@given(data=st.binary(max_size=200), start=st.text(max_size=3))
def test_no_bytes_break_the_reader(data: bytes, start: str) -> None:
    first = b'{"journal": 1, "plan": "p"}\n{"start": "", "fsync": true}\n'
    read_record(data, start)
    read_record(first + data, start)
    assert read_record(first + b'{"unit": 4}\n' + data, start).units[4] == []


@pytest.mark.parametrize("line", [b'{"unit": 1e400}', b'{"unit": -1e400}', b'{"file": 1e400, "sha256": ""}', b'{"unit": NaN}'])
def test_a_number_that_is_none_is_damage(line: bytes) -> None:
    first = b'{"journal": 1, "plan": "p"}\n{"start": "", "fsync": true}\n'
    record = read_record(first + line + b'\n{"unit": 4}\n', "")
    assert (record.units, record.sha256, record.readable) == ({}, {}, len(first))


def test_only_whole_lines_count() -> None:
    text = b'{"journal": 1, "plan": "p"}\n{"start": "a", "fsync": true}\n{"unit": 1}\n{"unit": 2}\n{"unit": 33}'
    assert set(read_record(text, "b").units) == {1, 2}
    assert set(read_record(text[:-7], "b").units) == {1, 2}
    assert set(read_record(text[: text.index(b"2}")], "b").units) == {1}
    assert read_record(text[:10], "b").facts is None


# ------------------------------------------------------------------ which lines are believed
def test_with_fsync_an_earlier_boot_counts_and_without_it_does_not(made: Made, tmp_path: Path, monkeypatch) -> None:
    whole = len(units.cut(made.plan))
    for fsync, redone in ((True, whole - 5), (False, whole)):
        out = tmp_path / f"out-{fsync}"
        killed_before_unit(made, out, 5, fsync=fsync)
        with monkeypatch.context() as patch:
            patch.setattr("mcore_longctx.convert.copying.partial.boot_id", lambda: "the boot after a crash")
            assert units_copied(made, out, monkeypatch) == redone
    killed_before_unit(made, tmp_path / "same", 5, fsync=False)
    assert units_copied(made, tmp_path / "same", monkeypatch) == whole - 5  # a killed process loses nothing


def test_an_unsynced_start_after_a_synced_one_is_believed_for_itself_alone(made: Made, tmp_path: Path, monkeypatch) -> None:
    out, whole = tmp_path / "out", len(units.cut(made.plan))
    killed_before_unit(made, out, 5, fsync=True)
    killed_before_unit(made, out, 4, fsync=False)
    monkeypatch.setattr("mcore_longctx.convert.copying.partial.boot_id", lambda: "the boot after a crash")
    assert units_copied(made, out, monkeypatch) == whole - 5


def test_a_line_is_written_after_its_unit_is_made_last(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    copy, sync, add = kernels.Copier.copy, os.fdatasync, Journal.add
    monkeypatch.setattr(module, "SYNC_BYTES", 2000)
    monkeypatch.setattr(kernels.Copier, "copy", lambda self, unit: (events.append("copy"), copy(self, unit))[1])
    monkeypatch.setattr(os, "fdatasync", lambda fd: (events.append("sync"), sync(fd))[1])
    monkeypatch.setattr(
        Journal, "add", lambda self, entry: (events.append("line") if "unit" in entry else None, add(self, entry))[1]
    )
    run(made.plan, tmp_path / "out")
    assert 3 <= events.count("sync") < events.count("copy")  # in groups
    for at, event in enumerate(events):
        if event == "line":
            before = events[:at]
            assert "copy" not in before[len(before) - before[::-1].index("sync") :]


def test_a_target_that_was_lost_or_cut_is_refused(made: Made, tmp_path: Path) -> None:
    out, name = tmp_path / "out", made.plan.files[0].name
    killed_before_unit(made, out, 5)
    target = tmp_path / "out.partial" / name
    os.truncate(target, 3)
    with pytest.raises(ConfigError, match=f"out.partial: {name} has 3 bytes instead of .*; remove the folder and run again"):
        run(made.plan, out)
    target.unlink()
    with pytest.raises(ConfigError, match=f"out.partial: {name} is missing"):
        run(made.plan, out)


# ------------------------------------------------------------------ other plans
def test_what_changed_is_named(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_before_unit(made, out, 5)
    plan = replace(made.plan, settings={"seed": 12, "dtype": "keep"})
    first = plan.sources[0]

    def refused(other: Plan, what: str) -> None:
        with pytest.raises(ConfigError) as caught:
            run(other, out)
        assert str(caught.value) == (
            f"{out}.partial: belongs to a run with other inputs ({what}); remove it, or choose another output"
        )

    refused(plan, "dtype was None, now keep")
    refused(replace(made.plan, settings={"seed": 13}), "seed was 12, now 13")
    refused(
        replace(made.plan, settings={"seed": 12, "config": {"torch_dtype": "x"}}), "config was None, now {'torch_dtype': 'x'}"
    )
    refused(replace(made.plan, kind="import"), "it was export, now import")
    touched = (replace(first, mtime_ns=first.mtime_ns + 1), *made.plan.sources[1:])
    refused(replace(made.plan, sources=touched), f"{first.path} changed")
    refused(replace(made.plan, sources=(replace(first, bytes=1), *made.plan.sources[1:])), f"{first.path} changed")
    refused(replace(made.plan, sources=made.plan.sources[1:]), f"{first.path} was among its inputs")
    moved = tuple(replace(fill, offset=fill.offset + 1) for fill in made.plan.fills)
    refused(replace(made.plan, fills=moved), "its units of work are others")
    run(made.plan, out)
    made.check(out)


def test_settings_inside_settings_are_compared_key_by_key(made: Made) -> None:
    config = {"a": 1, "long": "x" * 70 + "1", "rope": {"type": "none", "factors": (1.0, 2.0)}}

    def between(new: object) -> str | None:
        plans = (replace(made.plan, settings={"dtype": "keep", "config": value}) for value in (config, new))
        old, now = (units.facts_of(plan) for plan in plans)
        return units.difference(json.loads(json.dumps(old)), now)

    assert between(dict(config)) is None
    assert between(config | {"a": 2}) == "config.a was 1, now 2"
    assert between(config | {"b": 2}) == "config.b was None, now 2"
    assert between({"long": config["long"], "rope": config["rope"]}) == "config.a was 1, now None"
    assert between(config | {"long": "x" * 70 + "2"}) == "config.long changed"
    assert between(config | {"rope": {"type": "yarn", "factors": (1.0, 2.0)}}) == "config.rope.type was none, now yarn"


@pytest.mark.parametrize("change", ["name", "row", "column", "dtype", "source", "scales", "file size"])
def test_every_part_of_a_plan_is_in_its_hash(made: Made, change: str) -> None:
    fill = next(fill for fill in made.plan.fills if fill.scales is not None)
    changed = {
        "name": lambda: replace(fill, name="x"),
        "row": lambda: replace(fill, row=fill.row + 1),
        "column": lambda: replace(fill, column=fill.column + 1),
        "dtype": lambda: replace(fill, dtype=next(other.dtype for other in made.plan.fills if other.dtype != fill.dtype)),
        "source": lambda: replace(fill, source=replace(fill.source, pieces=fill.source.pieces[:-1])),
        "scales": lambda: replace(fill, scales=None),
        "file size": lambda: fill,
    }[change]()
    files = made.plan.files if change != "file size" else (replace(made.plan.files[0], bytes=1), *made.plan.files[1:])
    fills = tuple(changed if one is fill else one for one in made.plan.fills)
    assert units.facts_of(replace(made.plan, fills=fills, files=files))["plan"] != units.facts_of(made.plan)["plan"]
    assert units.facts_of(replace(made.plan))["plan"] == units.facts_of(made.plan)["plan"]


def test_a_journal_of_a_later_format_is_not_touched(made: Made, tmp_path: Path) -> None:
    killed_before_unit(made, tmp_path / "out", 5)
    path = tmp_path / "out.partial" / "journal-0.jsonl"
    first, rest = path.read_text().split("\n", 1)
    text = json.dumps(json.loads(first) | {"journal": 2}) + "\n" + rest
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"out.partial: is in the way"):
        run(made.plan, tmp_path / "out")
    assert path.read_text() == text


# ------------------------------------------------------------------ the lock
def test_the_lock_ends_with_its_process_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "journal-0.jsonl"
    mine = Journal(path, "a", fsync=False)
    mine.begin({"journal": 1, "plan": "p"})
    assert mine.read().facts == {"journal": 1, "plan": "p"}

    def other() -> None:
        Journal(path, "b", fsync=False)

    assert wait(forked(other)) == InUseError.exit_code
    mine.close()
    assert wait(forked(other)) == 0


def test_a_finished_output_that_was_moved_does_not_stop_the_next(made: Made, tmp_path: Path) -> None:
    """A kill between the last rename and the removal of the journal."""
    out = tmp_path / "out"

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        Path.unlink = die
        run(made.plan, out)

    assert wait(forked(killed)) == -signal.SIGKILL
    made.check(out)
    first, aside = hashes(out), tmp_path / "out.partial-journal"
    with pytest.raises(ConfigError, match="out: output is already there"):
        run(made.plan, out)
    left = aside.read_bytes()
    out.rename(tmp_path / "moved")
    run(made.plan, out)
    assert hashes(out) == first
    assert not aside.exists()
    out.rename(tmp_path / "moved too")
    aside.write_bytes(left)
    other = make_plan(tmp_path / "other", 3)  # whose leftover it is does not matter: it is finished
    run(other.plan, out)
    other.check(out)
    assert not aside.exists()
    out.rename(tmp_path / "moved again")
    for text in (b"", b"mine", left[: left.index(b'{"complete"')]):
        aside.write_bytes(text)
        with pytest.raises(ConfigError, match=r"out\.partial-journal: is in the way: not what .*; move it away"):
            run(made.plan, out)
        assert aside.read_bytes() == text
    aside.unlink()
    assert journal.journal_name(3) == "journal-3.jsonl"
