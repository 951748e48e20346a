"""Questions that only torch and megatron-core can answer, each asked in a process of its own.

An import that dies (an empty transformer-engine package takes megatron-core down) is then a finding and no crash, and the processes
run side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

__all__ = ["MEGATRON", "TORCH", "Probe"]

TORCH = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch
wanted = json.load(sys.stdin)
found = {"torch": torch.__version__, "gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
found["built_for"] = torch.version.cuda
found["gpus"] = []
if found["cuda"]:
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found["gpus"].append({"name": about.name, "bytes": about.total_memory, "capability": [about.major, about.minor]})
    if found["nccl"]:
        found["nccl_version"] = ".".join(str(part) for part in torch.cuda.nccl.version())
from mcore_longctx.kernels.attention import kernel_and_reason
device, found["kernels"] = torch.device("cuda" if found["cuda"] else "cpu"), []
for precision, head_dim in wanted["heads"]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    found["kernels"].append([precision, head_dim, kernel_and_reason(device, dtype, head_dim)[1]])
print(json.dumps(found))
"""

MEGATRON = """
import json, sys, warnings
warnings.filterwarnings("ignore")
found = {}
try:
    import transformer_engine.pytorch
    found["te"] = transformer_engine.__version__
except ImportError as error:
    if "transformer_engine" not in str(error):
        found["te_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
except Exception as error:
    found["te_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
try:
    import megatron.core
    found["megatron"] = megatron.core.__version__
except Exception as error:
    found["megatron_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 240  # seconds; cold imports from a network file system take minutes


class Probe:
    """A Python process that reads one JSON object and prints one. It starts at once; `answer` waits for it.

    A context manager: a process that nobody waited for is ended with the block.
    """

    def __init__(self, *python_arguments: str, question: Mapping[str, Any]) -> None:
        # alone, whatever launched the examination
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self._process = subprocess.Popen(
            [sys.executable, *python_arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
        )
        self._question = json.dumps(question)

    def answer(self) -> dict[str, Any]:
        """What it printed, or {"error": the last line that it said}."""
        try:
            printed, said = self._process.communicate(self._question, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"no answer within {_PATIENCE} s"}
        try:
            found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
        except (IndexError, ValueError):
            lines = said.strip().splitlines()
            return {"error": lines[-1] if lines else f"ended with code {self._process.returncode}"}
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process.wait()
