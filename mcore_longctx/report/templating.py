"""Templates of the report's pages: sandboxed, everything escaped, one style."""

from __future__ import annotations

from importlib import resources

from jinja2 import FunctionLoader
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

__all__ = ["environment"]


def environment() -> SandboxedEnvironment:
    """Of the templates that come with the package."""
    templates = resources.files("mcore_longctx.report") / "templates"
    found = SandboxedEnvironment(
        loader=FunctionLoader(lambda name: (templates / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["style"] = Markup((templates / "report.css").read_text(encoding="utf-8"))
    return found
