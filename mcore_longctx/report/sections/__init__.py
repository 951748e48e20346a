"""What each section of the page says, as plain values for its template; None where there is nothing to say."""

from mcore_longctx.report.sections.evaluation import loss_section, short_section, suite_section
from mcore_longctx.report.sections.export import export_section, verify_section
from mcore_longctx.report.sections.failures import failures_section
from mcore_longctx.report.sections.head import all_same, subtitle, tiles
from mcore_longctx.report.sections.needles import needle_sections
from mcore_longctx.report.sections.ruler import ruler_section
from mcore_longctx.report.sections.training import data_section, recipe_section, steps_section, training_section

__all__ = [
    "all_same",
    "data_section",
    "export_section",
    "failures_section",
    "loss_section",
    "needle_sections",
    "recipe_section",
    "ruler_section",
    "short_section",
    "steps_section",
    "subtitle",
    "suite_section",
    "tiles",
    "training_section",
    "verify_section",
]
