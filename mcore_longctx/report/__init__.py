"""One HTML file, its plots and the before/after table, from what a run folder holds."""

from mcore_longctx.report.report import write_report
from mcore_longctx.report.summary import summary_table

__all__ = ["summary_table", "write_report"]
