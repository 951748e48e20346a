"""Documents and chats become Megatron .bin/.idx samples, deterministically, with a record of what went in."""

from mcore_longctx.data.indexed import IndexedReader, IndexedWriter
from mcore_longctx.data.samples import PackedSamples
from mcore_longctx.data.sidecar import Run, Runs, read_runs

__all__ = ["IndexedReader", "IndexedWriter", "PackedSamples", "Run", "Runs", "read_runs"]
