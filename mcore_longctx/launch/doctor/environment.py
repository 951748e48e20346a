"""Environment variables that stop a training, slow it down, or do nothing although people set them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mcore_longctx.launch.doctor.findings import Finding, note, ok, wrong

__all__ = ["variables"]


def _is(*values: str) -> Callable[[str], bool]:
    return lambda text: text.strip().lower() in values


def _below(limit: int) -> Callable[[str], bool]:
    return lambda text: text.strip().isdigit() and int(text) < limit


_ON, _OFF = _is("1", "true", "yes", "on"), _is("0", "false", "no", "off")


@dataclass(frozen=True)
class _Rule:
    names: tuple[str, ...]
    applies: Callable[[str], bool]
    stops: bool  # a fault; else worth knowing
    what: str


_RULES = (
    _Rule(
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"),
        _OFF,
        True,
        "when a rank dies the others wait for ever, whatever the timeout",
    ),
    _Rule(
        ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"),
        _ON,
        True,
        "the host waits for every exchange, so none hides behind attention",
    ),
    _Rule(("CUDA_LAUNCH_BLOCKING",), _ON, True, "every kernel waits for the one before: for debugging only"),
    _Rule(("PYTORCH_NO_CUDA_MEMORY_CACHING",), _ON, True, "every tensor is allocated by the driver: for debugging only"),
    _Rule(("NCCL_P2P_DISABLE",), _ON, True, "GPUs of a node exchange through host memory instead of NVLink"),
    _Rule(("NCCL_IB_DISABLE",), _ON, True, "nodes exchange over TCP instead of InfiniBand"),
    _Rule(("NCCL_SHM_DISABLE",), _ON, False, "ranks of a node without a direct link exchange over the network"),
    _Rule(
        ("NCCL_TIMEOUT", "TORCH_NCCL_TIMEOUT"),
        lambda _: True,
        False,
        "nobody reads it: how long a rank waits is stages.NAME.distributed_timeout_minutes",
    ),
    _Rule(
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",),
        _below(300),
        False,
        "torch ends the process when its own watchdog is late by this much, which slow file systems cause; its default is 480",
    ),
    _Rule(("TORCH_DISTRIBUTED_DEBUG",), _is("detail"), False, "every collective is checked by another one"),
    _Rule(("NCCL_DEBUG",), _is("trace", "abort"), False, "logs of gigabytes; WARN is enough"),
    _Rule(("NCCL_ALGO", "NCCL_PROTO"), lambda text: bool(text.strip()), False, "NCCL no longer chooses by message size"),
    _Rule(("TOKENIZERS_PARALLELISM",), _ON, False, "tokenizer threads on top of worker processes"),
)
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def variables(environment: Mapping[str, str], *, nodes: int = 1, root: Path = Path("/")) -> Iterator[Finding]:
    """What is set, and should not be.

    Args:
        environment: of the job: of this process, with `cluster.environment` of the recipe on top.
        nodes: of the largest stage; what concerns the network only is no fault on one node.
        root: where /sys is.
    """
    found = [*_by_rule(environment, nodes), *_interfaces(environment, root / "sys/class/net")]
    yield from found or [ok("environment", "no variable that stops or slows torch or NCCL")]


def _by_rule(environment: Mapping[str, str], nodes: int) -> Iterator[Finding]:
    for rule in _RULES:
        for name in rule.names:
            if not rule.applies(environment.get(name, "")) or name not in environment:
                continue
            text = f"{name}={environment[name][:40]}: {rule.what}"
            if rule.stops and not (name == "NCCL_IB_DISABLE" and nodes == 1):
                yield wrong("environment", text, f"unset {name}")
            else:
                yield note("environment", text)


def _interfaces(environment: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """Interfaces that are named must exist. NCCL takes prefixes, `=NAME` exactly and `^NAME` for all others; gloo names."""
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for variable in _INTERFACES:
        text = environment.get(variable, "")
        if not text or text.startswith("^") or not present:
            continue
        names = [name for name in re.split(r"\s*,\s*", text.removeprefix("=").strip()) if name]
        exact = text.startswith("=") or not variable.startswith("NCCL")
        if not any(there == name or (not exact and there.startswith(name)) for name in names for there in present):
            yield wrong(
                "environment",
                f"{variable}={text[:40]}: no such interface on this machine ({', '.join(present)})",
                f"unset {variable}, or name one that every node has",
            )
