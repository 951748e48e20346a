"""`report.html`: one page of what a run did and what came of it. It needs no network: styles and pictures are inside."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcore_longctx.manifest import versions, write_atomic
from mcore_longctx.report import plots, sections
from mcore_longctx.report.run_folder import RunFolder, read_run_folder
from mcore_longctx.report.summary import summary_rows
from mcore_longctx.report.templating import environment
from mcore_longctx.report.verdict import judge

__all__ = ["NEEDLE_PICTURE", "REPORT", "write_report"]

REPORT = "report.html"
NEEDLE_PICTURE = "needle_before_after.png"


def write_report(run_folder: Path) -> Path:
    """Write `report.html` and, where needles were measured, `needle_before_after.png` into a run folder.

    Missing parts are named in the report. Nothing else in the folder is touched; the page replaces an older one whole.

    Returns:
        the path of the page.

    Raises:
        ConfigError: not a run folder, or a damaged file.
    """
    folder = read_run_folder(run_folder)
    page = environment().get_template("report.html.j2").render(_content(folder))
    plots.needle_png(folder, run_folder / NEEDLE_PICTURE)
    path = run_folder / REPORT
    write_atomic(path, page.encode("utf-8", "replace").decode())  # half a surrogate pair, as an answer may hold, is no UTF-8
    return path


def _content(folder: RunFolder) -> dict[str, Any]:
    verdict = judge(folder)
    return {
        "name": folder.name,
        "subtitle": sections.subtitle(folder),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": verdict,
        "verdict_class": {True: "good", False: "bad", None: "open"}[verdict.extended],
        "tiles": sections.tiles(folder),
        "missing": folder.missing,
        "original": folder.original_length,
        "trained": folder.trained_length,
        "columns": folder.columns,
        "summary": summary_rows(folder),
        "same": sections.all_same(folder),
        "needles": sections.needle_sections(folder),
        "ruler": sections.ruler_section(folder),
        "positions": sections.loss_section(folder),
        "short": sections.short_section(folder),
        "suite": sections.suite_section(folder),
        "failures": sections.failures_section(folder),
        "training": sections.training_section(folder),
        "data": sections.data_section(folder),
        "recipe": sections.recipe_section(folder),
        "verify": sections.verify_section(folder.verify),
        "export": sections.export_section(folder),
        "steps": sections.steps_section(folder),
        "versions": folder.run.get("versions") or versions(),
    }
