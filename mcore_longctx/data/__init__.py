"""Documents and chats become Megatron .bin/.idx samples, deterministically, with a record of what went in."""

from mcore_longctx.data.files.indexed import IndexedReader, IndexedWriter
from mcore_longctx.data.files.sidecar import Run, Runs, read_runs
from mcore_longctx.data.samples import PackedSamples

__all__ = ["IndexedReader", "IndexedWriter", "PackedSamples", "Run", "Runs", "read_runs"]
