"""`mcore-longctx doctor`: what this machine can run, and whether a recipe would fail on it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_longctx.recipe.resolve import Resolved


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="look at this machine, and whether a recipe would fail on it",
        description="Look at packages, GPUs, attention kernels, environment, limits and memory, and name the traps that are known. With "
        "a RECIPE, also at its layouts, plan, timeouts, time limit, disk and inputs, and build one layer of its model to read the rope that it "
        "really has. Every fault comes with its fix. Exit code 1 if something is wrong.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file or preset")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    from mcore_longctx.launch.doctor import examine, examine_recipe

    words = None
    if args.recipe:
        from mcore_longctx.recipe.load import open_recipe

        findings, resolved = examine_recipe(open_recipe(args.recipe, args.overrides))
        words = _rope_in_words(resolved) if resolved is not None else None
    else:
        findings = examine()
    faults = [finding for finding in findings if finding.level == "wrong"]
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "wrong": len(faults), "rope": words}, indent=1))
        return int(bool(faults))
    marks = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
    for finding in findings:
        print(f"{marks[finding.level]} {finding.line()}")
    if words is not None:
        print(f"\nrope of {args.recipe}:\n{words}")
    if faults:
        print(f"\n{len(faults)} wrong: {', '.join(dict.fromkeys(fault.subject for fault in faults))}")
    return int(bool(faults))


def _rope_in_words(resolved: Resolved) -> str:
    from mcore_longctx.rope import dropped_scaling, explain

    warning = dropped_scaling(resolved.own_rope, resolved.rope) if resolved.model_found else None
    return explain(resolved.rope) + (f"\nWARNING: {warning}" if warning else "")
