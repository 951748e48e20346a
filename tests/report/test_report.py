import html.parser
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.report import summary_table, write_report
from mcore_longctx.report.counts import Count, by_length, compare, needle_counts
from mcore_longctx.report.losses import loss_bins, paired, short_loss
from mcore_longctx.report.run_folder import Window, read_run_folder
from mcore_longctx.report.style import cell_colour, short_count
from mcore_longctx.report.verdict import judge

from . import made_up_run as made_up


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up.make_run(tmp_path_factory.mktemp("runs") / "tiny-cpu")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own to damage."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


class Words(html.parser.HTMLParser):
    """Visible words of a page, and every attribute that can make a browser fetch something."""

    def __init__(self, page):
        super().__init__()
        self.text, self.sources, self.tags, self.inside_style = [], [], [], False
        self.feed(page)
        self.words = re.sub(r"\s+", " ", " ".join(self.text))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside_style = tag == "style"
        self.sources += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster", "background")
        ]

    def handle_endtag(self, tag):
        self.inside_style = False

    def handle_data(self, data):
        if not self.inside_style:
            self.text.append(data)


def test_the_page_holds_everything_that_a_reader_looks_for(page):
    words = Words(page).words
    for expected in (
        "tiny-cpu",
        "512 → 4,096 tokens of context",
        "The context was extended",
        *("base", "base + scaled rope", "after pretraining", "after SFT"),
        "pass keys found at 4,096",
        "Loss by position",
        "What the extension costs where the base was at home: windows of 512 tokens",
        *("continued pretraining", "instruction tuning"),
        "CP 2 p2p x DP 1 = 2 ranks",
        "llama3 factor 8 over 512 (low 1, high 4)",
        made_up.SCALED.fingerprint()[:12],
        *("books", "dictionary", "documents read", "in the samples"),
        "equal, 39 compared, 3,216,896 bytes",
        "inverse frequencies equal",
        "at positions 0..31 and 4,064..4,095",
        *("train-extend", "1 min 24 s", "5 min 31 s"),
        *("megatron-core", "0.16.1"),
    ):
        assert expected in words, expected
    assert "Not in this report" not in words


def test_the_page_needs_no_network_and_runs_no_script(page):
    words = Words(page)
    assert all(source.startswith(("data:image/", "#")) for source in words.sources), words.sources
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(words.tags)
    without_pictures = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", without_pictures)
    assert "default-src 'none'" in page


def test_a_difference_of_the_export_is_shown_where_it_is(copy):
    file = copy / "verify.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {"equal": False, "logits": facts["logits"] | {"equal": False}}))
    words = Words(write_report(copy).read_text(encoding="utf-8")).words
    assert "tensors equal, 39 compared" in words
    assert "logits DIFFERENT within 1e-05" in words
    difference = {"name": "lm_head.weight", "elements": 1}
    file.write_text(json.dumps(facts | {"equal": False, "differences": [difference], "rope_equal": False}))
    words = Words(write_report(copy).read_text(encoding="utf-8")).words
    assert "tensors DIFFERENT, 39 compared" in words
    assert "differs lm_head.weight: 1 elements" in words
    assert "rope fingerprint DIFFERENT" in words


def test_links_inside_the_page_lead_somewhere(page):
    for target in {source[1:] for source in Words(page).sources if source.startswith("#")}:
        assert f'id="{target}"' in page


def test_every_cell_of_every_needle_grid_shows_its_count(run, page):
    needles = page.partition('<h2 id="needle">')[2].partition("<h2")[0]
    grids = re.findall(r'<table class="grid">.*?</table>', needles, re.DOTALL)
    assert len(grids) == 4
    folder = read_run_folder(run)
    for grid, column in zip(grids, folder.columns, strict=True):
        cells = re.findall(r"<td[^>]*>(\d+/\d+)</td>", grid)
        counts = needle_counts(folder.needles(column), lambda row: (row["depth"], row["length"]))
        assert cells == [str(count) for count in counts.values()]


def test_names_from_files_cannot_inject_markup(copy):
    file = copy / "evaluate" / "instruct" / "needle.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0] |= {"correct": False, "got": "<script>alert(1)</script>", "prompt_tail": "{{ 7 * 7 }}"}
    made_up.write_lines(file, rows)
    page = write_report(copy).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in Words(page).words


def test_the_same_run_gives_the_same_page_and_the_folder_stays_as_it_was(run, page):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "report.html"}
    again = write_report(run).read_text(encoding="utf-8")
    stamp = re.compile(r"Written \d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert stamp.sub("", again) == stamp.sub("", page)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "report.html"}


def test_the_needle_picture_is_a_png(run, page):
    assert (run / "needle_before_after.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table_has_counts_intervals_and_paired_changes(run):
    table = summary_table(run)
    lines = table.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["base", "base + scaled rope", "after pretraining", "after SFT"]
    assert re.search(r"pass keys found at 4,096 +0/60 \(0–7 %\) +0/60 \(0–7 %\) +5\d/60 \(\d\d–\d\d+ %\)", table)
    assert re.search(r"loss at positions 2,048-4,096 +2\.5\d\d +2\.1\d\d +1\.9\d\d +1\.9\d\d", table)
    assert re.search(r"its change, paired +- +\+2\.\d ± 0\.\d %", table)
    assert "Verdict: the context was extended." in table


def variant(run, **changes):
    """The run with other results."""
    results = {"found": made_up.FOUND, "losses": made_up.LOSSES, "short": made_up.SHORT, **changes}
    made_up.write_results(run, **results)
    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # the model finds no more keys than the base
        ({"found": {**made_up.FOUND, "instruct": made_up.FOUND["before"]}}, "finds 0/60 pass keys, the model after SFT 0/60"),
        # it is no better than scaling alone in anything
        (
            {
                "found": {**made_up.FOUND, "scaled": made_up.FOUND["instruct"]},
                "losses": {**made_up.LOSSES, "scaled": made_up.LOSSES["instruct"]},
                "short": {**made_up.SHORT, "scaled": made_up.SHORT["instruct"]},
            },
            "Not better than scaling alone by more than chance",
        ),
        # it has forgotten the short context
        ({"short": {**made_up.SHORT, "instruct": 1.05}}, "more than the limit of +2 %"),
    ],
)
def test_the_verdict_follows_the_data(copy, changes, words):
    table = summary_table(variant(copy, **changes))
    assert "Verdict: extension not shown." in table
    assert words in table


def test_a_base_that_cannot_find_keys_at_home_is_said_aloud(copy):
    table = summary_table(variant(copy, found={**made_up.FOUND, "before": dict.fromkeys(made_up.FOUND["before"], 0.0)}))
    assert "Beware: the base finds only 0/60 at its own 512 tokens" in table


def test_without_needles_the_loss_decides(copy):
    run = copy
    for file in run.glob("evaluate/*/needle.jsonl"):
        file.unlink()
    verdict = judge(read_run_folder(run))
    assert verdict.extended
    assert verdict.sentences[0].startswith("Loss at positions 2,048 to 4,096 changed by -0.6")


def test_one_missing_comparison_gives_no_verdict(copy):
    run = copy
    shutil.rmtree(run / "evaluate" / "scaled")
    assert judge(read_run_folder(run)).extended is None
    assert "Verdict: not judged." in summary_table(run)


def test_samples_that_differ_are_not_paired(copy):
    run = copy
    columns = {column.name: column for column in read_run_folder(run).columns}
    before, after = (read_run_folder(run).needles(columns[name]) for name in ("before", "extend"))
    assert compare(before, after, 4096).won > 40
    for row in after.values():
        row["expected"] = " other"
    assert compare(before, after, 4096) is None


def test_numbers_are_those_of_the_files(run):
    folder = read_run_folder(run)
    column = folder.columns[0]
    rows = [json.loads(line) for line in (run / "evaluate" / "before" / "needle.jsonl").read_text().splitlines()]
    assert needle_counts(folder.needles(column), by_length)[1024] == Count(
        sum(row["correct"] for row in rows if row["length"] == 1024), 60
    )
    first = json.loads((run / "evaluate" / "before" / "loss_by_position.jsonl").read_text().splitlines()[0])
    assert loss_bins(column)[(0, 16)][Window(4096, 0, None)] == first["sums"][0] / 15
    assert paired(short_loss(column), short_loss(column)).mean == 0


@pytest.mark.parametrize(
    "part", ["recipe.yaml", "run.json", "verify.json", "evaluate", "metrics", "checkpoints", "data", "evaluate/scaled"]
)
def test_a_missing_part_is_named_and_the_rest_is_shown(copy, part):
    path = copy / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = Words(write_report(copy).read_text(encoding="utf-8")).words
    assert "Not in this report" in words
    assert part.split("/")[0] in words[words.index("Not in this report") :]
    assert "Versions" in words
    summary_table(copy)


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "run.json").write_text('{"steps": []}')
    words = Words(write_report(tmp_path).read_text(encoding="utf-8")).words
    assert "? Not judged" in words
    assert not (tmp_path / "needle_before_after.png").exists()
    assert summary_table(tmp_path).splitlines()[-2:] == [
        "Verdict: not judged.",
        "  There is nothing to compare yet: the base and a trained model must both be measured.",
    ]


def test_a_line_that_is_still_being_written_is_left_out(copy):
    file = copy / "evaluate" / "before" / "needle.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    folder = read_run_folder(copy)
    assert len(folder.needles(folder.columns[0])) == 239


@pytest.mark.parametrize(
    "name", ["evaluate/before/needle.jsonl", "metrics/extend.jsonl", "run.json", "checkpoints/base/mcore_longctx.json"]
)
def test_a_damaged_file_is_named(copy, name):
    (copy / name).write_text('{"half": \n')
    (copy / "report.html").write_text("an older page")
    with pytest.raises(ConfigError, match=f"{name}(:1)?: damaged"):
        write_report(copy)
    assert (copy / "report.html").read_text() == "an older page"


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="no such run folder"):
        summary_table(tmp_path / "nowhere")


def contrast(colours):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(colour) for colour in colours), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_needle_cell_can_be_read_and_says_how_sure_it_is():
    for trials in (1, 5, 10, 60, 500):
        for right in range(trials + 1):
            assert contrast(cell_colour(Count(right, trials))) >= 4.5  # WCAG AA
    strength = [contrast((cell_colour(Count(n, n))[0], "#ffffff")) for n in (1, 5, 20, 500)]
    assert strength == sorted(strength)
    assert strength[0] < 2 < strength[-1]


def test_lengths_are_written_as_people_say_them():
    assert [short_count(n) for n in (512, 1000, 4096, 131_072, 1 << 20, 3 << 19)] == [
        "512",
        "1,000",
        "4K",
        "128K",
        "1M",
        "1,536K",
    ]


def test_the_report_verb_needs_no_torch_and_its_help_starts_at_once(run):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    shown = subprocess.run(
        [sys.executable, "-m", "mcore_longctx", "report", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "RUN_FOLDER" in shown.stdout
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before  # of the processor: the machine may be busy
    code = (
        "import sys; from mcore_longctx.cli.main import main; code = main(['report', sys.argv[1]]); "
        "bad = {'torch', 'transformers', 'megatron', 'safetensors'} & set(sys.modules); assert not bad, bad; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True, timeout=60)
    assert "Verdict: the context was extended." in done.stdout
    assert f"report: {run / 'report.html'}" in done.stdout
    assert seconds < 0.5
