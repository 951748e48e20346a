"""What this machine can run, and the traps that are known to stop people. torch is asked in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from mcore_longctx.manifest import versions

__all__ = ["Finding", "examine"]

# One process, so that an import that dies (a broken TransformerEngine takes megatron-core down) is a finding, not a crash.
_PROBE = """
import json, warnings
warnings.filterwarnings("ignore")
found = {}
import torch
found["torch"] = torch.__version__
found["threads"] = torch.get_num_threads()
found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found["cuda"] else []
found["nccl"] = torch.distributed.is_nccl_available()
found["gloo"] = torch.distributed.is_gloo_available()
try:
    import megatron.core
    found["megatron"] = megatron.core.__version__
except Exception as error:
    found["megatron_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
try:
    import transformer_engine.pytorch
    found["te"] = transformer_engine.__version__
except ImportError:
    pass
except Exception as error:
    found["te_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the examination. `level` is `ok`, `note` or `wrong`."""

    level: str
    subject: str
    text: str


def examine() -> list[Finding]:
    """Look at Python, packages, torch, megatron-core, TransformerEngine, apex and the machine."""
    findings = [Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")]
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        findings.append(Finding("note", "python", "tested with 3.11 and 3.12"))
    installed = versions()
    findings.append(Finding("ok", "packages", ", ".join(f"{name} {version}" for name, version in installed.items())))
    findings += _torch_findings(_ask_torch(), installed)
    findings += _apex_findings()
    if "psutil" not in {name.lower() for name in _distributions()}:
        findings.append(
            Finding("wrong", "psutil", "not installed: megatron-core's checkpoint writer hangs without it; pip install psutil")
        )
    findings.append(
        Finding("ok", "machine", f"{os.cpu_count()} CPU cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}")
    )
    if "SLURM_JOB_ID" in os.environ:
        findings.append(Finding("ok", "slurm", f"inside job {os.environ['SLURM_JOB_ID']}: `run` starts its ranks with srun"))
    return findings


def _ask_torch() -> Mapping[str, Any]:
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=300)
    try:
        answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        lines = result.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {result.returncode}"}
    return answer


def _torch_findings(found: Mapping[str, Any], installed: Mapping[str, str]) -> list[Finding]:
    if "error" in found:
        fix = "pip install 'mcore-longctx[train]'" if "torch" not in installed else "reinstall torch"
        return [Finding("wrong", "torch", f"{found['error']}; {fix}")]
    device = f"CUDA {found['cuda']}, {len(found['gpus'])} x {found['gpus'][0]}, NCCL" if found["gpus"] else "no GPU: CPU and gloo"
    findings = [Finding("ok", "torch", f"{found['torch']}, {device}")]
    if not (found["nccl"] if found["gpus"] else found["gloo"]):
        findings.append(Finding("wrong", "torch", "this build has no NCCL" if found["gpus"] else "this build has no gloo"))
    if "megatron" in found:
        findings.append(Finding("ok", "megatron-core", found["megatron"]))
    elif "meta package" in found.get("te_error", "") + found.get("megatron_error", ""):
        text = "the transformer-engine package on PyPI is an empty shell and takes megatron-core down; pip uninstall transformer-engine"
        findings.append(Finding("wrong", "megatron-core", text))
    else:
        findings.append(Finding("wrong", "megatron-core", f"{found.get('megatron_error')}; pip install 'mcore-longctx[train]'"))
    if "te" in found:
        findings.append(Finding("ok", "transformer-engine", f"{found['te']} (optional)"))
    elif "te_error" in found:
        findings.append(Finding("note", "transformer-engine", f"installed but does not load: {found['te_error']}"))
    else:
        findings.append(Finding("ok", "transformer-engine", "not installed (optional)"))
    return findings


def _apex_findings() -> list[Finding]:
    """What PyPI calls apex is a web toolkit; with it installed megatron-core believes that NVIDIA's apex is there."""
    try:
        summary = str(metadata.metadata("apex")["Summary"])
    except metadata.PackageNotFoundError:
        return [Finding("ok", "apex", "not installed (optional; NVIDIA's apex is not on PyPI)")]
    if "pyramid" in summary.lower() or "velruse" in summary.lower():
        return [Finding("wrong", "apex", "this is PyPI's apex, a web toolkit, not NVIDIA's; pip uninstall apex")]
    return [Finding("ok", "apex", "installed (optional)")]


def _distributions() -> list[str]:
    return [str(distribution.metadata["Name"]) for distribution in metadata.distributions()]
