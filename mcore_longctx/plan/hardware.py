"""GPUs and the nodes they sit in: rates, sizes, links, with a source for each (`hardware.yaml`)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import read_typed

__all__ = ["Gpu", "KernelRate", "find_gpu", "known_gpus"]

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class KernelRate:
    """Causal attention at head dimension 128, FLOP/s of the causal half; backward counts 2.5 times the forward FLOPs."""

    forward: float
    backward: float
    source: str = ""

    def __post_init__(self) -> None:
        _check_positive(forward=self.forward, backward=self.backward)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, its links, and its share of a node. Bytes are decimal, bandwidths bytes/s in one direction and per GPU."""

    name: str
    peak_flops: float  # dense bf16
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    pcie_bandwidth: float  # to the host, usable
    gpus_per_node: int
    host_memory_bytes: float  # of a node
    kernels: Mapping[str, KernelRate]
    default_kernel: str
    source: str
    fp8: bool = True  # whether its tensor cores have FP8
    sustained: float = 1.0  # clock under load over that of the board whose kernel rates these are
    aliases: tuple[str, ...] = ()

    def kernel(self, name: str = "") -> KernelRate:
        """Rates of a kernel as this board sustains them; the default kernel for an empty name.

        Raises:
            ConfigError: this GPU has no such kernel; those that it has are in the message.
        """
        rate = self.kernels.get(name or self.default_kernel)
        if rate is None:
            raise ConfigError(f"{self.name} has no attention kernel {name!r}", fix=f"it has {', '.join(sorted(self.kernels))}")
        return KernelRate(rate.forward * self.sustained, rate.backward * self.sustained, rate.source)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A GPU as a file gives it."""

    like: str | None = None
    aliases: tuple[str, ...] = ()
    peak_flops: float | None = None
    memory_bytes: float | None = None
    memory_bandwidth: float | None = None
    nvlink_bandwidth: float | None = None
    network_bandwidth: float | None = None
    pcie_bandwidth: float | None = None
    gpus_per_node: int | None = None
    host_memory_bytes: float | None = None
    sustained: float | None = None
    fp8: bool | None = None
    default_kernel: str | None = None
    kernels: dict[str, KernelRate] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_positive(**{name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None})
        if self.sustained is not None and self.sustained > 1.0:
            raise ValueError(f"sustained is {self.sustained}, expected at most 1: a slower clock")
        if unknown := sorted(set(self.sources) - set(_SIZES) - {"kernels"}):
            raise ValueError(f"sources names {unknown[0]!r}, which is no figure of a GPU")


@dataclass(frozen=True, kw_only=True)
class _File:
    gpus: dict[str, _Entry]


_SIZES = (
    "peak_flops",
    "memory_bytes",
    "memory_bandwidth",
    "nvlink_bandwidth",
    "network_bandwidth",
    "pcie_bandwidth",
    "gpus_per_node",
    "host_memory_bytes",
    "sustained",
)


def known_gpus(site: Path | None = None) -> dict[str, Gpu]:
    """The table by name: ours, and a site's own YAML file, whose entries win.

    Raises:
        ConfigError: the site's file is unreadable, or has an unknown, missing or impossible value (file and line).
    """
    ours = _ours()
    return ours if site is None else _read_site(site, ours)


def find_gpu(name: str, site: Path | None = None) -> Gpu:
    """One GPU by name (`h100-80gb`) or by a short name (`h100`).

    Raises:
        ConfigError: no such GPU; the nearest name is in the message.
    """
    table = known_gpus(site)
    by_name = {alias: gpu for gpu in table.values() for alias in gpu.aliases} | table
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_name, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no GPU {name!r} in the hardware table", fix=f"{hint}known: {', '.join(sorted(table))}")


@cache
def _ours() -> dict[str, Gpu]:
    text = (resources.files("mcore_longctx.plan") / "hardware.yaml").read_text(encoding="utf-8")
    return _read(text, "hardware.yaml", {})


def _read_site(path: Path, ours: dict[str, Gpu]) -> dict[str, Gpu]:
    try:
        if path.stat().st_size > _MAX_BYTES or not path.is_file():
            raise ConfigError("not a hardware table: a regular file below 1 MiB is wanted", where=path)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 (byte {error.start})", where=path, fix="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from None
    return _read(text, str(path), ours)


def _read(text: str, file: str, known: dict[str, Gpu]) -> dict[str, Gpu]:
    read, lines = read_typed(_File, text, file)
    table = dict(known)
    for name, entry in read.gpus.items():
        table[name] = _gpu(name, entry, table, lines.get(f"gpus.{name}", file))
    return table


def _gpu(name: str, entry: _Entry, table: Mapping[str, Gpu], where: str) -> Gpu:
    given = {key: getattr(entry, key) for key in (*_SIZES, "fp8", "default_kernel") if getattr(entry, key) is not None}
    source = "; ".join(f"{figure}: {text}" for figure, text in entry.sources.items())
    base = table.get(entry.like or name)
    if entry.like is not None and base is None:
        near = difflib.get_close_matches(entry.like, table, n=1, cutoff=0.3)
        fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(table))}"
        raise ConfigError(f"gpus.{name}.like: no GPU {entry.like!r} above", where=where, fix=fix)
    if base is not None:
        kernels = {**base.kernels, **entry.kernels}
        source = "; ".join(part for part in (source, f"the rest as {base.name}: {base.source}") if part)
        gpu = replace(base, name=name, aliases=entry.aliases, kernels=kernels, source=source, **given)
    else:
        optional = {f.name for f in fields(Gpu) if f.name in ("sustained", "fp8")}
        if missing := [key for key in (*_SIZES, "default_kernel") if key not in given and key not in optional]:
            raise ConfigError(
                f"gpus.{name}: {missing[0]} is missing", where=where, fix="give it, or take it over: `like: h100-80gb`"
            )
        gpu = Gpu(name=name, aliases=entry.aliases, kernels=entry.kernels, source=source, **given)
    if gpu.default_kernel not in gpu.kernels:
        raise ConfigError(f"gpus.{name}: default_kernel {gpu.default_kernel!r} is not one of its kernels", where=where)
    return gpu


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected above 0")
