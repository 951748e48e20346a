"""Several processes share one conversion, as tasks of a SLURM step: with a made-up environment, and in a real step."""

import contextlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.convert import import_hf
from mcore_longctx.convert.copying import execute as module
from mcore_longctx.convert.copying import kernels, partial, telling, units
from mcore_longctx.convert.copying.journal import Journal
from mcore_longctx.convert.copying.step import Step, read_step
from mcore_longctx.errors import ConfigError, StorageError
from tests.convert.hf_folders import llama_config, write_folder
from tests.convert.made_plans import Made, forked, hashes, make_plan, run, wait, wait_for

REPOSITORY = Path(__file__).parents[2]
SANDBOX = REPOSITORY / "tools" / "slurm_sandbox.sh"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 700)
    monkeypatch.setattr(module, "SYNC_BYTES", 1)
    monkeypatch.setattr(partial, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(partial, "STALL_SECONDS", 20.0)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_plan(tmp_path / "sources", 12, tensors=8, size=60)


@pytest.fixture
def expected(made: Made, tmp_path: Path) -> dict[str, str]:
    run(made.plan, tmp_path / "whole", checksum=True)
    return hashes(tmp_path / "whole")


def rank(number: int, size: int, made: Made, out: Path, *, job: int = 1, **how: object) -> int:
    """Start one task; its exit code is 10 more where it says that it finished the output."""

    def task() -> None:
        os.environ |= {
            "SLURM_PROCID": str(number),
            "SLURM_STEP_NUM_TASKS": str(size),
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_ID": "0",
        }
        if run(made.plan, out, srun=True, **how):
            os._exit(10)

    return forked(task)


def codes(*pids: int) -> list[int]:
    return [wait(pid) for pid in pids]


# ------------------------------------------------------------------ shares
@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_every_unit_belongs_to_one_rank(count: int, size: int) -> None:
    steps = [Step(number, size) for number in range(size)]
    assert [number for step in steps for number in step.share(count)] == list(range(count))
    assert all(step.owner(number, count) == step.rank for step in steps for number in step.share(count))
    assert Step(0, size).owners(count) == [step.rank for step in steps if step.share(count)]
    assert max(len(step.share(count)) for step in steps) - min(len(step.share(count)) for step in steps) <= 1


def test_the_environment_of_a_step() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "8"}
    assert read_step(job) == Step(1, 8, "7.2.")
    assert read_step({**job, "SLURM_STEP_NUM_TASKS": "2", "SLURM_RESTART_COUNT": "3"}) == Step(1, 2, "7.2.3")
    for wrong in ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}):
        with pytest.raises(ConfigError, match=r"--srun: no SLURM step .* start it with srun, or leave out --srun"):
            read_step(wrong)
    wrong_numbers = ({"SLURM_PROCID": "8"}, {"SLURM_PROCID": "x"}, {"SLURM_NTASKS": "-1"}, {"SLURM_NTASKS": "9" * 5000})
    for change in wrong_numbers:
        with pytest.raises(ConfigError, match="--srun: SLURM_PROCID"):
            read_step({**job, **change})
    with pytest.raises(ConfigError, match="--srun: 99,999,999,999 tasks; expected at most 65,536; start fewer"):
        read_step({**job, "SLURM_NTASKS": "99999999999"})
    assert read_step({**job, "SLURM_NTASKS": "65536"}).size == 65536


def test_outside_a_step_nothing_is_written(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="no SLURM step"):
        run(made.plan, tmp_path / "out", srun=True)
    assert not (tmp_path / "out.partial").exists()


# ------------------------------------------------------------------ together
@pytest.mark.parametrize(("size", "workers", "checksum"), [(2, 1, True), (3, 2, False), (5, 1, True), (40, 1, True)])
def test_ranks_give_the_bytes_of_one_process(
    made: Made, expected, tmp_path: Path, size: int, workers: int, checksum: bool
) -> None:
    out = tmp_path / "out"
    order = [*range(1, size), 0]  # rank 0 comes last
    found = codes(*(rank(number, size, made, out, workers=workers, checksum=checksum, fsync=size < 40) for number in order))
    assert found == [0] * (size - 1) + [10]
    names = [name for name in expected if checksum or name != "config.json"]
    assert {name: hashes(out)[name] for name in names} == {name: expected[name] for name in names}
    assert not list(tmp_path.glob("out.*"))


def test_ranks_share_the_copying(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.Copier.copy

    def noted(self: kernels.Copier, unit: units.Unit) -> object:
        (tmp_path / f"by-{os.environ['SLURM_PROCID']}-{units.cut(made.plan).index(unit)}").touch()
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", noted)
    assert codes(*(rank(number, 3, made, tmp_path / "out") for number in range(3))) == [10, 0, 0]
    by = [path.name.split("-")[1:] for path in tmp_path.glob("by-*")]
    assert sorted(int(unit) for _, unit in by) == list(range(len(units.cut(made.plan))))
    assert {who for who, _ in by} == {"0", "1", "2"}


def test_a_killed_rank_is_named_and_another_number_of_ranks_goes_on(
    made: Made, expected, tmp_path: Path, monkeypatch, capfd
) -> None:
    out, real = tmp_path / "out", kernels.Copier.copy

    def deadly(self: kernels.Copier, unit: units.Unit) -> object:
        if os.environ["SLURM_PROCID"] == "2" and unit == units.cut(made.plan)[-2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Copier, "copy", deadly)
        patch.setattr(partial, "STALL_SECONDS", 0.5)
        found = codes(*(rank(number, 3, made, out, checksum=True) for number in range(3)))
    assert found == [1, 1, -signal.SIGKILL]
    assert "no progress for 0 s: rank 2 behind" in capfd.readouterr().out
    copied = tmp_path / "copied"
    copied.mkdir()

    def counted(self: kernels.Copier, unit: units.Unit) -> object:
        (copied / str(units.cut(made.plan).index(unit))).touch()
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", counted)
    assert codes(*(rank(number, 2, made, out, job=2, checksum=True) for number in range(2))) == [10, 0]
    assert hashes(out) == expected
    assert {int(path.name) for path in copied.iterdir()} == {len(units.cut(made.plan)) - 2, len(units.cut(made.plan)) - 1}
    assert not list(tmp_path.glob("out.*"))


def test_a_rank_that_fails_ends_the_others_at_once(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.Copier.copy

    def failing(self: kernels.Copier, unit: units.Unit) -> object:
        if os.environ["SLURM_PROCID"] == "1":
            raise StorageError("cannot be written (No space left on device)", where="weights-0.bin")
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", failing)
    begin = time.monotonic()
    assert codes(*(rank(number, 2, made, tmp_path / "out") for number in range(2))) == [1, 1]
    assert time.monotonic() - begin < 10
    assert not (tmp_path / "out").exists()


def test_without_rank_0_the_others_end_in_one_line(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "STALL_SECONDS", 0.3)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(
        StorageError, match=r"out: no progress for 0 s: rank 0 has not prepared out\.partial; run it again to go on"
    ):
        run(made.plan, tmp_path / "out", srun=True)
    assert not (tmp_path / "out.partial").exists()


def test_what_another_start_prepared_is_not_taken_for_this_one(made: Made, expected, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(partial, "STALL_SECONDS", 0.3)
        assert codes(rank(0, 2, made, out)) == [1]  # rank 1 never came
        assert codes(rank(1, 2, made, out, job=2)) == [1]
        assert (tmp_path / "out.partial" / "journal-1.jsonl").read_bytes() == b""
    assert codes(rank(1, 2, made, out, job=3, checksum=True), rank(0, 2, made, out, job=3, checksum=True)) == [0, 10]
    assert hashes(out) == expected


def test_ranks_with_another_plan_are_refused(made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = make_plan(tmp_path / "other", 5)
    begin = time.monotonic()
    assert codes(rank(0, 2, made, tmp_path / "out"), rank(1, 2, other, tmp_path / "out")) == [1, 2]
    assert time.monotonic() - begin < 10
    said = f"{tmp_path}/out: another rank gave up: {tmp_path}/out.partial: belongs to a run with other inputs ("
    assert said in capfd.readouterr().out
    assert codes(*(rank(number, 2, made, tmp_path / "out", job=2) for number in range(2))) == [10, 0]  # the next start goes on
    made.check(tmp_path / "out")


def importing(number: int, source: Path, out: Path, *, job: int = 1) -> int:
    def task() -> None:
        os.environ |= {"SLURM_PROCID": str(number), "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"}
        import_hf(source, out, how=module.Execution(srun=True))

    return forked(task)


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_cannot_plan_ends_rank_0_at_once(tmp_path: Path, capfd, first: int) -> None:
    source, out = write_folder(tmp_path / "hf", llama_config()), tmp_path / "out"
    sources, begin = (source, tmp_path / "not mounted"), time.monotonic()
    pids = {first: importing(first, sources[first], out)}
    time.sleep(0.3)
    pids[1 - first] = importing(1 - first, sources[1 - first], out)
    assert codes(pids[0], pids[1]) == [1, 2]
    assert time.monotonic() - begin < 10
    assert f"{out}: another rank gave up: {tmp_path}/not mounted: no such folder; " in capfd.readouterr().out
    assert codes(importing(0, source, out, job=2), importing(1, source, out, job=2)) == [0, 0]
    assert (out / "manifest.json").exists()


def test_where_no_rank_can_plan_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "TELL_SECONDS", 0.3)
    assert codes(*(importing(number, tmp_path / "none", tmp_path / "out") for number in range(2))) == [2, 2]
    assert not list(tmp_path.iterdir())


def test_ranks_without_a_share_end_at_once_and_have_no_journal(made: Made, expected, tmp_path: Path, monkeypatch) -> None:
    out, seen, complete = tmp_path / "out", tmp_path / "journals", partial.Partial.complete

    def counted(self: partial.Partial, *rest: object) -> None:
        seen.write_text(str(len(list(self.folder.glob("journal-*")))))
        complete(self, *rest)

    monkeypatch.setattr(partial.Partial, "complete", counted)
    ranks = Step(0, 60_000).owners(len(units.cut(made.plan)))
    idle = next(number for number in range(1, 60_000) if number not in ranks)
    others = [*(number for number in ranks if number), idle]
    assert codes(*(rank(number, 60_000, made, out) for number in (0, *others))) == [10, *(0 for _ in others)]
    assert int(seen.read_text()) == len(others)
    assert {name: hashes(out)[name] for name in made.expected} == {name: expected[name] for name in made.expected}


@pytest.mark.parametrize("size", [1, 2])
def test_without_fsync_what_others_read_is_synced_before_it_is_told(made: Made, tmp_path: Path, monkeypatch, size: int) -> None:
    events, add, sync = tmp_path / "events", Journal.add, os.fdatasync

    def note(what: str) -> None:
        with events.open("a") as file:
            file.write(f"{os.environ['SLURM_PROCID']} {what}\n")

    monkeypatch.setattr(os, "fdatasync", lambda fd: (note("sync"), sync(fd))[1])
    monkeypatch.setattr(Journal, "add", lambda self, entry: (note("unit") if "unit" in entry else None, add(self, entry))[1])
    pids = [rank(number, size, made, tmp_path / "out", fsync=False, checksum=True) for number in range(size)]
    assert codes(*pids) == [10, 0][:size]
    lines = events.read_text().splitlines()
    for number in range(size):
        own = [line.split()[1] for line in lines if line.startswith(str(number))]
        assert own.count("unit") > 3
        assert ("sync" in own) == (size > 1)
        assert size == 1 or own[0] == "sync"


def test_killed_at_random_moments_with_any_number_of_ranks(made: Made, expected, tmp_path: Path, monkeypatch) -> None:
    out, dice, real = tmp_path / "out", random.Random(2), kernels.Copier.copy

    def slow(self: kernels.Copier, unit: units.Unit) -> object:
        time.sleep(0.003)
        return real(self, unit)

    monkeypatch.setattr(kernels.Copier, "copy", slow)
    for job in range(25):
        size = dice.randrange(1, 5)
        pids = [rank(number, size, made, out, job=job, checksum=True) for number in range(size)]
        time.sleep(dice.random() * 0.15)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        codes(*pids)
        if out.exists():
            assert hashes(out) == expected
            out.rename(tmp_path / f"done-{job}")
    assert 10 in codes(*(rank(number, 3, made, out, job=99, checksum=True) for number in range(3)))
    assert hashes(out) == expected


# ------------------------------------------------------------------ a real step
@contextlib.contextmanager
def sandbox() -> Iterator[dict[str, str]]:
    """The environment of a SLURM of two nodes of its own."""
    folder = tempfile.mkdtemp(prefix="slurm-")
    environment = os.environ | {"SLURM_SANDBOX_DIR": folder}
    try:
        subprocess.run([SANDBOX, "start"], env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
        yield environment | {"SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([SANDBOX, "stop"], env=environment, check=False, timeout=60, stdout=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("srun"), reason="needs root and the SLURM packages")
def test_in_a_real_step_of_two_nodes(made: Made, expected: dict[str, str], tmp_path: Path) -> None:
    task = tmp_path / "task.py"
    task.write_text(
        "import os, pickle, sys\n"
        "from pathlib import Path\n"
        "from mcore_longctx.convert.copying import units\n"
        "from tests.convert.made_plans import run\n"
        "from mcore_longctx.convert.plans.plan import Plan\n"
        "units.UNIT_BYTES = 700\n"
        "*fields, small = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "done = run(Plan(*fields, lambda: iter(small)), Path(sys.argv[2]), srun=True, workers=2, checksum=True)\n"
        "print(os.environ['SLURM_PROCID'], os.environ['SLURMD_NODENAME'], done)\n"
    )
    plan = made.plan
    fields = (plan.kind, plan.settings, plan.sources, plan.files, plan.fills, list(plan.small()))
    (tmp_path / "plan").write_bytes(pickle.dumps(fields))
    with sandbox() as environment:
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = ["srun", "-N2", "-n4", "--overcommit", sys.executable, task, tmp_path / "plan", tmp_path / "out"]
        found = subprocess.run(command, env=environment, cwd=REPOSITORY, check=False, timeout=120, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = sorted(line.split() for line in found.stdout.splitlines())
    assert [line[2] for line in lines] == ["True", "False", "False", "False"]
    assert {line[1] for line in lines} == {"n0", "n1"}
    assert hashes(tmp_path / "out") == expected
    wait_for(lambda: not list(tmp_path.glob("out.*")))
