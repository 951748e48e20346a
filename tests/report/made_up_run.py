"""A run folder with made-up figures, in the formats that the other rooms write."""

import json
import math
import random
from pathlib import Path

import numpy as np

from mcore_longctx.data.planning.lengths import SourceLengths, plot_lengths
from mcore_longctx.families import ModelShape
from mcore_longctx.recipe.card import CheckpointCard, write_card
from mcore_longctx.recipe.load import dump_recipe, load_recipe
from mcore_longctx.rope import RopeScaling

from . import made_up_rows as rows_of

SHAPE = ModelShape(
    num_layers=4, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4, num_query_groups=2, kv_channels=32, vocab_size=262
)
OWN = RopeScaling(type="none", head_dim=32, rope_theta=10000.0, max_position_embeddings=512)
SCALED = RopeScaling(type="llama3", head_dim=32, rope_theta=10000.0, factor=8, original_max_position_embeddings=512)

# chance to find the key, by column and length; losses by column and bin; loss of short windows against the base
FOUND = {
    "before": {512: 1.0, 1024: 0.72, 2048: 0.05, 4096: 0.0},
    "scaled": {512: 1.0, 1024: 0.8, 2048: 0.06, 4096: 0.0},
    "extend": {512: 0.99, 1024: 0.97, 2048: 0.98, 4096: 0.93},
    "instruct": {512: 0.99, 1024: 0.97, 2048: 0.97, 4096: 0.91},
}
EDGES = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
LOSSES = {
    "before": [2.25, 1.68, 1.97, 1.90, 2.00, 1.93, 1.96, 2.11, 2.56],
    "scaled": [2.25, 1.68, 1.98, 1.92, 2.03, 1.98, 2.01, 2.08, 2.11],
    "extend": [2.26, 1.73, 2.01, 1.95, 2.02, 1.94, 1.93, 1.94, 1.94],
    "instruct": [2.26, 1.73, 2.01, 1.95, 2.02, 1.94, 1.93, 1.94, 1.94],
}
SHORT = {"before": 1.0, "scaled": 1.021, "extend": 1.009, "instruct": 1.011}


VERIFY = {"equal": True, "tensors": 39, "bytes": 3_216_896, "rope_equal": True, "other": [], "differences": []} | {
    "logits": {
        "equal": True,
        "tolerance": 1e-5,
        "readers": ["megatron-core 0.16.1", "transformers 4.57.6"],
        "inverse_frequencies_equal": True,
        "differences": [
            {"positions": "0..255", "max_abs": 1e-5, "scale": 13.0, "relative": 8e-7, "argmax_equal": 1.0},
            {"positions": "0..31 and 4,064..4,095", "max_abs": 1e-5, "scale": 12.0, "relative": 8e-7, "argmax_equal": 1.0},
        ],
    }
}


def write_lines(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_results(folder: Path, found, losses, short):
    for column in found:
        write_needles(folder / "evaluate" / column / "needle.jsonl", found[column])
    for column in losses:
        write_losses(folder / "evaluate" / column, losses[column], short[column])


def make_run(folder: Path) -> Path:
    recipe = load_recipe("tiny-cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    write_results(folder, FOUND, LOSSES, SHORT)
    for column, reach in (("before", 512), ("scaled", 768), ("extend", 4096), ("instruct", 4096)):
        write_tasks(folder / "evaluate" / column, column, reach, recipe.evaluate)
    for stage, first, last, steps in (("extend", 2.6, 1.9, 36), ("instruct", 2.9, 2.1, 10)):
        write_metrics(folder / "metrics" / f"{stage}.jsonl", first, last, steps)
    for stage, rope in (("base", OWN), ("extend/iter_0000036", SCALED), ("instruct/iter_0000010", SCALED)):
        (folder / "checkpoints" / stage).mkdir(parents=True)
        write_card(folder / "checkpoints" / stage, CheckpointCard(shape=SHAPE, rope=rope, stage=stage.split("/")[0]))
    write_run_json(folder / "run.json")
    for stage, sources in (("extend", ("books", "dictionary")), ("instruct", ("chats",))):
        write_data(folder / "data" / stage, sources)
    (folder / "verify.json").write_text(json.dumps(VERIFY), encoding="utf-8")
    return folder


def write_tasks(out: Path, column: str, reach: int, evaluate) -> None:
    """Ruler-like tasks and short suite as the recipe asks for them; the rows of one column say nothing of its model and rope here."""
    bare = {"model", "rope"}
    if evaluate.ruler is not None:
        asked = {"samples": evaluate.ruler.samples, "tasks": evaluate.ruler.tasks}
        rows = rows_of.ruler_rows(column, [int(length) for length in evaluate.ruler.lengths], reach, **asked)
        write_lines(out / "ruler.jsonl", [{key: value for key, value in row.items() if key not in bare} for row in rows])
    if evaluate.short_suite is not None:
        rows = rows_of.suite_rows(column, {"other": 0.6}, questions=evaluate.short_suite.questions)
        write_lines(out / "short_suite.jsonl", [{key: value for key, value in row.items() if key not in bare} for row in rows])


def write_needles(path: Path, rates):
    rows = []
    for length, rate in rates.items():
        rng = random.Random(f"{length} {rate}")
        for d in range(6):
            for index in range(10):
                correct = rng.random() < rate
                expected = random.Random(f"{length} {d} {index}").sample("0123456789", 3)
                rows.append(
                    {"task": "needle", "length": length, "depth": round(d / 5, 6), "index": index, "correct": correct}
                    | {"score": -0.02 if correct else -4.3, "seed": 1234, "tokens": length, "key": "dolu", "unique_share": 1.0}
                    | {
                        "expected": " " + "".join(expected),
                        "got": " " + "".join(expected if correct else reversed(expected)),
                        "seconds": 0.1,
                    }
                )
    write_lines(path, rows)


def write_losses(folder: Path, levels, short):
    counts = [15, 16, 32, 64, 128, 256, 512, 1024, 2048]
    by_position, short_rows = [], []
    for window in range(12):
        lift = random.Random(window).gauss(0, 0.12)
        rng = random.Random(f"{levels} {window}")
        sums = [count * (level + lift + rng.gauss(0, 0.01)) for level, count in zip(levels, counts, strict=True)]
        by_position.append(
            {"task": "loss_by_position", "length": 4096, "depth": None, "index": window, "correct": None, "seed": 1234}
            | {"score": sum(sums) / sum(counts), "edges": EDGES, "counts": counts, "sums": sums, "start": 5000 * window}
        )
    for window in range(96):
        level = short * (1.95 + random.Random(window).gauss(0, 0.2)) + random.Random(f"{short} {window}").gauss(0, 0.01)
        short_rows.append(
            {
                "task": "short_context",
                "length": 512,
                "depth": None,
                "index": window,
                "correct": None,
                "score": level,
                "seed": 1234,
            }
            | {"count": 511, "sum": 511 * level, "start": 1000 * window}
        )
    write_lines(folder / "loss_by_position.jsonl", by_position)
    write_lines(folder / "short_context.jsonl", short_rows)


def write_metrics(path: Path, first, last, steps):
    rng = random.Random(steps)
    rows = []
    for step in range(1, steps + 1):
        loss = last + (first - last) * math.exp(-4 * step / steps) + rng.gauss(0, 0.03)
        lr = 2e-4 * min(step / 4, 0.5 * (1 + math.cos(math.pi * step / steps)))
        rows.append(
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": 0.6 + rng.random() / 3,
                "tokens_per_second": 2100 + rng.random() * 200,
            }
            | {"memory_bytes": 1_234_567_890, "seconds": 1.9}
        )
    write_lines(path, rows)


def write_data(folder: Path, names):
    rng = np.random.default_rng(len(names))
    sources = []
    for name in names:
        length = rng.lognormal(6.5, 1.2, 300).astype(np.int64) + 20
        keep = np.where(length < 512, rng.random(300) < 0.5, 1) * np.where(length > 2048, 2, 1)
        edges = 1 << np.arange(int(length.max()).bit_length() + 1)
        columns = [np.ones(300), length, keep > 0, length * keep]
        counts = np.stack(
            [np.histogram(length, edges, weights=column.astype(np.float64))[0] for column in columns], axis=1
        ).astype(np.int64)
        sources.append(
            SourceLengths(name=name, edges=edges, counts=counts, median=int(np.median(length)), longest=int(length.max()))
        )
    folder.mkdir(parents=True)
    plot_lengths(sources, folder / "lengths.png", title="36 samples of 4,096 tokens", words=("documents read", "in the samples"))
    facts = {
        "samples": 36,
        "seq_length": 4096,
        "tokens": 147_456,
        "tokens_with_loss": 147_456,
        "sources": {s.name: s.as_dict() for s in sources},
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "kind": "data", **facts}), encoding="utf-8")


def write_run_json(path: Path):
    steps = [
        ("import", "examples/tiny-llama -> checkpoints/base (torch_dist)", 6.1),
        ("evaluate-before", "the model as it is: none: no scaling, base 10,000", 52.4),
        ("evaluate-scaled", "the model with the recipe's rope, not yet trained", 51.0),
        ("data-extend", "long-documents: 36 samples of 4,096 tokens", 3.2),
        ("train-extend", "pretrain: 36 iterations x 1 sequences x 4,096 tokens = 147,456 tokens", 84.0),
        ("evaluate-extend", "after stage extend", 52.8),
        ("data-instruct", "chats: chats -> samples of 512 tokens, loss on answers only", 1.4),
        ("train-instruct", "sft: 10 iterations x 4 sequences x 512 tokens", 14.6),
        ("evaluate-instruct", "after stage instruct", 53.3),
        ("export", "checkpoints/instruct -> export (Hugging Face safetensors, both rope spellings)", 2.0),
        ("verify", "the export against the checkpoint", 9.8),
    ]
    rows = [{"name": n, "state": "done", "about": [about], "inputs": {}, "seconds": s, "outputs": []} for n, about, s in steps]
    rows.append({"name": "report", "state": "running", "about": ["report.html"], "inputs": {}})
    versions = {"mcore-longctx": "0.1.0", "numpy": "2.3.5", "torch": "2.13.0", "megatron-core": "0.16.1"}
    path.write_text(json.dumps({"format": 1, "name": "tiny-cpu", "versions": versions, "steps": rows}), encoding="utf-8")


# A run of the full size: 128K to 4M, every task of the evaluation, several stages.
LONG_SHAPE = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128_256,
)
LONG_OWN = RopeScaling(
    type="llama3",
    head_dim=128,
    rope_theta=500000.0,
    factor=8,
    original_max_position_embeddings=8192,
    max_position_embeddings=131_072,
)
LONG_SCALED = RopeScaling(
    type="llama3",
    head_dim=128,
    rope_theta=500000.0,
    factor=32,
    original_max_position_embeddings=131_072,
    max_position_embeddings=4_194_304,
)
K = 1 << 10
REACH = {"before": 128 * K, "scaled": 384 * K, "extend": 3072 * K, "instruct": 4096 * K}
NEEDLE_LENGTHS = [128 * K, 256 * K, 512 * K, 1024 * K, 2048 * K, 4096 * K]
RULER_LENGTHS = [4 * K, 32 * K, *NEEDLE_LENGTHS]


def make_long_run(folder: Path, columns=tuple(REACH), *, needles=True, ruler=True, suite=True, losses=True) -> Path:
    """Files of the evaluation, recipe and cards of a run to 4M; without metrics and data."""
    recipe = load_recipe("ultralong-8b-4m")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    for stage, rope in (("base", LONG_OWN), *((f"{stage.name}/iter_0000100", LONG_SCALED) for stage in recipe.stages)):
        (folder / "checkpoints" / stage).mkdir(parents=True)
        write_card(folder / "checkpoints" / stage, CheckpointCard(shape=LONG_SHAPE, rope=rope, stage=stage.split("/")[0]))
    for column in columns:
        write_column(folder / "evaluate" / column, column, needles=needles, ruler=ruler, suite=suite, losses=losses)
    return folder


def write_column(out: Path, column: str, *, needles=True, ruler=True, suite=True, losses=True) -> None:
    reach = REACH.get(column, 1024 * K)
    is_base = column == "before"
    if needles:
        write_lines(out / "needle.jsonl", rows_of.needle_rows(column, NEEDLE_LENGTHS, reach, depths=5, samples=5))
    if ruler:
        write_lines(out / "ruler.jsonl", rows_of.ruler_rows(column, RULER_LENGTHS, reach, samples=10))
    if suite:
        chances = {"other": 0.85} if is_base else {"other": 0.85, "multiplication": 0.3}
        write_lines(out / "short_suite.jsonl", rows_of.suite_rows(column, chances))
    if losses:
        write_lines(out / "loss_by_position.jsonl", rows_of.loss_rows(column, 4096 * K, reach))
        write_lines(out / "short_context.jsonl", rows_of.short_rows(column, 8 * K, 1.0 if is_base else 1.008))
