"""`data build` under datatrove's executors: the same bytes for any engine, after kills too, on a real two-node SLURM where it is installed."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcore_longctx.cli.main import main
from mcore_longctx.data.engines.scale_out import MAX_RANKS, launch
from mcore_longctx.data.files.shards import read_shard
from mcore_longctx.data.tokens.job import open_job
from mcore_longctx.errors import ConfigError
from tests.data.conftest import make_tokenizer, words
from tests.data.test_cli import CONFIG

REPOSITORY = Path(__file__).parents[2]
SANDBOX = REPOSITORY / "tools" / "slurm_sandbox.sh"
FILES, RECORDS = 8, 12  # a packed file is a task
RECIPE = """
name: small
model: {{path: {folder}/model}}
rope: {{type: llama3, factor: 8, original_max_position_embeddings: 512}}
data:
  books: {{sources: [{{name: books, path: {folder}/books}}]}}
stages:
  - {{name: extend, kind: pretrain, data: books, seq_length: 256, train_iters: 3, global_batch_size: 2, optimizer: {{lr: 1.0e-4}}}}
output: {folder}/run
"""
# every Python that has this folder on its path reads a record in SLOW_READER seconds
SLOW = """
import os, time
if "SLOW_READER" in os.environ:
    from mcore_longctx.data.tokens import tokenize
    class Slow:
        def __init__(self, *args, **kwargs):
            self.records = fast(*args, **kwargs)
        def __iter__(self):
            for record in self.records:
                time.sleep(float(os.environ["SLOW_READER"]))
                yield record
        def __getattr__(self, name):
            return getattr(self.records, name)
    fast, tokenize.read_task = tokenize.read_task, Slow
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over one source of FILES files, and what to put on a Python's path to read them slowly."""
    pytest.importorskip("datatrove", reason="the extra datatrove is not installed")
    folder = tmp_path_factory.mktemp("scale_out")
    make_tokenizer(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "books").mkdir()
    for i in range(FILES):
        lines = [json.dumps({"id": f"{i}-{j}", "text": words(100 * i + j, 60 + 20 * j)}) + "\n" for j in range(RECORDS)]
        (folder / "books" / f"{i}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(SLOW)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """Hashes of what one process makes without an engine."""
    assert main(["data", "build", str(folder / "recipe.yaml"), "--stage", "extend", "--out", str(folder / "alone")]) == 0
    hashes = hashes_of(folder / "alone")
    assert {"books.bin", "books.idx", "books.runs", "000000.tokens", f"{FILES - 1:06d}.docs"} <= hashes.keys()
    return hashes


def hashes_of(out: Path) -> dict[str, str]:
    """sha256 of the packed samples and of every token shard."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*out.iterdir(), *(out / "tokens").iterdir()]
        if path.suffix in (".bin", ".idx", ".runs", ".tokens", ".docs")
    }


def command(folder: Path, out: Path, *options: str) -> list[str]:
    return ["data", "build", str(folder / "recipe.yaml"), "--stage", "extend", "--out", str(out), *options]


@contextlib.contextmanager
def started(folder: Path, out: Path, *options: str, slow: float | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which does not outlive the block."""
    environment = os.environ | {"PYTHONPATH": f"{folder / 'slow'}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
    if slow is not None:
        environment["SLOW_READER"] = str(slow)
    whole = [sys.executable, "-m", "mcore_longctx", *command(folder, out, *options)]
    with subprocess.Popen(whole, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(what: Callable[[], object], seconds: float = 150) -> object:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
    return found


def writers(out: Path) -> list[int]:
    """Processes in the middle of a shard."""
    return sorted({int(path.name.rpartition("-")[2]) for path in (out / "tokens").glob("*.partial-*")})


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------ datatrove's local executor
@pytest.mark.parametrize(("ranks", "workers"), [(3, 2), (FILES + 3, 1)])
def test_the_local_engine_gives_the_bytes_of_one_process(folder: Path, expected, tmp_path: Path, ranks, workers, capfd) -> None:
    options = ("--engine", "local", "--ranks", str(ranks), "--workers", str(workers), "--json")
    assert main(command(folder, tmp_path / "out", *options)) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["pack"]["samples"] > 0
    assert printed.err == ""  # datatrove's log goes to its folder
    assert hashes_of(tmp_path / "out") == expected
    stats = [json.loads(path.read_text()) for path in (tmp_path / "out" / "jobs").glob("local-*/stats/*.json")]
    tokens = json.loads((tmp_path / "out" / "tokens" / "manifest.json").read_text())["sources"]["books"]["tokens"]
    assert sum(step["stats"]["tokens"]["total"] for (step,) in stats) == tokens


def test_datatroves_own_executor_runs_the_step(folder: Path, expected, tmp_path: Path) -> None:
    from datatrove.executor.local import LocalPipelineExecutor

    from mcore_longctx.data.engines.datatrove_steps import TokenizeShards

    out = tmp_path / "out"
    assert main(command(folder, out)) == 0
    for shard in (out / "tokens").glob("00000[1-6].docs"):
        shard.unlink()
    LocalPipelineExecutor([TokenizeShards(out)], tasks=3, workers=2, logging_dir=str(tmp_path / "logs")).run()
    assert hashes_of(out) == expected


@pytest.mark.parametrize("victim", ["a rank", "the command"])
def test_kill_9_in_the_middle_and_the_same_command_again(folder: Path, expected, tmp_path: Path, victim: str) -> None:
    out, options = tmp_path / "out", ("--engine", "local", "--ranks", "3", "--workers", "2")
    with started(folder, out, *options, slow=0.03) as first:
        wait_for(lambda: list((out / "tokens").glob("*.docs")) and writers(out))
        rank = writers(out)[0]
        ranks = children(first.pid)
        os.kill(rank if victim == "a rank" else first.pid, signal.SIGKILL)
        _, said = first.communicate(timeout=60)
    if victim == "a rank":
        assert rank in ranks
        assert first.returncode == 2
        assert said.startswith("mcore-longctx: a worker was killed (out of memory?); start the same command again")
        assert said.count("\n") == 1
    assert len(ranks) == 2
    wait_for(lambda: not any(map(is_alive, ranks)))
    done = {path: path.stat().st_mtime_ns for path in (out / "tokens").glob("*.docs")}
    assert 0 < len(done) < FILES
    assert not (out / "manifest.json").exists()
    with started(folder, out, *options) as second:
        _, said = second.communicate(timeout=60)
    assert second.returncode == 0, said
    assert hashes_of(out) == expected
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert writers(out) == []


def test_a_shard_that_is_lost_is_made_again_whatever_the_engine_believes(folder: Path, expected, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--engine", "local", "--ranks", "2", "--workers", "1")
    assert main(command(folder, out, *options)) == 0
    markers = sorted(path.name for path in (out / "jobs").glob("local-2-*/completions/*"))
    assert markers == ["00000", "00001"]
    (out / "tokens" / "000003.docs").unlink()
    kept = (out / "tokens" / "000002.docs").stat().st_mtime_ns
    assert main(command(folder, out, *options)) == 0
    assert hashes_of(out) == expected
    assert (out / "tokens" / "000002.docs").stat().st_mtime_ns == kept
    (stats,) = (out / "jobs").glob("local-2-*/stats/00001.json")
    tokens = read_shard(out / "tokens", 3).facts["tokens"]
    assert json.loads(stats.read_text())[0]["stats"]["tokens"]["total"] == tokens  # its rank made it, and no other shard


def test_a_bad_record_is_one_clear_line_from_any_rank(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "books"
    shutil.copytree(folder / "books", bad)
    (bad / "5.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n{"text": 7}\n'))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((folder / "recipe.yaml").read_text().replace(f"{folder}/books", str(bad)))
    words = ["data", "build", str(recipe), "--stage", "extend", "--out", str(tmp_path / "out")]
    assert main([*words, "--engine", "local", "--ranks", "3", "--workers", "2"]) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(rf"mcore-longctx: {re.escape(str(bad))}/5\.jsonl\.gz:2: [^\n]*--max-bad[^\n]*\n", said), said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_commands_at_once_the_second_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "out", ("--engine", "local", "--ranks", "3", "--workers", "2")
    with started(folder, out, *options, slow=0.05) as first:
        wait_for(lambda: writers(out))
        assert main(command(folder, out, *options)) == 2
        assert f"another run works on this folder (process {first.pid} on" in capsys.readouterr().err


# ------------------------------------------------------------------ bad usage
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "local", "--ranks", "0"), "0 ranks: expected 1 to 1,000"),
        (("--engine", "local", "--ranks", str(MAX_RANKS + 1)), "1001 ranks: expected 1 to 1,000"),
        (("--engine", "local", "--partition", "cpu"), "--partition has no meaning with --engine local"),
        (("--ranks", "3"), "--ranks has no meaning without --engine"),
        (("--mem-per-cpu", "3"), "--mem-per-cpu has no meaning without --engine"),
        (("--engine", "slurm", "--ranks", "3", "--partition", "cpu"), "--engine slurm needs --time"),
        (("--engine", "slurm", "--partition", "cpu", "--time", "1"), "--engine slurm needs --ranks"),
        (
            ("--engine", "slurm", "--ranks", "1", "--partition", "p", "--time", "1", "--workers", "2"),
            "--workers has no meaning with --engine slurm; say --cpus-per-task",
        ),
    ],
)
def test_options_without_meaning_are_refused(folder: Path, tmp_path: Path, options, message: str, capsys) -> None:
    assert main(command(folder, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_datatrove_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "loguru", None)
    with pytest.raises(ConfigError, match=r"datatrove is not installed; pip install 'mcore-longctx\[datatrove\]'"):
        launch({"out": tmp_path / "out"}, "local", ranks=1)


def test_slurm_is_asked_for_where_there_is_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    options = ("--engine", "slurm", "--ranks", "2", "--partition", "cpu", "--time", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(command(folder, tmp_path / "out", *options)) == 2
    assert "--engine slurm: no command sbatch; run it where jobs are submitted" in capsys.readouterr().err
    for name in ("sbatch", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    assert main(command(folder, tmp_path / "a b", *options)) == 2
    assert "a b: --engine slurm: the path has blanks" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "out", *options, "--sbatch", "array=0-3")) == 2
    assert "--sbatch array: it is set by the engine" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    assert main(command(folder, tmp_path / "out", *options)) == 2
    assert "this is a task of an array job itself" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ a real SLURM with two nodes
@pytest.fixture(scope="module")
def slurm(folder: Path) -> Iterator[None]:
    """A sandbox of its own: its commands find it by SLURM_CONF."""
    del folder  # skips first where datatrove is missing
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({missing[0]})")
    if os.geteuid() != 0:
        pytest.skip("a SLURM of one's own needs root")
    place = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds a socket
    environment = os.environ | {"SLURM_SANDBOX_DIR": str(place / "s"), "SLURM_SANDBOX_NODES": "2", "SLURM_SANDBOX_CPUS": "2"}
    try:
        subprocess.run([SANDBOX, "start"], env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
        os.environ["SLURM_CONF"] = str(place / "s" / "slurm.conf")
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([SANDBOX, "stop"], env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
        shutil.rmtree(place)


def submit(folder: Path, out: Path, *options: str, slow: float | None = None) -> tuple[int, str, str]:
    words = ("--engine", "slurm", "--ranks", "4", "--partition", "main", "--time", "5", "--mem-per-cpu", "1", *options)
    with started(folder, out, *words, slow=slow) as process:
        printed, said = process.communicate(timeout=60)
    return process.returncode, printed, said


def queue(*options: str) -> str:
    return subprocess.run(["squeue", "--noheader", *options], capture_output=True, text=True, check=True).stdout.strip()


def logs(out: Path) -> str:
    return "\n".join(path.read_text() for path in (out / "jobs").rglob("slurm_logs/*.out"))


def test_one_command_on_a_two_node_slurm_gives_the_bytes_of_one_process(slurm, folder: Path, expected, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, said = submit(folder, out, "--sbatch", "export=ALL", "--finish-sbatch", "cpus-per-task=2")
    assert (code, said) == (0, "")
    assert f"{FILES} of {FILES} token shards in 4 ranks" in printed
    nodes: set[str] = set()
    wait_for(lambda: nodes.update(queue("--format", "%N").split()) or not queue())
    assert nodes == {"n0", "n1"}
    assert hashes_of(out) == expected, logs(out)
    # once more: nothing to tokenize, so only the last job is submitted, and it finds everything
    code, printed, _ = submit(folder, out)
    assert code == 0
    assert f"plans and packs; all {FILES} token shards are there" in printed
    wait_for(lambda: not queue())
    assert hashes_of(out) == expected
    assert "(done before)" in logs(out)


def test_an_array_task_is_cancelled_and_the_same_command_does_what_is_missing(
    slurm, folder: Path, expected, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, _ = submit(folder, out, slow=0.1)
    assert code == 0
    (array,) = re.findall(r"array job (\d+):", printed)
    wait_for(lambda: list((out / "tokens").glob("000001.tokens.partial-*")))  # rank 1 is at its first shard
    subprocess.run(["scancel", f"{array}_1"], check=True)
    wait_for(lambda: not queue())  # the job that would have packed is cancelled too
    assert not (out / "manifest.json").exists()
    assert not (out / "plan").exists()
    done = {path: path.stat().st_mtime_ns for path in (out / "tokens").glob("*.docs")}
    assert len(done) == FILES - 2, logs(out)
    (out / "tokens" / "000001.tokens.partial-another_node-1").touch()  # left by a rank that was killed there
    code, printed, _ = submit(folder, out)
    assert code == 0
    (array,) = re.findall(rf"array job (\d+): 2 of {FILES} token shards in 1 ranks", printed)
    wait_for(lambda: not queue())
    assert [path.stem for path in (out / "jobs").rglob(f"{array}_*.out")] == [f"{array}_0"]
    assert hashes_of(out) == expected, logs(out)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert writers(out) == []


def test_a_second_submission_is_refused_as_long_as_jobs_of_the_first_are_there(slurm, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = submit(folder, out, "--sbatch", "hold")
    jobs = re.findall(r"job (\d+):", printed)
    assert (code, len(jobs)) == (0, 2)
    code, printed, said = submit(folder, out)
    assert (code, printed) == (2, "")
    assert f"{out}: jobs that were submitted before work on this folder ({', '.join(jobs)}); wait for them, or end them:" in said
    subprocess.run(said.strip().rpartition("end them: ")[2].split(), check=True)
    wait_for(lambda: not queue())
    code, printed, said = submit(folder, out, "--partition", "nowhere")
    assert code == 2
    assert "nowhere" in said or "invalid partition" in said
    assert said.rstrip().endswith("sbatch refuses (it says why above); change the options")
    assert queue() == ""
    assert not any(open_job(out).is_done(task) for task in range(FILES))


def test_the_sandbox_leaves_nothing_and_touches_nothing_else(slurm, tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    environment = os.environ | {"SLURM_SANDBOX_DIR": str(place / "s"), "SLURM_SANDBOX_NODES": "1"}

    def sandbox(verb: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([SANDBOX, verb], env=environment | changes, capture_output=True, text=True, timeout=60, check=False)

    try:
        assert sandbox("status").returncode == 1
        assert sandbox("start").stdout == f"started 1 nodes in {place}/s\n"
        assert sandbox("start").stdout == f"already running in {place}/s\n"
        status = sandbox("status")
        assert status.returncode == 0
        pids = [int(line.split()[1]) for line in status.stdout.splitlines() if re.match(r"slurm\S+ \d+$|munged \d+$", line)]
        assert len(pids) == 3
        (place / "s" / "run" / "slurmd-n0.pid").write_text(f"{os.getpid()}\n")  # a number that another process has now
        assert sandbox("stop").returncode == 0
        left = [pid for pid in pids if is_alive(pid)]
        assert len(left) == 1  # the slurmd whose number was lost
        os.kill(left[0], signal.SIGTERM)
        wait_for(lambda: not is_alive(left[0]))
        assert queue() == ""  # the other sandbox is there still
        (tmp_path / "mine").touch()
        refused = sandbox("start", SLURM_SANDBOX_DIR=str(tmp_path))
        assert refused.returncode == 2
        if len(str(tmp_path)) <= 85:
            assert "is not empty and no sandbox" in refused.stderr
        assert (tmp_path / "mine").exists()
    finally:
        sandbox("stop")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(place)
