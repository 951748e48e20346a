"""A whole column on every layout against transformers: the same samples, the same answers, the same losses."""

import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
from mcore_longctx.errors import CheckpointError, ConfigError, DataError, LayoutError
from mcore_longctx.evaluate import EvaluateJob, evaluate_column
from mcore_longctx.evaluate.held_out import cut_windows, read_documents
from mcore_longctx.evaluate.loss_by_position import bin_edges
from mcore_longctx.layout import zigzag_owner
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.tasks import Haystack, make_needle_sample

from . import tiny_checkpoint as tiny

LAYOUTS = {
    "cp2-ring": Parallel(context_parallel_size=2, cp_comm_type="p2p"),
    "cp2-gather": Parallel(context_parallel_size=2, cp_comm_type="all_gather"),
    "tp2": Parallel(tensor_model_parallel_size=2),
    "tp2-sp": Parallel(tensor_model_parallel_size=2, sequence_parallel=True),
}
SPAN, SPAN_START = 64, 40  # its answer lies on both ranks of CP 2
LOG_PROBABILITY = 2e-5  # float32 through two layers, other order of sums


def job_of(folder: Path, name: str, parallel: Parallel, **changes) -> EvaluateJob:
    settings = {
        "evaluate": tiny.section(folder, parallel),
        "shape": tiny.SHAPE,
        "rope": tiny.SCALED,
        "checkpoint": folder / "base",
        "checkpoint_rope": tiny.OWN,
        "tokenizer": folder / "hf",
        "out": folder / "evaluate" / name,
    }
    return EvaluateJob(**(settings | changes))


def rows_of(folder: Path, column: str, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluate" / column / f"{task}.jsonl").read_text().splitlines()]


def spanning_answer(model, tokens):
    """Score an answer whose rows lie on several ranks."""
    from mcore_longctx.evaluate.scoring import score_answer

    score = score_answer(model, np.array(tokens), SPAN_START)
    return {"got": score.got.tolist(), "log_probability": score.log_probability.tolist()}


def work(rank: int, folder: Path, tokens: list[int]) -> None:
    """One of two processes: every layout in turn."""
    import torch.distributed as dist

    from mcore_longctx.megatron_compat import device_context
    from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
    from mcore_longctx.model.weights import load_model_weights

    torch.set_num_threads(1)
    for name, parallel in LAYOUTS.items():
        store = dist.FileStore(str(folder / f"store-{name}"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        evaluate_column(job_of(folder, name, parallel))
        store = dist.FileStore(str(folder / f"store-span-{name}"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        init_process_groups(parallel, seed=1)
        with device_context():
            model = build_gpt_model(tiny.SHAPE, tiny.SCALED, parallel, precision="fp32", seq_length=SPAN, seed=None)
            load_model_weights(model, folder / "base")
            found = spanning_answer(model, tokens)
        (folder / f"span-{name}-{rank}.json").write_text(json.dumps(found))
        destroy_process_groups()


@pytest.fixture(scope="module")
def hf():
    """The oracle: the same weights with the scaled rope, in transformers."""
    return tiny.hf_model(tiny.SCALED)


def greedy_span(hf) -> list[int]:
    """A prompt and what transformers answers to it, greedily."""
    tokens = torch.arange(SPAN_START)[None] * 7 % 256
    with torch.no_grad():
        while tokens.size(1) < SPAN:
            tokens = torch.cat([tokens, hf(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0].tolist()


@pytest.fixture(scope="module")
def columns(tmp_path_factory, hf):
    """Folder with a column of every layout: one process here, two processes together for all other layouts."""
    folder = tiny.make(tmp_path_factory.mktemp("columns"))
    said = []
    evaluate_column(job_of(folder, "single", Parallel()), say=said.append)
    (folder / "said.json").write_text(json.dumps(said))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank, folder, greedy_span(hf)), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 240
    try:
        while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    return folder


@pytest.mark.multiproc
def test_needle_rows_say_what_transformers_says(columns, hf):
    tokenizer = EvaluationTokenizer(columns / "hf", tiny.SHAPE.vocab_size)
    haystack = Haystack.from_documents(read_documents(columns / "held-out.txt"), tokenizer)
    rows = rows_of(columns, "single", "needle")
    assert [(row["length"], row["depth"], row["index"]) for row in rows] == [
        (length, depth, index) for length in (128, 256) for depth in (0.0, 0.5, 1.0) for index in (0, 1)
    ]
    for row in rows:
        where = {name: row[name] for name in ("length", "depth", "index")}
        sample = make_needle_sample(haystack, tokenizer, seed=1234, digits=4, prefix=(tiny.BOS,), **where)
        with torch.no_grad():
            logits = hf(torch.from_numpy(sample.tokens)[None]).logits[0, sample.answer_start - 1 : -1].double()
        answer = torch.from_numpy(sample.answer)
        assert row["got"] == tokenizer.decode(logits.argmax(-1).tolist())
        assert row["score"] == pytest.approx(logits.log_softmax(-1).gather(1, answer[:, None]).mean().item(), abs=LOG_PROBABILITY)
        assert row["correct"] == bool((logits.argmax(-1) == answer).all())
        assert (row["key"], row["expected"]) == (sample.key, f" {sample.value}")
        assert {"task", "seed", "tokens", "unique_share", "seconds", "model", "rope"} <= row.keys()
        assert row["tokens"] == row["length"]


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_scores_needles_as_one_process_does(columns, layout):
    for here, alone in zip(rows_of(columns, layout, "needle"), rows_of(columns, "single", "needle"), strict=True):
        assert here["score"] == pytest.approx(alone["score"], abs=LOG_PROBABILITY)
        same = [name for name in here if name not in ("seconds", "score")]
        assert [here[name] for name in same] == [alone[name] for name in same]


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_that_spans_two_ranks_is_found_whole(columns, hf, layout):
    tokens = greedy_span(hf)
    assert {zigzag_owner(p, SPAN, 2)[0] for p in range(SPAN_START - 1, SPAN - 1)} == {0, 1}
    with torch.no_grad():
        logits = hf(torch.tensor([tokens])).logits[0, SPAN_START - 1 : -1].double()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens[SPAN_START:])[:, None])[:, 0].tolist()
    for rank in range(2):
        found = json.loads((columns / f"span-{layout}-{rank}.json").read_text())
        assert found["got"] == tokens[SPAN_START:]  # greedy decoding, token for token
        assert found["log_probability"] == pytest.approx(expected, abs=LOG_PROBABILITY)


def hf_losses(hf, tokens) -> np.ndarray:
    """Loss of each token after the first, float64 [s - 1]."""
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        log_p = hf(ids).logits[0, :-1].double().log_softmax(-1)
    return -log_p.gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
def test_losses_by_position_equal_transformers_losses(columns, hf, layout):
    tokenizer = EvaluationTokenizer(columns / "hf", tiny.SHAPE.vocab_size)
    text = tokenizer.encode_array((columns / "held-out.txt").read_text())
    windows = cut_windows(text, tokenizer.prefix, count=4, length=256, where="here")
    rows = rows_of(columns, layout, "loss_by_position")
    assert len(rows) == 4
    for row, tokens in zip(rows, windows.tokens, strict=True):
        losses = hf_losses(hf, tokens)
        assert row["edges"] == [0, 16, 32, 64, 128, 256]
        assert row["counts"] == [15, 16, 32, 64, 128]  # position 0 has nothing before it
        for first, end, total in zip(row["edges"][:-1], row["edges"][1:], row["sums"], strict=True):
            assert total == pytest.approx(losses[max(first, 1) - 1 : end - 1].sum(), rel=1e-5)
        assert row["score"] == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", ["single", *LAYOUTS])
def test_short_windows_equal_transformers_losses(columns, hf, layout):
    tokenizer = EvaluationTokenizer(columns / "hf", tiny.SHAPE.vocab_size)
    text = tokenizer.encode_array((columns / "held-out.txt").read_text())
    windows = cut_windows(text, tokenizer.prefix, count=6, length=128, where="here")
    for row, tokens in zip(rows_of(columns, layout, "short_context"), windows.tokens, strict=True):
        assert row["count"] == 127
        assert row["sum"] == pytest.approx(hf_losses(hf, tokens).sum(), rel=1e-5)


@pytest.mark.multiproc
def test_progress_is_one_line_per_length_and_task(columns):
    said = json.loads((columns / "said.json").read_text())
    starts = [
        "needle        128 tokens",
        "needle        256 tokens",
        "loss by position  4 windows of 256",
        "short context  6 windows of 128",
    ]
    assert len(said) == 4
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(f"single     {start}")


def test_a_stopped_column_goes_on_where_it_was(columns):
    """A kill leaves whole lines and perhaps a part of one: the whole ones stay as they are, the rest is measured."""
    file = columns / "evaluate" / "single" / "needle.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:30])
    evaluate_column(job_of(columns, "single", Parallel()))
    again = file.read_bytes().splitlines(keepends=True)
    assert again[:5] == lines[:5]  # with their seconds: not measured again
    assert again[5:] != lines[5:]
    timeless = [[{**json.loads(line), "seconds": 0} for line in found] for found in (again, lines)]
    assert timeless[0] == timeless[1]


def test_rows_of_another_model_rope_or_seed_are_refused(columns):
    for change, name in (({"seed": 5}, "seed"), ({"rope": tiny.OWN}, "rope")):
        with pytest.raises(ConfigError, match=rf"needle.jsonl:1: {name} is .*, this evaluation has"):
            evaluate_column(job_of(columns, "single", Parallel(), **change))


def test_a_damaged_row_is_named_by_its_line(columns, tmp_path):
    good = (columns / "evaluate" / "single" / "needle.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "needle.jsonl").write_bytes(good[0] + b"{]\n" + good[1])
    with pytest.raises(ConfigError, match=r"needle.jsonl:2: damaged line"):
        evaluate_column(job_of(columns, "single", Parallel(), out=tmp_path))


def test_a_flipped_bit_in_the_checkpoint_is_noticed(columns, tmp_path):
    import shutil

    copy = tmp_path / "base"
    shutil.copytree(columns / "base", copy)
    weights = max(copy.glob("*.distcp"), key=lambda path: path.stat().st_size)
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="contents differ from the manifest's sha256"):
        evaluate_column(job_of(columns, "flipped", Parallel(), checkpoint=copy))
    assert not (columns / "evaluate" / "flipped").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"checkpoint_rope": tiny.SCALED}, CheckpointError, "rope differs: the checkpoint has none"),
        ({"checkpoint": Path("/nowhere")}, CheckpointError, "/nowhere: no mcore_longctx.json here"),
        ({"tokenizer": Path("/nowhere")}, DataError, "no such file"),
    ],
)
def test_wrong_inputs_end_in_one_line_before_any_work(columns, change, error, message):
    with pytest.raises(error, match=message):
        evaluate_column(job_of(columns, "wrong", Parallel(), **change))
    assert not (columns / "evaluate" / "wrong").exists()


def test_another_tokenizer_than_the_checkpoints_is_refused(columns, tmp_path):
    text = (columns / "hf" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(CheckpointError, match="was made with another tokenizer"):
        evaluate_column(job_of(columns, "wrong", Parallel(), tokenizer=tmp_path))


def test_a_length_that_cannot_be_split_is_refused(columns):
    section = tiny.section(columns, Parallel(context_parallel_size=3))
    with pytest.raises(LayoutError, match=r"seq_length 128 is not a multiple of 2 x context_parallel_size \(6\)"):
        evaluate_column(job_of(columns, "wrong", Parallel(), evaluate=section))


def test_windows_are_spread_over_the_text_and_do_not_overlap():
    windows = cut_windows(np.arange(1000), (7, 8), count=4, length=102, where="text")
    assert windows.starts.tolist() == [0, 300, 600, 900]
    assert windows.tokens[:, :2].tolist() == [[7, 8]] * 4
    assert windows.tokens[-1, 2:].tolist() == list(range(900, 1000))
    tight = cut_windows(np.arange(403), (), count=4, length=100, where="text")
    assert np.diff(tight.starts).min() >= 100
    assert tight.tokens.max() == 402


def test_too_little_text_is_refused_with_numbers():
    with pytest.raises(DataError, match=r"text.txt: 399 tokens of held-out text; 4 windows of 100 need 400"):
        cut_windows(np.arange(399), (), count=4, length=100, where="text.txt")


def test_bins_double_and_end_at_the_length():
    assert bin_edges(4096) == [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert bin_edges(16) == [0, 16]
    assert bin_edges(5000)[-2:] == [4096, 5000]
    assert all(math.log2(edge).is_integer() for edge in bin_edges(1 << 20)[1:])
