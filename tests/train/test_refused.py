"""What training must not start from, or go on with: one line, the right exit code, nothing trained, nothing lost."""

from __future__ import annotations

import pickle
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.manifest import MANIFEST, verify_manifest, write_manifest
from mcore_longctx.recipe import CARD, read_card
from mcore_longctx.rope import RopeScaling
from mcore_longctx.train import TrainJob, iteration_folder, latest_checkpoint
from mcore_longctx.train.job import refuse_changed_settings
from tests.train.jobs import Ranks, make_job, make_world, refused, rows, start_at, train, write_data

pytestmark = pytest.mark.multiproc


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world: Path) -> TrainJob:
    job = make_job(world, "trained", train_iters=4)
    train(job)
    return job


@pytest.fixture
def resumable(world: Path, trained: TrainJob, tmp_path: Path) -> TrainJob:
    """A job of its own that would go on from iteration 2."""
    job = make_job(world, f"resumable-{tmp_path.name}", train_iters=4)
    # kept by the checkpoint at 4, which has the same contents but for its name
    return start_at(job, iteration_folder(trained.checkpoints, 2))


def refusal(job: TrainJob) -> str:
    """The message with which rank 0 refuses to start, before anything is built."""
    from mcore_longctx.train.loop import _damage_of_share, _find_start

    error = _damage_of_share(latest_checkpoint(job.checkpoints) or job.start_checkpoint, 0, 1)
    if error is None:
        with pytest.raises(CheckpointError) as caught:
            _find_start(job)
        error = caught.value
    assert isinstance(error, CheckpointError)
    assert error.exit_code == 2
    return str(error).replace(f"{job.checkpoints.parent.parent.parent}/", "")


def newest(job: TrainJob) -> Path:
    found = latest_checkpoint(job.checkpoints)
    assert found is not None
    return found


def flip_bit(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("content", ["absent", "empty", "only a file"])
def test_a_path_that_holds_no_checkpoint_is_refused(world: Path, tmp_path: Path, content: str) -> None:
    place = tmp_path / "place"
    if content != "absent":
        place.mkdir()
    if content == "only a file":
        (place / "weights.bin").write_text("")
    message = refusal(make_job(world, "nothing", start_checkpoint=place))
    if content == "only a file":
        assert message == f"{place}: no manifest.json: this checkpoint was not finished, or not written by mcore-longctx"
    else:
        assert message == f"{place}: no checkpoint here; check the path"


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", CARD, "hf/config.json"])
def test_one_flipped_bit_is_refused(resumable: TrainJob, name: str) -> None:
    flip_bit(newest(resumable) / name)
    message = refusal(resumable)
    run = resumable.checkpoints.parent.parent.name
    assert message == (
        f"{run}/checkpoints/extend/iter_0000002/{name}: contents differ from the manifest's sha256; the checkpoint is damaged, use another copy"
    )


def test_the_damaged_newest_is_not_passed_over_for_an_older_one(world: Path, trained: TrainJob) -> None:
    job = make_job(world, "two", train_iters=8)
    for iteration in (2, 4):
        start_at(job, iteration_folder(trained.checkpoints, iteration))
    (newest(job) / "__0_0.distcp").unlink()
    before = {path: path.read_bytes() for path in job.checkpoints.rglob("*") if path.is_file()}
    line = refused(job)
    assert (
        line
        == f"mcore-longctx: {newest(job)}/__0_0.distcp: listed in the manifest but missing; the checkpoint is damaged, use another copy"
    )
    assert (job.log_folder / "STATUS").read_text() == f"failed 2 {line.removeprefix('mcore-longctx: ')}\n"
    after = {path: path.read_bytes() for path in job.checkpoints.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert not job.metrics_path.exists()


def test_a_base_with_a_flipped_bit_is_refused(world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    flip_bit(next(base.glob("*.distcp")))
    assert "contents differ from the manifest's sha256" in refusal(make_job(world, "flipped", start_checkpoint=base))


def test_another_rope_is_refused(world: Path, resumable: TrainJob) -> None:
    other = RopeScaling(type="llama3", head_dim=16, rope_theta=10000.0, factor=4, original_max_position_embeddings=32)
    for job in (replace(resumable, rope=other), make_job(world, "other-rope", start_rope=other)):
        assert re.search(
            r": rope differs: the checkpoint has .* \[[0-9a-f]{12}\], expected llama3 factor 4 .*; set rope in", refusal(job)
        )


def test_another_vocabulary_and_another_model_are_refused(world: Path, resumable: TrainJob) -> None:
    shape = resumable.shape
    for job in (resumable, make_job(world, "other-model")):
        wider = refusal(replace(job, shape=replace(shape, vocab_size=127)))
        assert "vocabulary has 126 entries, the recipe's model 127; use the checkpoint that belongs to this recipe" in wider
        deeper = refusal(replace(job, shape=replace(shape, num_layers=3)))
        assert deeper.endswith("num_layers is 2, the recipe's model has 3")


def test_another_tokenizer_is_refused(world: Path, resumable: TrainJob) -> None:
    made_for = read_card(world / "base").tokenizer_sha256
    assert made_for is not None
    for job in (resumable, make_job(world, "other-tokenizer")):
        message = refusal(replace(job, tokenizer_sha256="ab" * 32))
        assert f"made for another tokenizer ({made_for[:12]}, the recipe's is abababababab); use the tokenizer" in message


def test_a_checkpoint_of_another_stage_is_refused(resumable: TrainJob) -> None:
    job = replace(resumable, stage=replace(resumable.stage, name="instruct"))
    assert refusal(job).endswith("belongs to stage 'extend', not 'instruct'")


class Exploit:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/mcore-longctx-exploited"),))


def test_a_pickle_that_names_something_else_is_refused_unread(world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / MANIFEST).unlink()
    (base / ".metadata").write_bytes(pickle.dumps(Exploit()))
    write_manifest(base, "checkpoint", stage="base", iteration=0)
    message = refusal(make_job(world, "exploit", start_checkpoint=base))
    assert "which is not allowed in a checkpoint; refused" in message
    assert not Path("/tmp/mcore-longctx-exploited").exists()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", CARD])
def test_a_file_that_the_manifest_does_not_vouch_for_is_refused(resumable: TrainJob, name: str) -> None:
    folder = newest(resumable)
    kept = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / MANIFEST).unlink()
    write_manifest(folder, "checkpoint", stage="extend", iteration=2, settings={})
    (folder / name).write_bytes(kept)
    message = refusal(resumable)
    assert f"no {name} in the manifest" in message or f"{name} is used but not in the manifest" in message


# ------------------------------------------------------------------ settings and data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1e-3}, "optimizer.lr was 0.003, is 0.001 now"),
        ({"seed": 8}, "seed was 7, is 8 now"),
        ({"global_batch_size": 8}, "global_batch_size was 4, is 8 now"),
        ({"train_iters": 8}, "train_iters was 4, is 8 now"),
        ({"precision": "bf16"}, "precision was 'fp32', is 'bf16' now"),
        ({"phase_dtype": "float64"}, "rope.phase_dtype was 'float32', is 'float64' now"),
        (
            {"clip_grad": 0.5, "adam_beta2": 0.99},
            "optimizer.adam_beta2 was 0.95, is 0.99 now, optimizer.clip_grad was 1.0, is 0.5 now",
        ),
    ],
)
def test_changed_settings_are_refused_by_name(world: Path, resumable: TrainJob, changes: dict[str, Any], words: str) -> None:
    changed = make_job(world, resumable.checkpoints.parent.parent.name, **({"train_iters": 4} | changes))
    assert refusal(changed).endswith(
        f": trained with other settings: {words}; set them back to go on, or train into another output folder"
    )


def test_settings_that_change_no_loss_may_change(world: Path, resumable: TrainJob) -> None:
    from mcore_longctx.train.loop import _find_start

    run = resumable.checkpoints.parent.parent.name
    layout = {"context_parallel_size": 2, "micro_batch_size": 2, "save_interval": 1, "keep_checkpoints": 5}
    assert _find_start(make_job(world, run, train_iters=4, **layout)).folder == newest(resumable)
    # the stage before may have been cleared away
    gone = make_job(world, run, train_iters=4, start_checkpoint=world / "gone")
    assert _find_start(gone).resumes


def test_changed_data_and_a_changed_start_are_refused_by_name(world: Path, resumable: TrainJob, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", top=120)
    assert "trained with other settings: data has changed since" in refusal(replace(resumable, data_prefix=data))
    base = shutil.copytree(world / "base", tmp_path / "base")
    (base / MANIFEST).write_text((base / MANIFEST).read_text().replace('"iteration": 0', '"iteration":  0'))
    assert "trained with other settings: start checkpoint has changed since" in refusal(replace(resumable, start_checkpoint=base))


def test_damaged_data_and_data_of_another_tokenizer_are_refused(world: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    job = make_job(world, "data", data_prefix=data)
    manifest = verify_manifest(data.parent, "data")
    write_manifest(data.parent, "data", tokenizer={"sha256": "cd" * 32})
    made_for = read_card(world / "base").tokenizer_sha256
    message = refusal(replace(job, tokenizer_sha256=made_for))
    assert message.startswith(
        f"{data.parent}: tokenized with another tokenizer (cdcdcdcdcdcd, the recipe's is {str(made_for)[:12]})"
    )
    assert "no files of other in the manifest" in refusal(replace(job, data_prefix=data.parent / "other"))
    flip_bit(data.parent / "set.bin")
    assert "set.bin: contents differ from the manifest's sha256; the data is damaged" in refusal(job)
    assert "set.bin" in manifest["files"]


def test_a_setting_that_the_checkpoint_does_not_know_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^here: trained with other settings: new was None, is 1 now; set them back"):
        refuse_changed_settings({"old": 1}, {"old": 1, "new": 1}, where=Path("here"))


def test_impossible_jobs_are_refused_at_once(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"2,147,483,648 tokens a step; megatron-core counts them in int32: stay below 2\^31"):
        make_job(world, "many", global_batch_size=2**25)


# ------------------------------------------------------------------ while it runs


def test_two_at_once_are_refused_and_the_first_goes_on(world: Path) -> None:
    first = Ranks(make_job(world, "twice", train_iters=2000, save_interval=2000))
    first.wait_for("iteration    1/2000")
    second = make_job(world, "twice", context_parallel_size=2, log_folder=world / "twice" / "second")
    line = refused(second)
    words = rf"mcore-longctx: {first.job.checkpoints}: process {first.processes[0].pid} on \S+ trains into this folder; wait"
    assert re.match(words, line)
    said = first.output(0).count("lm loss")
    first.wait_for(f"iteration {said + 1:4d}/2000")
    first.send(signal.SIGTERM)
    assert first.wait() == [75]
    assert not (second.log_folder / "STATUS").exists()


def test_a_learning_rate_that_destroys_stops_with_the_samples(world: Path) -> None:
    from mcore_longctx.train.order import SampleOrder

    job = make_job(world, "nan", lr=1e30, min_lr=0.0, save_interval=1, context_parallel_size=2)
    line = refused(job, code=1)
    order = SampleOrder(20, seed=job.seed)
    # which of the two comes first depends on how far the normalisation carries the loss
    what = r"(?:loss is (?:nan|inf)|grad norm is (?:nan|inf), the loss is a number)"
    found = re.fullmatch(
        rf"mcore-longctx: {job.data_prefix}: iteration (\d): {what} \(samples ([\d, ]+)\); look at these samples or lower the"
        r" learning rate; no step was taken, iter_000000(\d) is the newest checkpoint",
        line,
    )
    assert found, line
    iteration = int(found[1])
    assert {int(number) for number in found[2].split(", ")} == {order[4 * (iteration - 1) + i] for i in range(4)}
    assert int(found[3]) == iteration - 1 == rows(job)[-1]["step"]
    verify_manifest(newest(job), "checkpoint")


def spoil(rank: int, sample: int, what: str) -> None:
    """NaN in the loss of one sample, or in the gradients alone."""
    from mcore_longctx.train import loop
    from mcore_longctx.train.dataset import StepData

    if what == "gradients":
        wrap_model = loop.wrap_model

        def wrapped(model: Any) -> Any:
            next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
            return wrap_model(model)

        loop.wrap_model = wrapped
        return
    current: list[tuple[int, ...]] = []
    as_tensors = StepData._as_tensors

    def noted(self: StepData, rows: Any) -> Any:
        current[:] = [rows.sample_ids]
        return as_tensors(self, rows)

    StepData._as_tensors = noted
    build = loop.build_gpt_model

    def built(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.register_forward_hook(lambda module, inputs, losses: losses * float("nan") if sample in current[0] else losses)
        return model

    loop.build_gpt_model = built


def test_nan_of_one_sample_on_one_rank_names_it(world: Path) -> None:
    from mcore_longctx.train.order import SampleOrder

    job = make_job(world, "one-nan", data_parallel_size=2, save_interval=1)
    sample = SampleOrder(20, seed=job.seed)[4 + 3]  # second step, rank 1
    line = refused(job, code=1, before=spoil, args=(sample, "loss"))
    assert f"iteration 2: loss is nan (sample {sample}); look at these" in line
    assert newest(job).name == "iter_0000001"


def test_nan_in_the_gradients_alone_stops_before_the_step(world: Path) -> None:
    from mcore_longctx.train.order import SampleOrder

    job = make_job(world, "nan-gradients", save_interval=1)
    line = refused(job, code=1, before=spoil, args=(0, "gradients"))
    ids = ", ".join(str(SampleOrder(20, seed=job.seed)[i]) for i in range(4))
    assert f"iteration 1: grad norm is nan, the loss is a number (samples {ids}); look at these" in line
    assert line.endswith("no step was taken, nothing has been saved")
    assert latest_checkpoint(job.checkpoints) is None


def test_a_step_without_any_loss_token_is_said(world: Path, tmp_path: Path) -> None:
    job = make_job(world, "masked", data_prefix=write_data(tmp_path / "data", all_masked=True))
    assert "iteration 1: no token of the step carries loss (samples " in refused(job, code=1)


def test_a_token_outside_the_vocabulary_ends_all_ranks_with_2(world: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", top=127)  # 126 is inside the padding of the embedding
    line = refused(make_job(world, "outside", data_prefix=data, data_parallel_size=2))
    assert re.search(r"sample \d+ holds token 126, the vocabulary has 126; build the data again", line)


def limit_file_size(rank: int, size: int) -> None:
    """No file of this process may grow beyond `size` bytes: what a full disk or a quota looks like to a writer."""
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_save_that_fails_keeps_the_old_checkpoint(world: Path, trained: TrainJob) -> None:
    job = make_job(world, "full", train_iters=4, context_parallel_size=2)
    start_at(job, iteration_folder(trained.checkpoints, 2))
    line = refused(job, code=1, before=limit_file_size, args=(100_000,))
    assert line.startswith(f"mcore-longctx: {job.checkpoints}/iter_0000004: the checkpoint could not be written: rank 1: ")
    assert line.endswith("; iter_0000002 is untouched")
    assert [path.name for path in job.checkpoints.iterdir() if path.is_dir()] == ["iter_0000002"]
    train(job)
    assert [row["samples"] for row in rows(job)] == [row["samples"] for row in rows(trained)[2:]]


def test_the_wrong_number_of_ranks_is_said_once(world: Path) -> None:
    job = make_job(world, "ranks", context_parallel_size=2)
    ranks = Ranks(job, size=1)
    assert ranks.wait() == [2]
    (line,) = ranks.errors()
    assert line.startswith("mcore-longctx: the layout needs TP 1 x PP 1 x CP 2 p2p x DP 1 = 2 ranks, but 1 was started; start 2")
