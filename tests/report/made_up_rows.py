"""Made-up lines of the evaluation: every task, any columns and lengths, as `evaluate` writes them."""

import math
import random
from itertools import pairwise

RULER_TASKS = {  # task -> answers of a sample, places of answers that are known
    "niah_single_1": (1, 1),
    "niah_single_2": (1, 1),
    "niah_single_3": (1, 1),
    "niah_multikey_1": (1, 1),
    "niah_multikey_2": (1, 1),
    "niah_multikey_3": (1, 1),
    "niah_multivalue": (4, 4),
    "niah_multiquery": (4, 4),
    "vt": (5, 5),
    "cwe": (10, 0),
    "fwe": (3, 0),
    "qa_1": (1, 1),
    "qa_2": (1, 2),
}
SUITE_TASKS = ("copy", "key_value", "addition", "sorted_numbers", "largest", "place", "series", "multiplication")


def identity(column):
    return {"seed": 1234, "model": f"model of {column}"[:16], "rope": f"rope of {column}"[:16]}


def retrieval(length, reach, top=0.97):
    """Chance to find what is asked for: `top` up to the reach, nothing at four times of it."""
    return top * max(0.0, min(1.0, 1 - math.log2(max(length / reach, 1)) / 2))


def needle_rows(column, lengths, reach, *, depths=6, samples=10, kind="passkey", shared=False, top=0.99):
    rows = []
    for length in lengths:
        for d in range(depths):
            for index in range(samples):
                draw = random.Random(f"{column} {kind} {length} {0 if shared else d} {index}")
                correct = draw.random() < retrieval(length, reach, top)
                expected = f" {random.Random(f'{length} {d} {index}').randrange(1_000_000, 9_999_999)}"
                rows.append(
                    {"task": "needles_shared" if shared else "needle", "length": length, "depth": round(d / (depths - 1), 6)}
                    | {"index": index, "correct": correct, "score": -0.02 if correct else -4.3, "tokens": length, "key": "dolu"}
                    | {"expected": expected, "got": expected if correct else expected[::-1], "seconds": 0.1, "unique_share": 0.4}
                    | {"kind": kind, "shared": shared, "prompt_tail": f"... and so on.\nThe pass key for dolu is ({column})"}
                    | identity(column)
                )
    return rows


def ruler_rows(column, lengths, reach, *, samples=25, tasks=RULER_TASKS, scoring="teacher_forced"):
    rows = []
    for length in lengths:
        for place, task in enumerate(tasks):
            answers, known = RULER_TASKS[task]
            for index in range(samples):
                draw = random.Random(f"{column} {task} {length} {index}")
                chance = retrieval(length, reach / (1 + place / 8), 0.99 - place / 70)
                right = sum(draw.random() < chance for _ in range(answers))
                fixed = random.Random(f"{task} {length} {index}")
                expected = [str(fixed.randrange(1_000_000, 9_999_999)) for _ in range(answers)]
                rows.append(
                    {"task": task, "protocol": "ruler-like", "length": length, "tokens": length - 3, "index": index}
                    | {"depths": sorted(round(fixed.random(), 6) for _ in range(known)), "needle_starts": [5] * known}
                    | {"haystack_start": 17, "unique_share": min(1.0, 500_000 / length), "expected": expected, "match": "all"}
                    | {
                        "got": ", ".join(expected[:right]) or "I do not know.",
                        "correct": right == answers,
                        "score": right / answers,
                    }
                    | {"scoring": scoring, "tokens_right": right, "tokens_of_answer": answers, "log_probability": -0.3}
                    | {
                        "prompt_tail": f"... text that ends.\nQuestion: which numbers belong to {task}?\nAnswer: they are",
                        "seconds": 1.2,
                    }
                    | identity(column)
                )
    return rows


def suite_rows(column, chances, *, questions=160):
    rows = []
    for index in range(questions):
        task = SUITE_TASKS[index % len(SUITE_TASKS)]
        draw = random.Random(f"{column} {task} {index}")
        correct = draw.random() < chances.get(task, chances["other"])
        options = [f" {value}" for value in random.Random(index).sample(range(10, 99), 4)]
        rows.append(
            {"task": task, "index": index, "question": f"What is {index} plus one?", "expected": options[0]}
            | {"got": options[0] if correct else options[1], "correct": correct, "score": 1.3 if correct else -0.8}
            | {"options": [{"text": text, "log_probability": -1.0, "tokens": 1} for text in options], "seconds": 0.02}
            | identity(column)
        )
    return rows


def loss_rows(column, length, reach, *, windows=8, level=1.56, spread=0.12):
    edges = sorted({0, *(1 << i for i in range(4, length.bit_length())), length})
    counts = [end - first - (first == 0) for first, end in pairwise(edges)]
    rows = []
    for window in range(windows):
        lift = random.Random(window).gauss(0, spread)
        draw = random.Random(f"{column} {window}")
        sums = []
        for (first, end), count in zip(pairwise(edges), counts, strict=True):
            middle = math.sqrt(max(first, end / 2) * end)
            beyond = 0.35 * max(0.0, math.log2(middle / reach))
            sums.append(count * ((25.4 / middle) ** 0.45 + level + beyond + lift + draw.gauss(0, 0.01)))
        rows.append(
            {"task": "loss_by_position", "length": length, "depth": None, "index": window, "correct": None}
            | {
                "score": sum(sums) / sum(counts),
                "edges": edges,
                "counts": counts,
                "sums": sums,
                "start": window * length,
                "seconds": 9.0,
            }
            | identity(column)
        )
    return rows


def short_rows(column, length, factor, *, windows=48):
    rows = []
    for window in range(windows):
        level = factor * (1.95 + random.Random(window).gauss(0, 0.2)) + random.Random(f"{column} {window}").gauss(0, 0.01)
        rows.append(
            {"task": "short_context", "length": length, "depth": None, "index": window, "correct": None, "score": level}
            | {"start": length * window, "count": length - 1, "sum": (length - 1) * level, "seconds": 1.0}
            | identity(column)
        )
    return rows
