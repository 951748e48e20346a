"""The environment of a job: what is set, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe import ClusterSection

__all__ = ["check_names", "environment_lines"]

_BOTH = (
    ("PYTHONUNBUFFERED", "1", "lines appear in the log when they are written"),
    ("TOKENIZERS_PARALLELISM", "false", "no threads of tokenizers beside forked workers"),
    ("HF_HUB_OFFLINE", "1", "hundreds of ranks must not ask the network for files"),
)
_GPU = (
    ("OMP_NUM_THREADS", "4", "torchrun sets 1; the ranks of a node share its cores"),
    (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "up to Hopper: the communication kernel, launched first, runs before the GEMM that it overlaps with",
    ),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "no memory lost between blocks: activations here are of many sizes"),
    ("NCCL_NVLS_ENABLE", "0", "NVLink SHARP keeps buffers on the GPU that 1M to 4M tokens need"),
    ("NCCL_IB_TIMEOUT", "22", "InfiniBand retries for a minute: a link that flaps does not end the job"),
    ("NCCL_P2P_NET_CHUNKSIZE", "2097152", "larger pieces for the key/value ring between nodes"),
    ("TORCH_NCCL_AVOID_RECORD_STREAMS", "1", "tensors of collectives are freed in time"),
    ("TORCH_NCCL_HIGH_PRIORITY", "1", "collectives go first where both could run"),
    ("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000", "flight recorder: after a hang it tells which rank was late"),
    ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and is written down when a collective times out"),
    ("TRITON_CACHE_DIR", "/tmp/triton-$SLURM_JOB_ID", "on the node: a shared cache is written by all nodes at once"),
)
_CPU = (
    ("OMP_NUM_THREADS", "1", "torchrun sets 1 too; raise it where a rank has more cores"),
    ("CUDA_VISIBLE_DEVICES", "", "ranks on CPUs: GPUs of the node, if any, are left alone"),
)
_SITE = {
    True: "# SITE: NCCL_SOCKET_IFNAME, NCCL_IB_HCA: only where NCCL picks the wrong interface.",
    False: "# SITE: GLOO_SOCKET_IFNAME: the interface between the nodes, where the host name leads to another one.",
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = ("*TOKEN*", "*KEY*", "*SECRET*", "*PASSWORD*")


def environment_lines(cluster: ClusterSection) -> Iterator[str]:
    """Lines `export NAME="${NAME:-value}"  # reason`; names that the recipe sets itself are left to it."""
    on_gpu = cluster.gpu != "none"
    rows = [row for row in _BOTH + (_GPU if on_gpu else _CPU) if row[0] not in cluster.environment]
    lines = [(f'export {name}="${{{name}:-{value}}}"', reason) for name, value, reason in rows]
    width = max((len(line) for line, _ in lines), default=0)
    for line, reason in lines:
        yield f"{line:<{width}}  # {reason}"
    yield _SITE[on_gpu]


def check_names(cluster: ClusterSection) -> None:
    """Refuse names that no shell takes, and values that look like secrets: what is written down is read by others.

    Raises:
        ConfigError: the name of the variable, never its value.
    """
    for where, names in (("cluster.environment", cluster.environment), ("cluster.secrets", cluster.secrets)):
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} is no name of a variable", where=where, fix="use letters, digits and _")
    for name in cluster.environment:
        if any(fnmatchcase(name.upper(), pattern) for pattern in _SECRET):
            raise ConfigError(
                f"{name} looks like a secret, and its value would be written into scripts and logs",
                where="cluster.environment",
                fix=f"export it before sbatch and list its name: cluster.secrets: [{name}]",
            )
