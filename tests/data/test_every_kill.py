"""A build that dies at any change of a folder, one after the other: nothing looks finished, and the next start gives the same bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_longctx.data.files.shards import read_shard
from mcore_longctx.data.inspect.verify import verify_data, verify_tokens
from mcore_longctx.data.pack import pack
from mcore_longctx.data.planning.plan import make_plan, read_plan
from mcore_longctx.data.planning.separator import make_separator
from mcore_longctx.data.samples import PackedSamples
from mcore_longctx.data.tokenizers import load_tokenizer
from mcore_longctx.data.tokens.job import open_job, prepare_job, read_documents_table
from mcore_longctx.data.tokens.tokenize import run_job
from mcore_longctx.data.workspace import lock_folder
from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.manifest import MANIFEST
from mcore_longctx.recipe.schema import DataSection, DocumentSource
from tests.data.conftest import words
from tests.data.limits import died_at

NAME = "text"
SEQ_LENGTH = 64
MOST = 200  # changes of folders in one build, and more

Tree = dict[str, bytes]
Step = Callable[[Path], object]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks from little data, and no picture: drawing takes longer than all the rest."""
    monkeypatch.setattr("mcore_longctx.data.pack._BLOCK_BYTES", 12 * SEQ_LENGTH)
    monkeypatch.setattr("mcore_longctx.data.planning.plan.plot_lengths", lambda _, path, **__: path.write_bytes(b"a picture"))


@pytest.fixture
def tokenize(tmp_path: Path, tokenizer_folder: Path, jsonl) -> Step:
    path = jsonl("a.jsonl", [{"id": f"{i}", "text": words(i, 20)} for i in range(24)])
    tools = load_tokenizer(tokenizer_folder)
    sources = (DocumentSource(name="a", path=path),)

    def step(out: Path) -> None:
        out.mkdir(exist_ok=True)
        with lock_folder(out):
            run_job(prepare_job(out, sources, tools, vocab_size=512, range_bytes=path.stat().st_size // 3 + 1), tools)

    return step


def plan_and_pack(seed: int) -> Step:
    """`data plan` and `data pack`."""

    def step(out: Path) -> None:
        with lock_folder(out):
            job = open_job(out)
            section, table = DataSection(sources=job.sources), read_documents_table(job)
            separator = make_separator(section, job)
            make_plan(out / "plan", table, section, name=NAME, seed=seed, seq_length=SEQ_LENGTH, separator=separator)
        with lock_folder(out):
            pack(out, NAME)

    return step


def tree(out: Path) -> Tree:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def looks_finished(out: Path) -> bool:
    """Whether a reader takes the samples for whole. What stands under a final name must be what it says, at any time."""
    if (out / "tokens" / "settings.json").exists():
        open_job(out)
    for path in (out / "tokens").glob("*.docs"):
        if path.stem.isdigit():
            assert len(read_shard(out / "tokens", int(path.stem)).tokens())
    if (out / "tokens" / MANIFEST).exists():
        verify_tokens(out)
    if (out / "plan" / "plan.json").exists():
        read_plan(out / "plan")
    if (out / MANIFEST).exists():
        verify_data(out)
    if (out / f"{NAME}.idx").exists():  # Megatron finds a whole pair or nothing
        assert (out / f"{NAME}.bin").exists()
        assert (out / f"{NAME}.runs").exists()
    try:
        samples = PackedSamples(out / NAME)
    except LongctxError:
        assert not (out / MANIFEST).exists()
        return False
    for index in range(len(samples)):
        samples.check_sample(index)
    return True


def test_a_build_that_dies_at_any_change_ends_in_the_same_bytes(tokenize: Step, tmp_path: Path) -> None:
    """The same command again after each; and with a plan of another seed, as somebody does who has changed his mind."""

    def build(seed: int) -> Step:
        return lambda out: (tokenize(out), plan_and_pack(seed)(out))

    whole: dict[int, Tree] = {}
    for seed in (1, 2):
        build(seed)(tmp_path / f"whole{seed}")
        whole[seed] = tree(tmp_path / f"whole{seed}")
    assert whole[1][f"{NAME}.bin"] != whole[2][f"{NAME}.bin"]
    assert len([name for name in whole[1] if name.endswith(".docs")]) >= 3
    died, wrong = 0, {}
    for number in range(1, MOST):
        out, other = tmp_path / f"same{number}", tmp_path / f"other{number}"
        if not died_at(number, lambda out=out: build(1)(out)):
            break
        died = number
        shutil.copytree(out, other) if out.exists() else None
        for again, seed in ((out, 1), (other, 2)):
            if fault := fault_after(again, whole[1], whole[seed], build(seed)):
                wrong[number, seed] = fault
    assert 30 < died < MOST - 1
    assert not wrong, "\n".join(f"died at change {key}: {fault}" for key, fault in wrong.items())


def test_a_pack_half_done_and_another_plan_that_dies_at_any_change_end_in_the_bytes_of_the_other(
    tokenize: Step, tmp_path: Path
) -> None:
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    tokenize(whole)
    shutil.copytree(whole, begun)
    plan_and_pack(2)(whole)
    expected = tree(whole)
    marks = 0
    for number in range(1, MOST):  # until some blocks of the first plan are on disk
        shutil.rmtree(begun)
        tokenize(begun)
        died_at(number, lambda: plan_and_pack(1)(begun))
        marks = len(list((begun / f"{NAME}.packing").glob("*.crc")))
        if marks == 2:
            break
    assert marks == 2
    died, wrong = 0, {}
    for number in range(1, MOST):
        out = tmp_path / f"out{number}"
        shutil.copytree(begun, out)
        if not died_at(number, lambda out=out: plan_and_pack(2)(out)):
            break
        died = number
        if fault := fault_after(out, expected, expected, plan_and_pack(2)):
            wrong[number] = fault
    assert 20 < died < MOST - 1
    assert not wrong, "\n".join(f"died at change {number}: {fault}" for number, fault in wrong.items())


def fault_after(out: Path, before: Tree, expected: Tree, again: Step) -> str:
    """What is wrong in a folder in which a build of `before` died, and after it was begun again, in words.

    Finished data of another plan is refused and kept. Everything else becomes `expected`, with no other file beside it.
    """
    try:
        is_finished = looks_finished(out)
    except (LongctxError, AssertionError) as error:
        return f"looks finished and is not: {error!r}"
    left = {name: raw for name, raw in tree(out).items() if name in before and "/" not in name} if out.exists() else {}
    if is_finished and any(left[f"{NAME}.{suffix}"] != before[f"{NAME}.{suffix}"] for suffix in ("bin", "idx", "runs")):
        return "other samples than those that were built"
    try:
        again(out)
    except ConfigError as error:
        if not (MANIFEST in left and before is not expected):
            return f"refused: {error}"
        return "" if {name: tree(out)[name] for name in left} == left else "finished data was touched"
    except LongctxError as error:
        return f"refused: {error}"
    found = tree(out)
    differ = [name for name in expected if found.get(name) != expected[name]]
    return f"differ {differ}, beside them {sorted(set(found) - set(expected))}" if found != expected else ""
