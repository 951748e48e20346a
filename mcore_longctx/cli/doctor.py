"""`mcore-longctx doctor`: what this machine can run, and what a recipe's rope really is."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="look at this machine, and say a recipe's rope in words",
        description="Look at Python, torch, megatron-core, TransformerEngine and apex, and name the traps that are known. With a RECIPE, "
        "also say in words which rope it trains. Exit code 1 if something is wrong.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file or preset")
    parser.add_argument("overrides", nargs="*", metavar="section.name=value")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    from mcore_longctx.launch.doctor import examine

    findings = examine()
    rope = None
    if args.recipe:
        from mcore_longctx.recipe.load import open_recipe
        from mcore_longctx.recipe.resolve import resolve
        from mcore_longctx.rope import dropped_scaling, explain

        resolved = resolve(open_recipe(args.recipe, args.overrides), need_model=False)
        warning = dropped_scaling(resolved.own_rope, resolved.rope) if resolved.model_found else None
        rope = explain(resolved.rope) + (f"\nWARNING: {warning}" if warning else "")
    if args.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "rope": rope}, indent=1))
    else:
        marks = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
        for finding in findings:
            print(f"{marks[finding.level]} {finding.subject:<19} {finding.text}")
        if rope is not None:
            print(f"\nrope of {args.recipe}:\n{rope}")
    return int(any(finding.level == "wrong" for finding in findings))
