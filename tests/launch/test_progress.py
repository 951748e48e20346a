"""What becomes of a job after each slice: the verdict, the folders, the lock."""

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.checkpoint_folder import FolderLock, iteration_folder
from mcore_longctx.errors import ConfigError, InUseError, NoProgress
from mcore_longctx.launch import progress
from mcore_longctx.launch.progress import Slice, StageFolders, begin_slice, decide, end_slice, newest_verified, read_slices
from mcore_longctx.manifest import write_manifest

GLOO = "rank 0: RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3"
SAVE = "checkpoints/extend/iter_0000008: the checkpoint could not be written: "
NCCL = "rank 7: DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error (details in rank7.log)"


def ended(before: int = 4, after: int = 4, state: Any = "running", **more: Any) -> Slice:
    known = {"job": "7", "restart": 0, "nodes": "n[0-1]", "began": 0.0, "short_seconds": 300.0, "seconds": 4000.0, "srun_code": 1}
    return Slice(**(known | {"before": before, "after": after, "state": state} | more))


@pytest.fixture
def stage(tmp_path: Path) -> StageFolders:
    return StageFolders("extend", tmp_path / "logs" / "extend", tmp_path / "checkpoints" / "extend", 12)


PURE = StageFolders("extend", Path("logs/extend"), Path("checkpoints/extend"), 12)


@pytest.mark.parametrize(
    ("last", "code", "words"),
    [
        (ended(8, 12, "done", code=0, reason="12 iterations", srun_code=0), 0, "done: 12 iterations, checkpoint 12"),
        (ended(8, 8, "done", reason="12 iterations"), 1, "the newest verified checkpoint is checkpoint 8 of 12"),
        (ended(state="failed", code=1, reason="iteration 5: loss is nan"), 1, "failed: iteration 5: loss is nan"),
        (ended(state="failed", code=1, reason="data/NCCL: loss is nan"), 1, "failed: data/NCCL: loss is nan"),
        (ended(state="failed", code=1, reason="rank 1: KeyError: 'x' (details in rank1.log)"), 1, "failed: rank 1: KeyError"),
        (ended(-1, -1, "failed", code=2, reason="checkpoints/base: no checkpoint here"), 2, "refused: checkpoints/base"),
        (ended(4, 6, "stopped", code=75, reason="SIGUSR1 at iteration 6", asked="USR1"), 75, "from checkpoint 4 to checkpoint 6"),
        (ended(4, 4, "running", srun_code=137), 75, "died without a word, srun ended with 137, still at checkpoint 4"),
        (ended(4, 8, "hung", code=1, reason="rank 3: no micro-batch for 31 s"), 75, "hung (rank 3: no micro-batch for 31 s)"),
        (ended(-1, -1, "none", srun_code=127), 75, "ended before training began, srun ended with 127, still at no checkpoint"),
        (ended(4, 4, "failed", code=1, reason=GLOO), 75, "lost a machine or a link"),
        (
            ended(state="failed", code=1, reason=f"{SAVE}rank 3: Input/output error; iter_0000004 is untouched"),
            75,
            "lost a machine",
        ),
        (
            ended(state="failed", code=1, reason=f"{SAVE}[Errno 116] Stale file handle: 'x'; iter_0000004 is"),
            75,
            "lost a machine",
        ),
        (
            ended(state="failed", code=1, reason=f"{SAVE}rank 0: the writing process ended with signal 9 (SIGKILL); x"),
            75,
            "signal 9",
        ),
        (
            ended(state="failed", code=1, reason=f"{SAVE}rank 0: the writing process ended with signal 11 (SIGSEGV)"),
            1,
            "failed: ",
        ),
        (ended(state="failed", code=1, reason=f"{SAVE}rank 0: No space left on device; x is untouched"), 1, "failed: "),
        (ended(4, 4, "failed", code=1, reason=NCCL), 75, "slices of this job that died: 1, on n[0-1]"),
        (
            ended(4, 4, "stopped", code=75, asked="TERM", seconds=20.0),
            75,
            "told to stop before start-up and one step: not counted",
        ),
        (
            ended(-1, -1, "none", asked="PREEMPT", seconds=20.0, srun_code=137),
            75,
            "requeue: it ended before training began, srun ended with 137, SLURM was preempting the job, still at no checkpoint "
            "(told to stop before start-up and one step: not counted)",
        ),
        (ended(state="failed", code=1, reason="loss is nan", asked="PREEMPT", seconds=20.0), 1, "failed: loss is nan"),
        (ended(state="failed", code=2, reason="no such data", asked="PREEMPT", seconds=20.0), 2, "refused: no such data"),
    ],
)
def test_each_end_of_a_slice_has_its_verdict(last: Slice, code: int, words: str) -> None:
    verdict = decide([last], PURE)
    assert verdict.code == code
    assert words in verdict.line


def test_two_slices_in_a_row_without_a_newer_checkpoint_stop_the_chain() -> None:
    idle, moved = ended(), ended(4, 5)
    assert decide([idle, idle], PURE).code == 3
    assert decide([idle, moved, ended(5, 5)], PURE).code == 75
    assert decide([idle, moved, ended(5, 5), ended(5, 5, "hung")], PURE).code == 3
    assert "2 slices in a row without a newer checkpoint (checkpoint 4)" in decide([idle, idle], PURE).line
    assert decide([idle, ended(4, 12, "done")], PURE).code == 0


def test_a_slice_that_was_stopped_too_early_does_not_count_but_ten_do() -> None:
    short = ended(state="stopped", code=75, asked="TERM", seconds=299.0)
    assert decide([ended(), short, short], PURE).code == 75
    assert decide([ended(), short, ended()], PURE).code == 3  # short ones between do not hide the others
    assert decide([short] * 9, PURE).code == 75
    verdict = decide([short] * 10, PURE)
    assert verdict.code == 3
    assert "10 slices in a row were told to stop before start-up and one step (300 s)" in verdict.line
    long = ended(state="stopped", code=75, asked="TERM", seconds=301.0)
    assert decide([long, long], PURE).code == 3
    polite = ended(state="stopped", code=75, seconds=20.0)  # preempted: TERM went to the ranks alone
    assert decide([polite, polite], PURE).code == 75
    assert decide([polite] * 10, PURE).code == 3
    died = ended(seconds=20.0)  # nobody asked it to stop
    assert decide([died, died], PURE).code == 3


def test_a_slice_that_slurm_was_preempting_died_of_it_not_of_its_nodes() -> None:
    preempted = ended(-1, -1, "none", asked="PREEMPT", seconds=20.0, srun_code=137)
    died = ended(-1, -1, "none", seconds=20.0, nodes="n[2-3]")
    verdict = decide([preempted, preempted, preempted], PURE)
    assert verdict.code == 75
    assert verdict.line.endswith("not counted)")  # no node to leave out
    assert "slices of this job that died: 1, on n[2-3] (" in decide([preempted, died], PURE).line
    assert decide([died, preempted, died], PURE).code == 3
    assert decide([preempted] * 10, PURE).code == 3
    long = ended(asked="PREEMPT", seconds=301.0)  # it had the time for a checkpoint
    assert decide([long, long], PURE).code == 3
    assert "SLURM was preempting the job; look at" in decide([long, long], PURE).line


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.sampled_from(["running", "stopped", "hung", "none"]), st.floats(0, 600)),
        min_size=1,
        max_size=30,
    )
)
def test_a_chain_ends_after_at_most_eleven_slices_without_progress(rows: list[tuple[bool, bool, str, float]]) -> None:
    """Against a recount from the front: no run of slices without a newer checkpoint is longer than the rule allows."""
    slices: list[Slice] = []
    at, idle, short = -1, 0, 0
    for moved, asked, state, seconds in rows:
        slices.append(ended(at, at + moved, state, asked="TERM" if asked else "", seconds=seconds))
        at += moved
        is_short = (asked or state == "stopped") and seconds < 300
        idle, short = (0, 0) if moved else (idle + (not is_short), short + is_short)
        stops = idle >= 2 or short >= 10
        assert decide(slices, PURE).code == (3 if stops else 75)
        if stops:
            return
        assert idle + short <= 11


# ---------------------------------------------------------------------- with folders


def checkpoint(stage: StageFolders, iteration: int) -> Path:
    folder = iteration_folder(stage.checkpoints, iteration)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x" * 100)
    write_manifest(folder, "checkpoint", stage=stage.stage)
    return folder


def say(stage: StageFolders, line: str) -> None:
    stage.logs.mkdir(parents=True, exist_ok=True)
    (stage.logs / "STATUS").write_text(line + "\n")


ENVIRONMENT = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "n[0-1]"}


def test_a_slice_is_written_down_when_it_ends(stage: StageFolders) -> None:
    checkpoint(stage, 4)
    now = begin_slice(stage, ENVIRONMENT, short_seconds=300)
    assert (now.before, now.restart, now.nodes) == (4, 1, "n[0-1]")
    checkpoint(stage, 6)
    say(stage, "stopped 75 SIGUSR1 at iteration 6, checkpoint saved")
    verdict = end_slice(stage, ENVIRONMENT, asked="USR1", srun_code=1)
    assert verdict.code == 75
    (line,) = (stage.logs / "slices.jsonl").read_text().splitlines()
    row = json.loads(line)
    expected = {
        "job": "7",
        "restart": 1,
        "nodes": "n[0-1]",
        "before": 4,
        "after": 6,
        "state": "stopped",
        "code": 75,
        "asked": "USR1",
    }
    assert {name: row[name] for name in expected} == expected
    assert row["verdict"] == "requeue"
    assert not (stage.logs / "slice-7.json").exists()


def test_what_an_earlier_slice_said_is_not_taken_for_this_ones(stage: StageFolders) -> None:
    checkpoint(stage, 12)
    say(stage, "done 0 12 iterations")
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    assert end_slice(stage, ENVIRONMENT, asked="", srun_code=127).code == 75
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    (stage.logs / "error-7").write_text("failed 2 recipe.yaml: no such stage\n")  # left by a rank that never began to train
    verdict = end_slice(stage, ENVIRONMENT, asked="", srun_code=1)
    assert (verdict.code, verdict.line) == (2, "refused: recipe.yaml: no such stage")


def test_a_damaged_or_unfinished_checkpoint_is_no_progress(stage: StageFolders) -> None:
    checkpoint(stage, 4)
    assert newest_verified(stage.checkpoints) == 4
    newer = checkpoint(stage, 6)
    (newer / "__0_0.distcp").write_bytes(b"x" * 99)
    assert newest_verified(stage.checkpoints) == -1  # whoever trains from here will refuse: a person must look
    newer.rename(newer.with_name("iter_0000006.partial-n0-12"))
    assert newest_verified(stage.checkpoints) == 4
    assert newest_verified(stage.logs / "nowhere") == -1


def test_a_slice_that_was_killed_with_its_script_is_counted_by_the_next(stage: StageFolders) -> None:
    """The end of GraceTime, a power cut: `slice end` never ran."""
    checkpoint(stage, 4)
    for _ in range(2):
        now = begin_slice(stage, ENVIRONMENT, short_seconds=0.0)
        say(stage, "running - process 4711 on n0")
    assert now.before == 4
    with pytest.raises(NoProgress, match="2 slices in a row without a newer checkpoint") as caught:
        begin_slice(stage, ENVIRONMENT, short_seconds=0.0)
    assert caught.value.exit_code == 3
    assert [(one.state, one.verdict) for one in read_slices(stage.logs)] == [
        ("running", "requeue (killed with its script)"),
        ("running", "no progress (killed with its script)"),
    ]
    begin_slice(stage, {**ENVIRONMENT, "SLURM_JOB_ID": "8"}, short_seconds=0.0)  # submitted again by a person: counted anew


def test_a_killed_slice_that_was_asked_to_stop_early_is_not_counted(stage: StageFolders) -> None:
    for _ in range(4):
        begin_slice(stage, ENVIRONMENT, short_seconds=300)
        (stage.logs / "asked-7").write_text("TERM\n")
    assert [one.short for one in read_slices(stage.logs)] == [True] * 3


def test_a_slice_whose_line_is_written_is_not_counted_again(stage: StageFolders) -> None:
    """Killed between the line and the removal of its file."""
    for code in (75, 3):
        begin_slice(stage, ENVIRONMENT, short_seconds=0.0)
        slice_file = stage.logs / "slice-7.json"
        kept = slice_file.read_bytes()
        assert end_slice(stage, ENVIRONMENT, asked="", srun_code=1).code == code
        slice_file.write_bytes(kept)
        if code == 75:
            begin_slice(stage, ENVIRONMENT, short_seconds=0.0)
            slice_file.unlink()
            assert len(read_slices(stage.logs)) == 1
    with pytest.raises(NoProgress, match="2 slices in a row"):  # what was decided then holds
        begin_slice(stage, ENVIRONMENT, short_seconds=0.0)
    assert len(read_slices(stage.logs)) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"{", b"[]", b'{"job": 3}'])
def test_damage_to_the_notes_stops_no_chain(stage: StageFolders, damage: bytes) -> None:
    stage.logs.mkdir(parents=True)
    wrong_type = json.dumps({**ended(asked="USR1").__dict__, "short_seconds": "x"}).encode()
    (stage.logs / "slices.jsonl").write_bytes(damage + b"\n" + wrong_type + b"\n\xff\n")
    checkpoint(stage, 4)
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    assert end_slice(stage, ENVIRONMENT, asked="USR1", srun_code=1).code == 75
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    checkpoint(stage, 6)
    (stage.logs / "slice-7.json").write_bytes(damage)
    (stage.logs / "asked-7").write_bytes(damage)
    assert end_slice(stage, ENVIRONMENT, asked="", srun_code=1).code == 75
    assert [(one.job, one.before, one.after) for one in read_slices(stage.logs)] == [("7", 4, 4), ("7", 4, 6)]
    (stage.logs / "slice-7.json").write_bytes(damage)
    assert begin_slice(stage, ENVIRONMENT, short_seconds=300).before == 6


OTHER = {**ENVIRONMENT, "SLURM_JOB_ID": "8"}


def test_two_jobs_on_one_folder_leave_each_others_slice_alone(stage: StageFolders) -> None:
    """Both began before the ranks of either had the lock."""
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    begin_slice(stage, OTHER, short_seconds=300)
    say(stage, "running - process 1 on n0")  # of job 8, which has the folder
    (stage.logs / "error-7").write_text("failed 2 process 1 on n0, SLURM job 8 trains into this folder\n")
    verdict = end_slice(stage, ENVIRONMENT, asked="", srun_code=1)
    assert (verdict.code, verdict.line) == (2, "refused: process 1 on n0, SLURM job 8 trains into this folder")
    with pytest.raises(ConfigError, match="no slice has begun"):
        end_slice(stage, ENVIRONMENT, asked="", srun_code=1)
    checkpoint(stage, 12)
    say(stage, "done 0 12 iterations")
    assert end_slice(stage, OTHER, asked="", srun_code=0).code == 0
    assert [(one.job, one.verdict) for one in read_slices(stage.logs)] == [("7", "refused"), ("8", "done")]


def test_a_slice_does_not_begin_beside_one_of_a_job_in_the_queue(stage: StageFolders) -> None:
    begin_slice(stage, ENVIRONMENT, short_seconds=300, queued=["7"])
    say(stage, "running - process 1 on n0")
    with pytest.raises(InUseError, match="SLURM job 7 trains into this folder; wait for it, scancel 7"):
        begin_slice(stage, OTHER, short_seconds=300, queued=["7", "8", "9"])
    assert sorted(path.name for path in stage.logs.iterdir()) == ["STATUS", "slice-7.json"]
    begin_slice(stage, OTHER, short_seconds=300, queued=["8", "9"])  # job 7 was cancelled: nobody will ask for its files
    assert [path.name for path in stage.logs.iterdir()] == ["slice-8.json"]


def test_a_stage_that_a_person_holds_is_not_requeued_and_does_not_begin(stage: StageFolders) -> None:
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    checkpoint(stage, 6)
    say(stage, "stopped 75 SIGUSR1 at iteration 6, checkpoint saved")
    hold = stage.logs / "hold"
    hold.touch()
    verdict = end_slice(stage, ENVIRONMENT, asked="USR1", srun_code=1)
    assert (verdict.code, verdict.word) == (1, "held")
    assert verdict.line.startswith(
        "held: it stopped (SIGUSR1 at iteration 6, checkpoint saved), from no checkpoint to checkpoint 6"
    )
    with pytest.raises(ConfigError, match="hold: this stage is held; remove the file and submit again"):
        begin_slice(stage, ENVIRONMENT, short_seconds=300)
    hold.unlink()
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    hold.touch()
    checkpoint(stage, 12)
    say(stage, "done 0 12 iterations")
    assert end_slice(stage, ENVIRONMENT, asked="USR1", srun_code=0).code == 0


def test_a_cut_line_of_a_killed_writer_does_not_stop_the_next(stage: StageFolders) -> None:
    stage.logs.mkdir(parents=True)
    (stage.logs / "slices.jsonl").write_text('{"job": "7", "restart": 0, "no')
    (stage.logs / "slice-7.json").write_text("{")
    begin_slice(stage, ENVIRONMENT, short_seconds=300)
    assert end_slice(stage, ENVIRONMENT, asked="", srun_code=1).code == 75
    assert len(read_slices(stage.logs)) == 1


def test_an_end_without_a_beginning_is_refused(stage: StageFolders) -> None:
    with pytest.raises(ConfigError, match="no slice has begun here; `mcore-longctx slice begin` comes first"):
        end_slice(stage, ENVIRONMENT, asked="", srun_code=0)


def _train(checkpoints: Path, job: str, ready: Any, leave: Any) -> None:
    os.environ["SLURM_JOB_ID"] = job
    with FolderLock(checkpoints):
        ready.set()
        leave.wait(60)


@pytest.fixture
def trainer(stage: StageFolders) -> Any:
    """A process that trains into the folder as SLURM job 7; kill it or let it leave."""
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_train, args=(stage.checkpoints, "7", ready, leave))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()  # not leave.set(): with a waiter that was killed it waits for ever
        process.join(30)


@pytest.mark.multiproc
def test_a_folder_that_another_job_trains_into_is_refused_with_its_number_and_host(
    stage: StageFolders, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(stage, "running - process of job 7")
    with pytest.raises(
        InUseError, match=rf"process {trainer.pid} on .*, SLURM job 7 trains into this folder; wait for it, scancel"
    ):
        begin_slice(stage, {**ENVIRONMENT, "SLURM_JOB_ID": "8"}, short_seconds=300)
    assert (stage.logs / "STATUS").exists()  # of the job that trains
    # an earlier slice of the same job, on a node that SLURM has lost: waited for, then named
    monkeypatch.setattr(progress, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.05)
    began = time.monotonic()
    with pytest.raises(InUseError, match="ranks of an earlier slice of this job live on"):
        begin_slice(stage, ENVIRONMENT, short_seconds=300)
    assert time.monotonic() - began >= 0.2
    trainer.kill()
    trainer.join(30)
    assert (stage.checkpoints / ".lock").read_text().endswith("SLURM job 7")  # stale: the kernel gave the lock back
    begin_slice(stage, {**ENVIRONMENT, "SLURM_JOB_ID": "8"}, short_seconds=300)
