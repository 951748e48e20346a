"""Read a recipe: YAML into frozen dataclasses, with errors that name file, line, dotted path and the nearest valid name.

No library for typed configuration that was tried reports the line of the offending key, because all of them work on the plain
dict after parsing. PyYAML's composer keeps it (`node.start_mark`), so this module walks the nodes.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.recipe.schema import Recipe, TokenCount
from mcore_longctx.units import parse_count

__all__ = ["RecipeFile", "dump_recipe", "load_recipe", "open_recipe", "preset_names", "read_typed"]

_T = TypeVar("_T")
_MAX_BYTES = 1 << 20
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe, and where each of its values stands."""

    recipe: Recipe
    file: str
    lines: Mapping[str, str]  # dotted path -> `file:line`, or the override that set it

    def where(self, dotted: str) -> str:
        """Place and dotted path for an error message, such as `run.yaml:14: stages.extend.seq_length`."""
        path = dotted
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return f"{self.lines.get(path, self.file)}: {dotted}"


@dataclass(frozen=True)
class _Override:
    keys: tuple[str, ...]  # what is left of the dotted path
    node: yaml.Node | None
    place: str  # where it was given: `override 'a.b=c'`, or file:line of a recipe that extends another


def preset_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("mcore_longctx.recipe") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `open_recipe`, without the places of its values."""
    return open_recipe(source, overrides).recipe


def open_recipe(source: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read a recipe file or a preset, with `a.b.c=value` overrides on top.

    Args:
        source: path of a YAML file, or the name of a preset.
        overrides: for example `stages.extend.optimizer.lr=1e-5`; a stage or source is addressed by its name or number.

    A recipe may be another one with changes:

        extends: tiny-cpu                          # a preset, or a file beside this one
        changes:
          name: tiny-masked
          stages.extend.cross_document_mask: true  # as on the command line

    Raises:
        ConfigError: no such file, not YAML, an unknown or missing name, a wrong type or an impossible value. One line with
            file, line, dotted path and, for a name, the nearest valid one.
    """
    file, node, changes = _compose_recipe(source)
    builder = _Builder(file)
    recipe = builder.dataclass_value(Recipe, node, "", [*changes, *(_parse_override(text) for text in overrides)])
    read = RecipeFile(recipe, file, builder.lines)
    for stage in recipe.stages:
        if stage.data not in recipe.data:
            raise ConfigError(
                f"no data set {stage.data!r}",
                where=read.where(f"stages.{stage.name}.data"),
                fix=_nearest(stage.data, list(recipe.data)),
            )
    return read


def read_typed(kind: type[_T], text: str, file: str) -> tuple[_T, Mapping[str, str]]:
    """Another YAML text as the frozen dataclass `kind`, as strict as a recipe, and where each value stands (`file:line`).

    Raises:
        ConfigError: as `open_recipe`.
    """
    builder = _Builder(file)
    value: _T = builder.dataclass_value(kind, _compose(text, file), "", [])
    return value, builder.lines


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text; reading it again gives an equal recipe."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=120)


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if not path.exists() and path.suffix not in (".yaml", ".yml") and len(path.parts) == 1:
        names = preset_names()
        if str(source) not in names:
            raise ConfigError(
                "no such recipe file, and no preset of this name",
                where=source,
                fix=f"{_nearest(str(source), names)} (presets: {', '.join(names)})",
            )
        path = Path(str(resources.files("mcore_longctx.recipe") / "presets" / f"{source}.yaml"))
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError("larger than 1 MiB: not a recipe", where=path)
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 (byte {error.start})", where=path, fix="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from None


def _compose_recipe(source: str | Path) -> tuple[str, yaml.Node | None, list[_Override]]:
    """File, root node and changes of a recipe; of one that extends others, the root of the last and the changes of all, in order."""
    seen: list[str] = []
    chain: list[list[_Override]] = []
    while True:
        file, text = _read(source)
        if file in seen:
            raise ConfigError(f"extends itself by way of {', '.join(seen)}", where=file)
        seen.append(file)
        node = _compose(text, file)
        given = {str(key.value): value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}
        if "extends" not in given:
            return seen[0], node, [change for changes in reversed(chain) for change in changes]
        chain.append(_changes(given, file))
        base = given["extends"].value
        beside = Path(file).parent / base
        source = beside if beside.suffix in (".yaml", ".yml") else base


def _changes(given: Mapping[str, yaml.Node], file: str) -> list[_Override]:
    """What a recipe that extends another changes."""
    if not isinstance(given["extends"], yaml.ScalarNode) or not given["extends"].value:
        raise ConfigError("extends: expected a preset or a file", where=f"{file}:{given['extends'].start_mark.line + 1}")
    unknown = [name for name in given if name not in ("extends", "changes")]
    if unknown:
        fix = "a recipe that extends another has only extends and changes"
        raise ConfigError(f"{unknown[0]}: unknown name", where=f"{file}:{given[unknown[0]].start_mark.line + 1}", fix=fix)
    changes = given.get("changes")
    if changes is not None and not isinstance(changes, yaml.MappingNode):
        raise ConfigError("changes: expected section.name: value", where=f"{file}:{changes.start_mark.line + 1}")
    pairs = changes.value if changes is not None else []
    return [_Override(tuple(str(key.value).split(".")), value, f"{file}:{key.start_mark.line + 1}") for key, value in pairs]


def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return _composed(text, file)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"not valid YAML: {error.problem}", where=f"{file}:{line}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {str(error).splitlines()[0]}", where=file) from None


def _parse_override(text: str) -> _Override:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not of the form section.name=value")
    place = f"override {text!r}"
    try:
        node = _composed(value or '""', place)
    except yaml.YAMLError:
        raise ConfigError(f"{place}: the value is not valid YAML") from None
    return _Override(tuple(key.split(".")), node, place)


class _Named(io.StringIO):
    """A text whose YAML nodes know where they come from: PyYAML asks a stream for its name."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def _composed(text: str, name: str) -> yaml.Node | None:
    return yaml.compose(_Named(text, name), Loader=_LOADER)


def _place(node: yaml.Node) -> str:
    """`file:line`, or the override."""
    name = str(node.start_mark.name)
    return name if name.startswith("override ") else f"{name}:{node.start_mark.line + 1}"


class _Builder:
    """Walks YAML nodes and types together; remembers where each value stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, str] = {}

    def place(self, node: yaml.Node | None) -> str:
        return self.file if node is None else _place(node)

    def value(self, kind: Any, node: yaml.Node | None, at: str, overrides: list[_Override], place: str) -> Any:
        """Build one value of type `kind` at the dotted path `at`."""
        self.lines[at] = place
        origin, args = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):  # Optional[X], or X | tuple[X, ...]: a recipe needs no wider union
            effective = overrides[-1].node if overrides and not overrides[-1].keys else node
            if effective is not None and effective.tag == _NULL:
                return None
            kinds, is_list = [a for a in args if a is not type(None)], isinstance(effective, yaml.SequenceNode)
            kind = next((a for a in kinds if (get_origin(a) is tuple) == is_list), kinds[0])
            return self.value(kind, node, at, overrides, place)
        if dataclasses.is_dataclass(kind):
            return self.dataclass_value(kind, node, at, overrides)
        if origin is dict:
            return self.dict_value(args[1], node, at, overrides, place)
        if origin is tuple and dataclasses.is_dataclass(args[0]):
            return self.items(args[0], node, at, overrides, place)
        if overrides:  # the last override of a leaf wins
            last = overrides[-1]
            if last.keys:
                raise ConfigError(f"{at} is {_show(kind)}, it has no {'.'.join(last.keys)!r}", where=last.place)
            node, place = last.node, last.place
            self.lines[at] = place
        if origin is tuple:
            if not isinstance(node, yaml.SequenceNode):
                raise _mismatch(kind, node, at, place)
            return tuple(self.value(args[0], item, f"{at}.{i}", [], place) for i, item in enumerate(node.value))
        return _scalar(kind, node, at, place)

    def dataclass_value(self, kind: Any, node: yaml.Node | None, at: str, overrides: list[_Override]) -> Any:
        given_node = node
        node, overrides = _replaced(node, overrides, kind)
        if node is not given_node:
            self.lines[at] = self.place(node)
        # what is wrong with the whole stands in the recipe that was opened, not in the one that it extends
        is_another = not at and node is not None and str(node.start_mark.name) != self.file
        place = self.file if is_another else self.place(node)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise _mismatch(kind, node, at, place)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        given = self.mapping(node, at, list(fields))
        wanted: dict[str, list[_Override]] = {}
        for override in overrides:
            name = override.keys[0]
            if name not in fields:
                raise ConfigError(f"{_join(at, name)}: unknown name", where=override.place, fix=_nearest(name, list(fields)))
            wanted.setdefault(name, []).append(dataclasses.replace(override, keys=override.keys[1:]))
        values, hints = {}, _hints(kind)
        for name, field in fields.items():
            here = _join(at, name)
            if name in given or name in wanted:
                key_node, value_node = given.get(name, (None, None))
                values[name] = self.value(hints[name], value_node, here, wanted.get(name, []), self.place(key_node))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{here}: missing", where=place, fix=f"it has no default, give {_show(hints[name])}")
        try:
            return kind(**values)
        except (ValueError, LongctxError) as error:  # what a section says about itself
            what = error.what if isinstance(error, LongctxError) else str(error)
            fix = error.fix if isinstance(error, LongctxError) else ""
            raise ConfigError(f"{at}: {what}" if at else what, where=place, fix=fix) from None

    def dict_value(self, kind: Any, node: yaml.Node | None, at: str, overrides: list[_Override], place: str) -> dict[str, Any]:
        node, overrides = _replaced(node, overrides, dict)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise _mismatch(dict, node, at, place)
        given: dict[str, tuple[yaml.Node | None, yaml.Node | None]] = dict(self.mapping(node, at, None))
        for override in overrides:
            name = override.keys[0]
            is_whole = len(override.keys) == 1 and isinstance(override.node, yaml.MappingNode)
            if name not in given and (is_whole or not dataclasses.is_dataclass(kind)):  # an override may bring a new one
                given[name] = (None, None)
            elif name not in given:
                raise ConfigError(f"{_join(at, name)}: unknown name", where=override.place, fix=_nearest(name, list(given)))
        built = {}
        for name, (key_node, value_node) in given.items():
            inner = [dataclasses.replace(o, keys=o.keys[1:]) for o in overrides if o.keys[0] == name]
            built[name] = self.value(kind, value_node, _join(at, name), inner, self.place(key_node))
        return built

    def items(self, kind: Any, node: yaml.Node | None, at: str, overrides: list[_Override], place: str) -> tuple[Any, ...]:
        """A list of sections; an override addresses one by its `name`, or by its number, or replaces the list."""
        for number, override in enumerate(overrides):
            if not override.keys:
                return self.items(kind, override.node, at, overrides[number + 1 :], override.place)
        if not isinstance(node, yaml.SequenceNode):
            raise _mismatch(tuple, node, at, place)
        labels = [_label(item, i) for i, item in enumerate(node.value)]
        for override in overrides:
            name = override.keys[0]
            if name not in labels and not (name.isdigit() and int(name) < len(labels)):
                raise ConfigError(f"{_join(at, name)}: unknown name", where=override.place, fix=_nearest(name, labels))
        built = []
        for i, (label, item) in enumerate(zip(labels, node.value, strict=True)):
            inner = [dataclasses.replace(o, keys=o.keys[1:]) for o in overrides if o.keys[0] in (label, str(i))]
            built.append(self.value(kind, item, _join(at, label), inner, self.place(item)))
        return tuple(built)

    def mapping(self, node: yaml.Node | None, at: str, valid: list[str] | None) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        given: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value if node is not None else ():
            name = str(key.value)
            if valid is not None and name not in valid:
                raise ConfigError(f"{_join(at, name)}: unknown name", where=self.place(key), fix=_nearest(name, valid))
            if name in given:
                raise ConfigError(f"{_join(at, name)}: given twice", where=self.place(key), fix="keep one")
            given[name] = (key, value)
        return given


def _replaced(node: yaml.Node | None, overrides: list[_Override], kind: Any) -> tuple[yaml.Node | None, list[_Override]]:
    """An override of a whole section (`rope={type: yarn, ...}`) replaces it; later ones may change fields of it."""
    for i, override in enumerate(overrides):
        if not override.keys:
            if not isinstance(override.node, yaml.MappingNode):
                raise ConfigError(f"a {_show(kind)} is wanted", where=override.place)
            return _replaced(override.node, overrides[i + 1 :], kind)
    return node, overrides


def _scalar(kind: Any, node: yaml.Node | None, at: str, place: str) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _mismatch(kind, node, at, place)
    value = yaml.SafeLoader("").construct_object(node)
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise ConfigError(
                f"{at}: {node.value!r} is not one of {', '.join(allowed)}",
                where=place,
                fix=_nearest(str(node.value), list(allowed)),
            )
        return value
    if kind is TokenCount and not isinstance(value, bool):
        try:
            return TokenCount(parse_count(node.value))
        except ValueError as error:
            raise ConfigError(f"{at}: {error}", where=place) from None
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return node.value  # as it is written: 4:00:00, which YAML 1.1 takes for a number, or OMP_NUM_THREADS: 8
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 1e-5 as a string
        except ValueError:
            raise _mismatch(kind, node, at, place) from None
    if isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ConfigError(f"{at}: {node.value} is not a finite number", where=place)
        return value
    raise _mismatch(kind, node, at, place)


def _mismatch(kind: Any, node: yaml.Node | None, at: str, place: str) -> ConfigError:
    if isinstance(node, yaml.ScalarNode):
        got = repr(node.value) if node.tag != _NULL else "nothing"
    else:
        got = (
            "a section" if isinstance(node, yaml.MappingNode) else "a list" if isinstance(node, yaml.SequenceNode) else "nothing"
        )
    return ConfigError(f"{at or 'the recipe'}: {got} is not {_show(kind)}", where=place)


def _show(kind: Any) -> str:
    kind = (
        next((a for a in get_args(kind) if a is not type(None)), kind) if get_origin(kind) in (Union, types.UnionType) else kind
    )
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if dataclasses.is_dataclass(kind) or kind is dict or get_origin(kind) is dict:
        return "a section (name: value)"
    if kind is tuple or get_origin(kind) is tuple:
        return "a list"
    names = {
        TokenCount: "a token count (4096, 128k, 4M)",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
    }
    return names.get(kind, str(kind))


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(sorted(valid))}"


def _label(node: yaml.Node, index: int) -> str:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "name" and isinstance(value, yaml.ScalarNode):
            return str(value.value)
    return str(index)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, _plain(getattr(value, field.name))) for field in dataclasses.fields(value))
        # null is left out where it is the default: elsewhere reading would put the default in its place
        return {field.name: plain for field, plain in pairs if plain is not None or field.default is not None}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # a TokenCount is written as a plain number
    return value
