"""Killed at any time, started again, with any number of workers: the same bytes, and nothing that looks finished before it is."""

import hashlib
import os
import random
import resource
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from mcore_longctx.data.build import build
from mcore_longctx.data.inspect.verify import verify_data
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens import job as job_module
from mcore_longctx.data.tokens.job import prepare_job, read_documents_table
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.errors import DataError, LongctxError
from mcore_longctx.recipe.schema import DataSection, DocumentSource, LengthSampling, TokenCount
from tests.data.conftest import words

FORK = get_context("fork")
FINAL = ("text.bin", "text.idx", "text.runs", "lengths.json", "manifest.json")


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    """Three sources of short and long documents, some of them under one id."""
    import json

    folder = tmp_path_factory.mktemp("corpus")
    for name, count in (("short", 200), ("middle", 60)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps({"id": f"{name}{i % (count - 7)}", "text": words(i, 5 + i % 150)}) + "\n")
    (folder / "long").mkdir()
    for i in range(12):
        (folder / "long" / f"{i:02d}.txt").write_text(words(1000 + i, 900))
    how = LengthSampling(
        short_below=TokenCount(100), keep_probability=0.5, long_above=TokenCount(1000), repetition=1.7, min_length=TokenCount(5)
    )
    paths = {"short": folder / "short.jsonl", "middle": folder / "middle.jsonl", "long": folder / "long"}
    return DataSection(
        sources=tuple(DocumentSource(name=name, path=path) for name, path in paths.items()), length_sampling=how, separator="<s>"
    )


def run(section: DataSection, tokenizer: Path, out: Path, workers: int) -> None:
    build(
        section,
        "text",
        chats=False,
        tokenizer=tokenizer,
        model_vocab_size=512,
        seq_length=512,
        num_samples=None,
        seed=3,
        out=out,
        workers=workers,
    )


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks and blocks from little data."""
    monkeypatch.setattr(job_module, "RANGE_BYTES", 4096)
    monkeypatch.setattr("mcore_longctx.data.build.RANGE_BYTES", 4096)
    monkeypatch.setattr("mcore_longctx.data.pack._BLOCK_BYTES", 8192)


def hashes(out: Path) -> dict[str, str]:
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FINAL}


@pytest.fixture(scope="module")
def whole(section, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "RANGE_BYTES", 4096)
        patch.setattr("mcore_longctx.data.build.RANGE_BYTES", 4096)
        patch.setattr("mcore_longctx.data.pack._BLOCK_BYTES", 8192)
        out = tmp_path_factory.mktemp("whole") / "out"
        run(section, tokenizer_folder, out, 1)
        verify_data(out)
        return hashes(out)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(section, whole, tokenizer_folder: Path, tmp_path: Path, workers: int) -> None:
    run(section, tokenizer_folder, tmp_path / "out", workers)
    assert hashes(tmp_path / "out") == whole
    assert len(list((tmp_path / "out" / "tokens").glob("*.docs"))) > 20


def test_the_size_of_a_task_does_not_show_in_the_samples(
    section, whole, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "RANGE_BYTES", 1 << 20)
    tokenizer = load_tokenizer(tokenizer_folder)
    out = tmp_path / "out"
    job = prepare_job(out, section.sources, tokenizer, vocab_size=512, range_bytes=1 << 20)
    assert len(job.tasks) == 3
    run_job(job, tokenizer)
    from mcore_longctx.data.pack import pack
    from mcore_longctx.data.planning.plan import make_plan
    from mcore_longctx.data.planning.separator import make_separator

    table = read_documents_table(job)
    make_plan(out / "plan", table, section, name="text", seed=3, seq_length=512, separator=make_separator(section, job))
    pack(out, "text")
    for name in ("text.bin", "text.idx", "text.runs", "lengths.json"):
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == whole[name], name


def test_sixty_kills_and_restarts_give_the_same_bytes(section, whole, tokenizer_folder: Path, tmp_path: Path) -> None:
    """kill -9 at random times. After each the folder is looked at: no reader may take it for finished."""
    rng = random.Random(11)
    kills = finished = 0
    out = tmp_path / "out0"
    deadline = time.monotonic() + 240
    pace = 0.15  # seconds until the kill, at most
    while kills < 60:
        assert time.monotonic() < deadline, f"only {kills} kills"
        process = FORK.Process(target=run, args=(section, tokenizer_folder, out, rng.choice([1, 1, 2])))
        process.start()
        process.join(rng.random() * pace)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if (out / "manifest.json").exists():
            assert hashes(out) == whole
            assert process.exitcode in (0, -signal.SIGKILL)
            finished += 1
            out = tmp_path / f"out{finished}"
        else:
            assert process.exitcode == -signal.SIGKILL
            with pytest.raises(LongctxError):
                verify_data(out)
    for _ in range(100):  # workers of the last kill may still hold the lock for a moment
        try:
            run(section, tokenizer_folder, out, 2)
            break
        except LongctxError as error:
            assert "another run works on this folder" in str(error)  # noqa: PT017
            time.sleep(0.05)
    assert hashes(out) == whole
    left = [path.name for path in out.rglob("*") if ".partial" in path.name or path.name.endswith((".packing", ".new"))]
    assert left == []


def test_two_at_once_on_one_folder_end_in_one_result(section, whole, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [FORK.Process(target=run, args=(section, tokenizer_folder, out, 2)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode is not None
    assert 0 in [process.exitcode for process in both]
    assert hashes(out) == whole


@pytest.mark.parametrize("limit", [600, 3_000, 9_000, 30_000, 60_000])
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on(
    section, whole, tokenizer_folder: Path, tmp_path: Path, limit: int
) -> None:
    """No file may grow beyond `limit` bytes: the system says so as it says that a disk is full."""
    out, said = tmp_path / "out", tmp_path / "said"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run(section, tokenizer_folder, out, 2)
        except DataError as error:
            said.write_text(str(error))

    process = FORK.Process(target=limited)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "(File too large); make room" in said.read_text()
    assert not (out / "manifest.json").exists()
    assert [path.name for path in out.rglob("*") if ".partial" in path.name] == []
    run(section, tokenizer_folder, out, 1)
    assert hashes(out) == whole
