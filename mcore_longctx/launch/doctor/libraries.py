"""What is installed, and the packages that are known to stop people."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from mcore_longctx.launch.doctor.findings import Finding, note, ok, wrong
from mcore_longctx.manifest import readable_bytes, versions

__all__ = ["installed", "megatron_found", "torch_found"]

_INSTALL = "pip install 'mcore-longctx[train]'"


def installed() -> Iterator[Finding]:
    """What the package records say: Python, versions, a wrong apex, an empty transformer-engine, psutil. Imports nothing."""
    here = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        yield ok("python", here)
    else:
        yield note("python", f"{here}: tested with 3.11 and 3.12")
    yield ok("packages", ", ".join(f"{name} {version}" for name, version in versions().items()))
    yield _apex()
    yield from _empty_transformer_engine()
    names = {str(distribution.metadata["Name"]).lower() for distribution in metadata.distributions()}
    if "psutil" not in names:
        yield wrong("psutil", "not installed: megatron-core's checkpoint writer hangs without it", "pip install psutil")


def _apex() -> Finding:
    """What PyPI calls apex is a web toolkit; with it installed megatron-core believes that NVIDIA's apex is there."""
    try:
        summary = str(metadata.metadata("apex")["Summary"])
    except metadata.PackageNotFoundError:
        return ok("apex", "not installed (optional; NVIDIA's apex is not on PyPI)")
    if "pyramid" in summary.lower() or "velruse" in summary.lower():
        return wrong("apex", "this is PyPI's apex, a web toolkit, not NVIDIA's", "pip uninstall apex")
    return ok("apex", "installed (optional)")


def _empty_transformer_engine() -> Iterator[Finding]:
    """The package of this name on PyPI only names others; without them its import raises what megatron-core does not catch."""
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return
    parts = [name for name in ("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13") if _has(name)]
    files = metadata.files("transformer-engine") or []
    if not parts and not any(str(file).endswith(".so") for file in files):
        yield wrong(
            "transformer-engine",
            f"{version} on PyPI is an empty shell, and megatron-core does not import beside it",
            "pip uninstall transformer-engine, or install mcore-longctx[te]",
        )


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def torch_found(found: Mapping[str, Any]) -> Iterator[Finding]:
    """torch, its devices and communication, and the attention kernel that would be chosen (`probes.TORCH`)."""
    if "error" in found:
        yield wrong("torch", str(found["error"]), _INSTALL if not _has("torch") else "reinstall torch")
        return
    gpus = found["gpus"]
    if gpus:
        size = readable_bytes(gpus[0]["bytes"])
        names = {gpu["name"] for gpu in gpus}
        yield ok("torch", f"{found['torch']}, CUDA {found['cuda']}, {len(gpus)} x {gpus[0]['name']} ({size} each)")
        if len(names) > 1:
            yield note("gpus", f"not all alike ({', '.join(sorted(names))}): the slowest sets the pace")
        if found["nccl"]:
            yield ok("nccl", str(found.get("nccl_version", "there")))
        else:
            yield wrong("nccl", "this build of torch has none", "install a CUDA build of torch")
    else:
        built = f" (a build for CUDA {found['built_for']})" if found.get("built_for") else ""
        yield ok("torch", f"{found['torch']}{built}, no GPU here: CPU and gloo")
        if not found["gloo"]:
            yield wrong("torch", "this build has no gloo", "install a build of torch with gloo")
    for _, _, reason in found["kernels"]:
        yield ok("attention", str(reason))


def megatron_found(found: Mapping[str, Any]) -> Iterator[Finding]:
    """megatron-core and TransformerEngine, as they import (`probes.MEGATRON`, or the answer of a model that was built)."""
    error = str(found.get("megatron_error", found.get("error", "")))
    if "megatron" in found:
        yield ok("megatron-core", str(found["megatron"]))
    elif "meta package" in error + str(found.get("te_error", "")):
        yield wrong(
            "megatron-core",
            "does not import beside the empty transformer-engine package of PyPI",
            "pip uninstall transformer-engine",
        )
    else:
        yield wrong("megatron-core", error, _INSTALL if not _has("megatron-core") else "reinstall megatron-core")
    if found.get("te"):
        yield ok("transformer-engine", f"{found['te']} (optional)")
    elif "te_error" in found:
        yield note("transformer-engine", f"installed but does not load: {found['te_error']}")
    else:
        yield ok("transformer-engine", "not installed (optional)")
