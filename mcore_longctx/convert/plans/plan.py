"""What a conversion will write: files of known size, their small bytes, and regions to fill from rows of a checkpoint.

A plan is made from headers alone and holds no weights. It is a function of the sources' headers and the settings, and the
output is a function of the plan: any number of workers, in any order, killed and started again, gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.convert.views import TensorRows
from mcore_longctx.formats.dtypes import DType

__all__ = ["Blend", "Fill", "Plan", "Scales", "SourceFile", "TargetFile", "first_rows"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that is read, as it was when the plan was made: a run that goes on later refuses one that has changed since."""

    path: Path
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file of the output that holds weights. It is made with its full size; what nobody writes stays zero (a hole)."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Blend:
    """A weighted sum of tensors of one shape, made in float32 (`convert merge`)."""

    parts: tuple[tuple[TensorRows, float], ...]


def first_rows(source: TensorRows | Blend) -> TensorRows:
    """The tensor itself, or the first of a blend, which gives it shape and element type."""
    return source.parts[0][0] if isinstance(source, Blend) else source


@dataclass(frozen=True, slots=True)
class Scales:
    """Where the scales go when rows are quantised: float32, one after the other from byte `offset` of `file`.

    The first is that of the fill's first row. A region of its own: no fill and nothing small overlaps it.
    """

    file: int
    offset: int


@dataclass(frozen=True, slots=True)
class Fill:
    """A box of a tensor, written row-major without gaps from byte `offset` of target file `file`.

    Attributes:
        file: index into `Plan.files`.
        offset: of the first element.
        source: where the elements come from.
        row, rows: rows [row, row + rows) of the source.
        column, columns: columns [column, column + columns) of each; all of them for a vector (0, 1).
        dtype: what is written. The source's own: bytes are copied. Another: cast, rounding to nearest even.
        scales: float8_e4m3fn only: each row is divided by its scale (its largest magnitude / 448) before it is rounded.
        name: of the tensor, for messages and reports.
    """

    file: int
    offset: int
    source: TensorRows | Blend
    row: int
    rows: int
    column: int
    columns: int
    dtype: DType
    name: str
    scales: Scales | None = None

    @property
    def bytes(self) -> int:
        """Size of the region."""
        return self.rows * self.columns * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """See the module.

    Attributes:
        kind: `import`, `export` or `merge`.
        settings: all that decides the output beside the sources, as JSON values.
        sources: every file that is read, weights and settings.
        files: the weight files of the output.
        fills: in order of (file, offset); no two overlap.
        small: call it for (file index, offset, bytes) of everything else in `files`: headers, frames of items.
    """

    kind: str
    settings: Mapping[str, Any]
    sources: tuple[SourceFile, ...]
    files: tuple[TargetFile, ...]
    fills: tuple[Fill, ...]
    small: Callable[[], Iterator[tuple[int, int, bytes]]]

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.bytes for file in self.files)
