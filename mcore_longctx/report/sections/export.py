"""The export: against the checkpoint, and the commands that take it out into the world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.families import ModelShape
from mcore_longctx.report.commands import export_commands
from mcore_longctx.report.run_folder import RunFolder
from mcore_longctx.rope import RopeScaling

__all__ = ["export_section", "verify_section"]


def export_section(folder: RunFolder) -> list[tuple[str, list[str]]] | None:
    """(title, lines for a shell) of the export at its length; None where there is no export."""
    export = folder.path / "export"
    weight_bytes = sum(path.stat().st_size for path in export.glob("*.safetensors"))
    card = folder.cards.get(folder.recipe.stages[-1].name) if folder.recipe is not None and folder.recipe.stages else None
    if not weight_bytes or card is None:
        return None
    try:
        shape, rope = ModelShape.from_dict(card["shape"]), RopeScaling.from_dict(card["rope"])
    except (KeyError, TypeError, ValueError):
        return None
    length = rope.resolved_max_position_embeddings
    if length is None:
        return None
    return export_commands(shape, length, weight_bytes=weight_bytes, path=str(export), settings=_settings(folder))


def _settings(folder: RunFolder) -> dict[str, Any]:
    """Of the tasks, as the run measured them."""
    assert folder.recipe is not None
    measured = folder.recipe.evaluate.at_level()
    settings: dict[str, Any] = {"seed": folder.recipe.evaluation_seed}
    if measured.ruler is not None:
        lengths = [int(length) for length in measured.ruler.lengths]
        settings |= {"max_seq_lengths": lengths, "haystack": str(measured.ruler.haystack), "samples": measured.ruler.samples}
    elif measured.needle is not None:
        settings |= {"haystack": str(measured.needle.haystack)}
    return settings


def verify_section(verify: Mapping[str, Any] | None) -> list[tuple[str, str]] | None:
    """`convert verify` of the export against the checkpoint, in words."""
    if verify is None:
        return None
    words = {True: "equal", False: "DIFFERENT", None: "not compared"}
    problems = [
        *verify.get("other", ()),
        *(f"only on one side: {name}" for name in [*verify.get("only_a", ()), *verify.get("only_b", ())]),
        *(f"{row.get('name')}: {row.get('elements', 0):,} elements" for row in verify.get("differences", ())),
    ]
    same = not problems if "differences" in verify else None  # its own `equal` also counts the logits
    rows = [("tensors", f"{words[same]}, {verify.get('tensors', 0):,} compared, {verify.get('bytes', 0):,} bytes")]
    rows += [("differs", problem) for problem in problems[:20]]
    if "rope_equal" in verify:
        rows.append(("rope fingerprint", words[verify["rope_equal"]]))
    logits = verify.get("logits")
    if not isinstance(logits, Mapping):
        return [*rows, ("logits", "not compared")]
    rows.append(
        (
            "logits",
            f"{words[logits.get('equal')]} within {logits.get('tolerance', 0):g}, {' against '.join(logits.get('readers', ()))}",
        )
    )
    rows.append(("inverse frequencies", words[logits.get("inverse_frequencies_equal")]))
    for row in logits.get("differences", ()):
        relative = row.get("relative")
        difference = "not a number" if relative is None else f"{relative:.1e} of the largest logit"
        rows.append(
            (
                f"at positions {row.get('positions')}",
                f"largest difference {difference}, same most probable token in {100 * row.get('argmax_equal', 0):.1f} %",
            )
        )
    return rows
