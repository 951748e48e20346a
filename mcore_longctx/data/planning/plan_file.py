"""plan.json and plan.runs of OUT/plan: read back, and compared with what is asked now."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.data.files.shards import DocumentTable
from mcore_longctx.data.files.sidecar import Runs, open_runs
from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.manifest import MANIFEST, read_manifest, versions, write_atomic

__all__ = ["Asked", "is_same_plan", "plan_there", "read_plan", "stored_crc32", "write_plan_json"]

_DECIDED_BEFORE = ("path", "text_field", "id_field", "document")  # of a source: the table of documents is what came of them


@dataclass(frozen=True)
class Asked:
    """What a plan is to be made of."""

    facts: dict[str, Any]  # method, settings, seed, token_budget, max_samples, separator, as in plan.json
    seq_length: int
    table: DocumentTable


def plan_there(folder: Path, asked: Asked) -> dict[str, Any] | None:
    """Contents of the finished plan in `folder`, OUT/plan, if it is the one that is asked for. Writes nothing.

    Raises:
        ConfigError: it is another one, and OUT holds the data that was packed by it.
        CheckpointError: the manifest of the packed data is damaged.
    """
    try:
        _, facts = read_plan(folder)
    except DataError:
        return None
    out = folder.parent
    manifest = read_manifest(out, "data") if (out / MANIFEST).is_file() else {}
    is_packed = manifest.get("plan_sha256") == facts["plan_sha256"]
    if is_same_plan(facts, asked):
        # data is kept when the library changes, a plan that nothing depends on is made by the library as it is now
        is_whole = all((folder / name).is_file() for name in ("lengths.json", "lengths.png"))
        return facts if is_packed or (is_whole and facts["versions"] == versions()) else None
    if is_packed:
        raise ConfigError(
            f"holds packed data {manifest['name']!r}, made by a plan with other settings",
            where=out,
            fix="use another output folder",
        )
    return None


def is_same_plan(facts: dict[str, Any], asked: Asked) -> bool:
    """Whether the plan with these contents of plan.json places the same documents in the same way as the one that is asked for.

    The name of the data set and the number of bad records that are allowed decide nothing. A limit on samples decides nothing where
    the plan had fewer.
    """
    if facts["seq_length"] != asked.seq_length or _deciding(facts) != _deciding(asked.facts):
        return False
    old, new, samples = facts["max_samples"], asked.facts["max_samples"], facts["samples"]
    if old != new and not ((old is None or samples < old) and (new is None or samples <= new)):
        return False
    return bool(facts["documents_sha256"] == asked.table.sha256())


def read_plan(folder: Path) -> tuple[Runs, dict[str, Any]]:
    """Map plan.runs and read plan.json of OUT/plan. `document` of the runs is a row of the table (LITERAL, PADDING below 0).

    Raises:
        DataError: no plan, not finished, or damaged.
    """
    path = folder / "plan.json"
    damaged = DataError("damaged, or not written by mcore-longctx", where=path, fix="run `data plan` again")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("checksum") != _checksum(facts) or facts["kind"] != "plan":
            raise damaged
    except FileNotFoundError:
        raise DataError("no finished plan here", where=folder, fix="run `data plan`") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged from None
    runs = open_runs(folder / "plan.runs", kind="plan")
    if stored_crc32(folder / "plan.runs") != facts["runs_crc32"]:
        raise DataError(
            "is not the file that plan.json was written with", where=folder / "plan.runs", fix="run `data plan` again"
        )
    return runs, facts


def write_plan_json(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write plan.json, the sign that the plan is whole; its contents."""
    facts = json.loads(json.dumps({"format": 1, "kind": "plan", **facts}))
    try:
        write_atomic(folder / "plan.json", json.dumps(facts | {"checksum": _checksum(facts)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=folder, fix="make room") from None
    return facts


def stored_crc32(path: Path) -> int:
    """The checksum at the end of a file of columns, which covers every byte before it."""
    with path.open("rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")


def _deciding(facts: dict[str, Any]) -> dict[str, Any]:
    """Of plan.json what decides, beside the documents, their sample length and the limit."""
    found = {name: facts.get(name) for name in ("method", "seed", "token_budget", "separator")}
    # what is not asked for decides nothing: an option that came later than a plan does not make another plan of it
    settings = {name: value for name, value in facts["settings"].items() if name != "max_bad" and value is not None}
    if "sentences" in settings:  # the documents are what was chosen; where the table lay decides nothing
        settings["sentences"] = {name: value for name, value in settings["sentences"].items() if name != "offsets"}
    if "sources" in settings:
        settings["sources"] = [
            {name: value for name, value in source.items() if name not in _DECIDED_BEFORE} for source in settings["sources"]
        ]
    plain: dict[str, Any] = json.loads(json.dumps(found | {"settings": settings}))  # tuples become lists, as in the file
    return plain


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
