"""What a torch_dist checkpoint says of the run that saved it: Megatron-LM's flags, the schedule, the iteration.

megatron-core 0.16 keeps it in `common.pt`, 0.19 as the object `common_state/shard_0_1` (a list of one) inside the `.distcp`
files; where both are, `common.pt` counts, as for megatron-core itself. Both are pickles. They are decoded as inert records:
nothing is imported or called, whatever they name.

Source: megatron-core 0.19.2 `dist_checkpointing/serialization.py:load_common_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.formats.dcp_read import Item, TorchDist, read_torch_dist
from mcore_longctx.formats.pickle_data import Call, Global, Instance, PersistentId, PickleError
from mcore_longctx.formats.torch_archive import Archive, archive_errors
from mcore_longctx.reading import is_there, regular_size

__all__ = ["COMMON", "COMMON_OBJECT", "read_common_state"]

COMMON = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
_LIMIT = 4 << 20  # Megatron-LM's 0.19.2 has 30 KB
_MAX_DEPTH = 16
_MAX_VALUES = 100_000
_NAMESPACES = {Global("argparse", "Namespace"), Global("types", "SimpleNamespace")}
_DICTS = {Global("collections", "OrderedDict"), Global("collections", "defaultdict")}


class _AnyName:
    """Every global may be named: none is ever looked up."""

    def __contains__(self, name: object) -> bool:
        return True


def read_common_state(folder: Path, saved: TorchDist | None = None) -> Mapping[str, Any] | None:
    """The common state as plain values: dicts, lists, tuples, text, numbers; None if the folder has none.

    A Namespace becomes a dict. Anything else that is no plain value (an enum, a tensor, an object) becomes the text
    `not shown (its name)`; a torch dtype becomes its name.

    Args:
        folder: torch_dist folder.
        saved: what `read_torch_dist` said of it, if that is known.

    Raises:
        CheckpointError: damaged, no regular file, or larger than any common state.
    """
    path = folder / COMMON
    item = Item(path, 0, regular_size(path)) if is_there(path) else None
    if item is None:
        item = (read_torch_dist(folder) if saved is None else saved).objects.get(COMMON_OBJECT)
    if item is None:
        return None
    with archive_errors(item.file, "the common state"), item.file.open("rb") as file:
        value = Archive(file, item.offset, item.length, limit=_LIMIT).pickle(_AnyName())
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, dict):
            raise PickleError("is not a dict")
        shown: dict[str, Any] = _Shown().value(value)
        return shown


class _Shown:
    """Turns records into plain values. Counts them: a small pickle can describe a tree without end by recalling its parts."""

    def __init__(self) -> None:
        self.values = 0

    def value(self, value: Any, depth: int = 0) -> Any:
        self.values += 1
        if self.values > _MAX_VALUES or depth > _MAX_DEPTH:
            return "not shown (too much)"
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, list | tuple):
            return type(value)(self.value(item, depth + 1) for item in value[:_MAX_VALUES])
        if isinstance(value, dict):
            return {_key(key): self.value(item, depth + 1) for key, item in value.items()}
        if isinstance(value, Instance) and value.cls in _NAMESPACES and isinstance(value.state, dict):
            return self.value(value.state, depth + 1)
        if isinstance(value, Call) and value.function in _DICTS:
            return self.value(value.items or {}, depth + 1)
        return _name(value)


def _key(key: Any) -> str | int:
    return key if isinstance(key, str | int) else _name(key)


def _name(value: Any) -> str:
    match value:
        case Global(module="torch", name=name):
            return name[:80]
        case (Global() as name) | Call(function=name) | Instance(cls=name):
            return f"not shown ({str(name)[:80]})"
        case PersistentId():
            return "not shown (a tensor)"
    return f"not shown ({type(value).__name__})"
