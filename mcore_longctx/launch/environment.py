"""The environment of a job: what is set, and why."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_longctx.recipe import ClusterSection

__all__ = ["environment_lines"]

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
        "up to Hopper: communication that is launched first runs first",
    ),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "no memory is lost between blocks of many sizes"),
    ("NCCL_NVLS_ENABLE", "0", "its buffers take memory that 1M to 4M tokens need"),
    ("NCCL_IB_TIMEOUT", "22", "a link that flaps for a minute does not end the job"),
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


def environment_lines(cluster: ClusterSection) -> Iterator[str]:
    """Lines `export NAME="${NAME:-value}"  # reason`; names that the recipe sets itself are left to it."""
    on_gpu = cluster.gpu != "none"
    rows = [row for row in _BOTH + (_GPU if on_gpu else _CPU) if row[0] not in cluster.environment]
    for name, value, reason in rows:
        yield f'export {name}="${{{name}:-{value}}}"  # {reason}'
    yield _SITE[on_gpu]
