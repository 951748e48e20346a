"""GPUs and the nodes they sit in: rates, sizes, links, with a source for each (`hardware.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Gpu", "KernelRate", "find_gpu", "known_gpus"]


@dataclass(frozen=True)
class KernelRate:
    """Causal attention at head dimension 128, FLOP/s of the causal half; backward counts 2.5 times the forward FLOPs."""

    forward: float
    backward: float


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


def known_gpus(site: Path | None = None) -> dict[str, Gpu]:
    """The table by name: ours, and a site's own YAML file, whose entries win.

    Raises:
        ConfigError: the site's file is unreadable, or has an unknown, missing or impossible value (file and line).
    """
    raise NotImplementedError


def find_gpu(name: str, site: Path | None = None) -> Gpu:
    """One GPU by name (`h100-80gb`) or by a short name (`h100`).

    Raises:
        ConfigError: no such GPU; the nearest name is in the message.
    """
    raise NotImplementedError
