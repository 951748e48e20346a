"""The page's evaluation numbers against a recomputation from the lines of the files, by other means than the report's."""

import base64
import html
import json
import math
import re
import shutil
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest

from mcore_longctx.report import summary_table, write_report
from mcore_longctx.report.counts import Count, compare, needle_counts, ruler_averages
from mcore_longctx.report.losses import last_bin, paired, relative_change, short_loss
from mcore_longctx.report.run_folder import NeedleKind, read_run_folder
from mcore_longctx.report.sections.ruler import published_lines
from mcore_longctx.report.verdict import judge
from mcore_longctx.tasks.statistics import macro_average, score_interval

from . import made_up_rows as rows_of
from . import made_up_run as made_up

K = 1 << 10
COLUMNS = list(made_up.REACH)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up.make_long_run(tmp_path_factory.mktemp("runs") / "long")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def lines(run, column, part):
    return [json.loads(line) for line in (run / "evaluate" / column / f"{part}.jsonl").read_text().splitlines()]


def section(page, name):
    """The part of the page from one heading to the next."""
    return page.partition(f'<h2 id="{name}">')[2].partition("<h2")[0]


def text(markup):
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", markup))).strip()


def table_rows(markup):
    """Texts of the cells of every row of the first table."""
    body = re.search(r"<tbody>(.*?)</tbody>", markup, re.DOTALL)[1]
    return [[text(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in body.split("</tr>")[:-1]]


def sign_test(pairs):
    """(lost, won, two-sided p) by counting outcomes at least as uneven, in whole numbers."""
    lost, won = sum(b > a for b, a in pairs), sum(b < a for b, a in pairs)
    changed = lost + won
    ways = sum(math.comb(changed, k) for k in range(changed + 1) if abs(2 * k - changed) >= abs(won - lost))
    return lost, won, float(Fraction(ways, 2**changed))


def shown_p(p):
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def test_the_table_by_length_is_the_mean_of_the_tasks_means(run, page):
    rows = table_rows(section(page, "ruler"))
    assert [row[0] for row in rows] == ["base", "base + scaled rope", "after pretraining", "after SFT"]
    base = {(r["task"], r["length"], r["index"]): r["score"] for r in lines(run, "before", "ruler")}
    for cells, column in zip(rows, COLUMNS, strict=True):
        scores = defaultdict(list)
        mine = {}
        for row in lines(run, column, "ruler"):
            scores[row["length"], row["task"]].append(Fraction(row["score"]).limit_denominator(60))
            mine[row["task"], row["length"], row["index"]] = row["score"]
        above, surely = [], []
        for cell, length in zip(cells[1:], made_up.RULER_LENGTHS, strict=False):
            tasks = [values for (at, _), values in scores.items() if at == length]
            assert len(tasks) == 13
            mean = sum(sum(values) / len(values) for values in tasks) / 13
            points = sum(map(sum, tasks))
            mean_shown, low, high, points_shown, asked = re.match(r"([\d.]+) (\d+)–(\d+) % ([\d.]+)/(\d+)", cell).groups()
            assert float(mean_shown) == pytest.approx(100 * mean, abs=0.0501)
            assert int(asked) == 130
            assert 0 <= points - Fraction(points_shown) < Fraction(1, 10)
            interval = macro_average({str(i): [float(v) for v in values] for i, values in enumerate(tasks)})
            assert (int(low), int(high)) == (math.floor(100 * interval.low + 1e-9), math.ceil(100 * interval.high - 1e-9))
            if mean > 0.856:
                above.append(length)
            if interval.low > 0.856:
                surely.append(length)
            if column != "before":
                lost, won, p = sign_test([(base[key], score) for key, score in mine.items() if key[1] == length])
                assert cell.endswith(f"+{won} −{lost} p = {shown_p(p)}"), cell
        assert cells[-1] == f"{max(above):,} surely {max(surely):,}" if surely else f"{max(above):,} surely none"


def test_averages_above_the_threshold_are_underlined(page):
    cells = re.findall(r'<span class="(above-sure|above-mean|)">([\d.]+)</span> <small>(\d+)', section(page, "ruler"))
    assert len(cells) == 4 * 8
    for kind, mean, low in cells:
        if float(mean) <= 85.5:
            assert kind == ""
        elif float(mean) >= 85.7:
            assert kind == ("above-sure" if int(low) >= 86 else kind)
            assert kind
    assert {kind for kind, _, _ in cells} == {"", "above-sure", "above-mean"}


def grids(markup):
    """(caption, {(row title, column head): cell}) of each coloured grid."""
    found = []
    for figure in re.findall(r"<figure>\s*<figcaption>.*?</figure>", markup, re.DOTALL):
        heads = [text(head) for head in re.findall(r"<th[^>]*>(.*?)</th>", figure.partition("</thead>")[0])][1:]
        cells = {}
        for row in table_rows(figure):
            cells |= {(row[0], head): cell for head, cell in zip(heads, row[1:], strict=True)}
        found.append((text(re.search(r"<figcaption>(.*?)</figcaption>", figure)[1]), cells))
    return found


def test_every_cell_of_the_task_grids_is_points_of_samples(run, page):
    tasks, _, depths = section(page, "ruler").partition("By where the answer stands")
    for (_, cells), column in zip(grids(tasks), COLUMNS, strict=True):
        scores = defaultdict(list)
        for row in lines(run, column, "ruler"):
            length = row["length"]
            head = f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}K"
            scores[row["task"], head].append(row["score"])
        assert cells.keys() == scores.keys()
        for key, cell in cells.items():
            points, asked = cell.split("/")
            assert int(asked) == len(scores[key])
            assert -1e-9 <= sum(scores[key]) - float(points) < 0.1
    for (_, cells), column in zip(grids(depths), COLUMNS, strict=True):
        one_place = [row for row in lines(run, column, "ruler") if len(row["depths"]) == 1 and row["length"] == 128 * K]
        for part in range(5):
            inside = [row["score"] for row in one_place if part / 5 <= row["depths"][0] < (part + 1) / 5]
            assert cells[f"{20 * part}–{20 * part + 20} %", "128K"] == f"{sum(inside):.0f}/{len(inside)}"


def test_needle_cells_and_lines_for_the_lengths(run, page):
    for (_, cells), column in zip(grids(section(page, "needle")), COLUMNS, strict=True):
        counts = defaultdict(list)
        for row in lines(run, column, "needle"):
            head = f"{row['length'] >> 20}M" if row["length"] >= 1 << 20 else f"{row['length'] >> 10}K"
            counts[f"{100 * row['depth']:.0f} %", head].append(row["correct"])
        assert cells == {key: f"{sum(right)}/{len(right)}" for key, right in counts.items()}
    assert section(page, "needle").count('class="original"') == 4 * 5  # after 128K, in five rows of four grids
    assert 'class="trained"' not in section(page, "needle")  # nothing longer was measured


def test_the_trained_length_is_marked_where_longer_ones_were_measured(copy):
    recipe = copy / "recipe.yaml"
    recipe.write_text(re.sub(r"seq_length: 4M|seq_length: 4194304", "seq_length: 1048576", recipe.read_text()))
    page = write_report(copy).read_text(encoding="utf-8")
    assert read_run_folder(copy).trained_length == 1024 * K
    assert section(page, "needle").count('class="trained"') == 2 * 5  # the two trained columns


def test_the_short_suite_and_its_worst_drop(run, page):
    rows = {row[0]: row[1:] for row in table_rows(section(page, "short").partition("<h3>")[2])}
    right = {column: {(r["task"], r["index"]): r["correct"] for r in lines(run, column, "short_suite")} for column in COLUMNS}
    drops = {}
    for task, cells in rows.items():
        for cell, column in zip(cells, COLUMNS, strict=False):
            answers = [correct for (name, _), correct in right[column].items() if task in ("all", name)]
            interval = score_interval([float(answer) for answer in answers])
            low, high = math.floor(100 * interval.low + 1e-9), math.ceil(100 * interval.high - 1e-9)
            assert cell == f"{sum(answers)}/{len(answers)} {low}–{high} %"
        keys = [key for key in right["before"] if task in ("all", key[0])]
        lost, won, p = sign_test([(right["before"][key], right["instruct"][key]) for key in keys])
        assert cells[-1] == f"{won} won, {lost} lost, p = {shown_p(p)}"
        drops[task] = ((won - lost) / len(keys), p)
    del drops["all"]
    worst = min(drops, key=drops.get)
    assert worst == "multiplication"
    assert f"Worst drop in the short suite: {worst}," in page
    assert f"as the worst of 8 tasks, {shown_p(min(1, 8 * drops[worst][1]))}" in page


def test_a_suite_without_a_drop_says_so(copy):
    for column in COLUMNS:
        made_up.write_lines(copy / "evaluate" / column / "short_suite.jsonl", rows_of.suite_rows("same", {"other": 0.9}))
        for part in ("needle", "ruler", "loss_by_position", "short_context"):
            (copy / "evaluate" / column / f"{part}.jsonl").unlink()
    assert "No task of the short suite lost more answers than it won." in write_report(copy).read_text(encoding="utf-8")


def test_the_fitted_laws_lie_where_the_page_says(run, page):
    rows = table_rows(section(page, "positions"))
    for (_, law, residual, worst), column in zip(rows, COLUMNS, strict=True):
        a, b, g = (float(value) for value in re.match(r"a = (\S+) tokens, b = (\S+), g = (\S+) nats", law).groups())
        off = []
        measured = lines(run, column, "loss_by_position")
        for i, (first, end) in enumerate(zip(measured[0]["edges"], measured[0]["edges"][1:], strict=False)):
            if i:
                mean = sum(row["sums"][i] / row["counts"][i] for row in measured) / len(measured)
                off.append((a / math.sqrt(first * end)) ** b + g - mean)
        assert float(residual.split()[0]) == pytest.approx(math.sqrt(sum(x * x for x in off) / len(off)), abs=0.004)
        assert float(worst.split()[0]) == pytest.approx(max(map(abs, off)), abs=0.004)
    assert float(rows[-1][2].split()[0]) < 0.01 < 0.2 < float(rows[0][2].split()[0])  # the base fails beyond its length


def test_wrong_answers_are_shown_as_they_are_and_cannot_inject_markup(copy):
    file = copy / "evaluate" / "instruct" / "ruler.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    bad = next(row for row in rows if row["task"] == "cwe" and not row["correct"])
    bad |= {
        "got": "</pre><script>alert(1)</script>",
        "prompt_tail": "{{ 7 * 7 }} <img src=x onerror=alert(1)>",
        "expected": ["<b>"],
    }
    made_up.write_lines(file, rows)
    page = write_report(copy).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    failures = section(page, "failures")
    assert "<pre>&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;</pre>" in failures
    assert "{{ 7 * 7 }} &lt;img src=x" in failures
    by_task = dict(re.findall(r"<summary>ruler-like (\w+): (\d+)/80", failures))
    wrong = defaultdict(int)
    for row in rows:
        wrong[row["task"]] += not row["correct"]
    assert by_task == {task: str(count) for task, count in wrong.items() if count}
    assert all(part.count("<tr>") <= 1 + 3 for part in failures.split("<details>")[1:])


def test_a_length_that_is_still_being_measured_is_marked_and_is_no_effective_length(copy):
    for column in COLUMNS:
        rows = [row for row in lines(copy, column, "ruler") if row["length"] <= 32 * K]
        rows = [row for row in rows if row["length"] == 4 * K or row["task"] in ("vt", "fwe")]
        made_up.write_lines(copy / "evaluate" / column / "ruler.jsonl", rows)
    found = table_rows(section(write_report(copy).read_text(encoding="utf-8"), "ruler"))
    assert all("2 of 13 tasks" in row[2] for row in found)
    assert all(row[-1].startswith("4,096 ") for row in found)
    assert "2 tasks yet" in summary_table(copy)


def test_kinds_of_needles_are_shown_apart_and_shared_ones_count_by_haystack(copy):
    for column in COLUMNS:
        shared = rows_of.needle_rows(column, [128 * K, 1024 * K], made_up.REACH[column], samples=3, kind="sentence", shared=True)
        file = copy / "evaluate" / column / "needle.jsonl"
        made_up.write_lines(file, [*lines(copy, column, "needle"), *shared])
    page = write_report(copy).read_text(encoding="utf-8")
    assert "Facts in sentences by length and depth, shared haystack" in page
    assert "facts found at 1M, shared" in summary_table(copy)
    folder = read_run_folder(copy)
    assert folder.needle_kinds == [NeedleKind("passkey", False), NeedleKind("sentence", True)]
    assert "the base finds 0/25 pass keys" in judge(folder).sentences[0]  # the first kind decides
    after = folder.final.needles[NeedleKind("sentence", True)]
    count = needle_counts(after, lambda row: row["length"])[1024 * K]
    assert (count.right, count.all) == (18, 18)
    assert count.interval == pytest.approx((0.4385, 1), abs=1e-4)  # Wilson of 3/3 haystacks, not of 18/18 needles
    changed = compare(folder.base.needles[NeedleKind("sentence", True)], after, 1024 * K)
    assert (changed.won, changed.lost, changed.same, changed.p) == (3, 0, 3, 0.25)


def test_samples_scored_in_another_way_are_not_paired(copy):
    file = copy / "evaluate" / "instruct" / "ruler.jsonl"
    made_up.write_lines(file, [row | {"scoring": "greedy"} for row in lines(copy, "instruct", "ruler")])
    folder = read_run_folder(copy)
    assert compare(folder.base.ruler, folder.final.ruler) is None
    page = write_report(copy).read_text(encoding="utf-8")
    assert "Answers are decoded greedily" in page
    assert "Answers are teacher-forced" in page


def test_published_averages_have_sources_and_stand_apart(page):
    published = published_lines()
    assert all(source["date"] and source["protocol"] and source["name"] for source in published["sources"].values())
    assert all(0 < score <= 100 for _, scores, _ in published["rows"] for score in scores if score is not None)
    assert not any("UltraLong" in model for model, _, _ in published["rows"])  # its column is a mean over lengths
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)]
    assert pictures
    assert not any("Llama" in picture or "ProLong" in picture or "UltraLong" in picture for picture in pictures)
    words = text(section(page, "ruler"))
    assert "not comparable with the numbers above" in words
    assert "SelfLong-8B-1M – – – 89.5 84.0 82.0 79.7 78.2 69.6" in words


def test_pictures_hold_every_column_and_both_lengths(page):
    pictures = [
        base64.b64decode(data).decode()
        for data in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", section(page, "ruler"))
    ]
    assert len(pictures) == 2
    for label in ("base", "base + scaled rope", "after pretraining", "after SFT"):
        assert all(f">{label}<" in picture for picture in pictures)
    assert ">base's own length<" in html.unescape(pictures[0])
    assert ">trained<" in pictures[0]
    assert ">niah_multikey_3<" in pictures[1]


@pytest.mark.parametrize("columns", [COLUMNS[:1], COLUMNS[:2], [*COLUMNS, "third", "fourth"]])
def test_the_printed_table_is_at_most_120_wide_and_holds_every_column(tmp_path, columns):
    run = made_up.make_long_run(tmp_path / "run", columns, losses=False)
    table = summary_table(run).splitlines()
    assert max(map(len, table)) <= 120
    folder = read_run_folder(run)
    assert all(any(column.label in line for line in table) for column in folder.columns)
    asked = [line for line in table if line.startswith("ruler-like at 4M, 13 tasks")]
    cells = [cell for line in asked for cell in re.findall(r"([\d.]+/130) \((\d+–\d+ %)\)", line)]
    assert len(cells) == len(columns)
    averages = [ruler_averages(column.ruler, list(rows_of.RULER_TASKS))[4096 * K] for column in folder.columns]
    assert [points for points, _ in cells] == [str(average.count) for average in averages]


def test_a_run_with_one_column_one_length_and_one_task(tmp_path):
    run = tmp_path / "run"
    rows = rows_of.ruler_rows("before", [4 * K], 4 * K, samples=1, tasks=["niah_single_1"])
    made_up.write_lines(run / "evaluate" / "before" / "ruler.jsonl", rows)
    words = text(section(write_report(run).read_text(encoding="utf-8"), "ruler"))
    assert "1 task after the rules of RULER" in words
    assert "1/1" in words
    assert "ruler-like at 4,096" in summary_table(run)


def test_losses_that_are_no_numbers_are_shown_and_stop_nothing(copy):
    file = copy / "evaluate" / "extend" / "loss_by_position.jsonl"
    rows = lines(copy, "extend", "loss_by_position")
    for row in rows:
        row["sums"] = [math.nan] * len(row["sums"])
    made_up.write_lines(file, rows)
    made_up.write_lines(
        copy / "evaluate" / "extend" / "short_context.jsonl",
        [row | {"sum": math.nan} for row in lines(copy, "extend", "short_context")],
    )
    assert "no law: too few bins" in write_report(copy).read_text(encoding="utf-8")


def test_caches_beside_the_columns_are_no_columns(copy):
    (copy / "evaluate" / "cache" / "ab").mkdir(parents=True)
    assert [column.name for column in read_run_folder(copy).columns] == COLUMNS
    (copy / "recipe.yaml").unlink()
    folder = read_run_folder(copy)
    assert [column.name for column in folder.columns] == ["before", "scaled", "extend", "instruct"]
    assert not any("cache" in line for line in folder.missing)


def test_points_are_never_rounded_to_all_or_nothing():
    assert [str(Count(points, 10)) for points in (10, 9.99, 0.01, 0, 7.5, 1 / 3 + 2 / 3)] == [
        "10/10",
        "9.9/10",
        "0.1/10",
        "0/10",
        "7.5/10",
        "1/10",
    ]


def test_losses_are_paired_on_the_same_text_whatever_the_number_of_a_window(tmp_path):
    """The loss hangs on the text alone, so a few windows of it against many change nothing."""
    run = tmp_path / "run"
    for column, count in (("before", 9), ("extend", 3)):  # windows are spread over the text: 0, 100, ... and 0, 400, 800
        starts = [800 * i // (count - 1) for i in range(count)]
        short = rows_of.short_rows(column, 512, 1.0, windows=count)
        long = rows_of.loss_rows(column, 4096, 4096, windows=count)
        short = [row | {"start": at, "sum": row["count"] * (2 + at / 100)} for row, at in zip(short, starts, strict=True)]
        long = [
            row | {"start": at, "sums": [one * (2 + at / 100) for one in row["counts"]]}
            for row, at in zip(long, starts, strict=True)
        ]
        made_up.write_lines(run / "evaluate" / column / "short_context.jsonl", short)
        made_up.write_lines(run / "evaluate" / column / "loss_by_position.jsonl", long)
    folder = read_run_folder(run)
    change = relative_change(short_loss(folder.base), short_loss(folder.final))
    assert (change.mean, change.half_width, change.count) == (0, 0, 3)
    one, change = last_bin(folder.base, folder.final)
    assert (one, change.mean, change.count) == ((2048, 4096), 0, 3)
    assert "Short-context loss changed by +0.0 ± 0.0 %" in judge(folder).sentences[-1]
    page = write_report(run).read_text(encoding="utf-8")
    assert "6.00 → 6.00" in page  # both over the windows at 0, 400 and 800
    assert page.count("The columns did not measure the same windows") == 2
    assert "All columns are measured on the same" not in page
    assert re.search(r"loss, windows of 512 +6\.000 \(9 windows\) +6\.000 \(3 windows\)", summary_table(run))


def test_windows_of_another_text_at_the_same_place_are_not_paired(copy):
    for column, words in (("before", "00aa"), ("extend", "00aa"), ("instruct", "00bb")):
        file = copy / "evaluate" / column / "short_context.jsonl"
        made_up.write_lines(file, [row | {"text": words} for row in lines(copy, column, "short_context")])
    folder = read_run_folder(copy)
    losses = {column.name: short_loss(column) for column in folder.columns}
    assert paired(losses["before"], losses["extend"]).count == len(losses["before"])
    assert paired(losses["before"], losses["instruct"]) is None
    assert paired(losses["before"], losses["scaled"]) is None  # which does not say what its text was
    assert judge(folder).extended is None


def test_windows_of_another_length_are_left_out_and_named(copy):
    other = [row | {"index": 90 + row["index"]} for row in rows_of.short_rows("instruct", 64, 3.0, windows=4)]
    file = copy / "evaluate" / "instruct" / "short_context.jsonl"
    before = summary_table(copy)
    made_up.write_lines(file, [*lines(copy, "instruct", "short_context"), *other])
    assert summary_table(copy) == before
    assert "short_context also has windows of 64 tokens, left out beside those of 8,192" in write_report(copy).read_text()
    made_up.write_lines(file, other)
    assert not read_run_folder(copy).final.short_context
    assert "windows of 64 tokens, left out: other columns have 8,192" in write_report(copy).read_text()


def test_averages_scored_in_two_ways_are_shown_apart_and_called_not_comparable(copy):
    file = copy / "evaluate" / "instruct" / "ruler.jsonl"
    made_up.write_lines(
        file, [row | {"scoring": "greedy", "score": 1, "correct": True} for row in lines(copy, "instruct", "ruler")]
    )
    sentences = judge(read_run_folder(copy)).sentences
    assert (
        "The ruler-like tasks were scored in two ways (greedy and teacher forced) before and after: not comparable." in sentences
    )
    assert not any("Ruler-like average" in sentence for sentence in sentences)
    page = write_report(copy).read_text(encoding="utf-8")
    assert "ruler-like at 4,194,304" not in page  # no figure at the top
    assert "All columns are measured on the same samples" not in page
    assert "The columns are scored in two ways" in section(page, "ruler")
    assert [row[0] for row in table_rows(section(page, "ruler"))][::3] == ["base (teacher forced)", "after SFT (greedy)"]
    shown = [line for line in summary_table(copy).splitlines() if line.startswith("ruler-like at 4M")]
    assert [re.search("teacher forced|greedy", line)[0] for line in shown[:2]] == ["greedy", "teacher forced"]


def test_averages_before_and_after_are_over_the_samples_that_both_measured(copy):
    file = copy / "evaluate" / "instruct" / "ruler.jsonl"
    rows = [row for row in lines(copy, "before", "ruler") if row["index"] < 4]  # the base again, on fewer samples
    extra = [row | {"index": 100 + row["index"], "score": 1, "correct": True} for row in rows]
    same = {"model": "model of instruct"[:16], "rope": "rope of instruct"[:16]}
    made_up.write_lines(file, [row | same for row in rows + extra])
    sentence = next(s for s in judge(read_run_folder(copy)).sentences if s.startswith("Ruler-like average"))
    before, after = re.search(r"tokens: ([\d.]+) to ([\d.]+) of 100 \(0 won, 0 lost", sentence).groups()
    assert before == after
    page = write_report(copy).read_text(encoding="utf-8")
    assert f"{before} → {after}" in page
    assert "All columns are measured on the same samples" not in page


@pytest.mark.parametrize("part", ["needle", "ruler", "short_suite"])
def test_samples_of_another_text_are_not_paired(copy, part):
    for column, words in (("before", "00aa"), ("extend", "00aa"), ("instruct", "00bb")):
        file = copy / "evaluate" / column / f"{part}.jsonl"
        made_up.write_lines(file, [row | {"text": words} for row in lines(copy, column, part)])
    columns = [
        column.needles[NeedleKind("passkey", False)] if part == "needle" else getattr(column, part)
        for column in read_run_folder(copy).columns
    ]
    base, scaled, extend, instruct = columns
    assert compare(base, extend).same == len(base)
    assert compare(base, instruct) is None
    assert compare(base, scaled) is None
    assert "All columns are measured on the same samples" not in write_report(copy).read_text(encoding="utf-8")


def test_columns_of_the_same_samples_are_said_to_be(page):
    assert "All columns are measured on the same samples and windows of held-out text." in page
