"""Rows of Parquet files, read column by column in small batches. pyarrow is imported when the first such file is met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_longctx.data.documents.lines import BLOCK, Tally, optional_module
from mcore_longctx.errors import DataError

__all__ = ["BadText", "column_names", "read_rows", "row_count", "row_group_ranges"]

_BATCH_BYTES = 1 << 23  # of values that are unpacked at once, by the mean of the file
_BATCH_ROWS = 1024


class BadText:
    """Stands for a string that is not UTF-8."""

    def __init__(self, error: UnicodeDecodeError) -> None:
        self.what = f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start:,} of the value"


def row_group_ranges(path: Path, range_bytes: int) -> list[tuple[int, int, int]]:
    """Ranges of row groups of about `range_bytes` in the file: (first, past the last, bytes).

    Raises:
        DataError: no Parquet file, or pyarrow is not installed.
    """
    ranges, first, size = [], 0, 0
    with _opened(path) as file:
        groups = file.metadata.num_row_groups
        for group in range(groups):
            start, stop = _span(file.metadata.row_group(group))
            size += stop - start
            if size >= range_bytes or group == groups - 1:
                ranges.append((first, group + 1, size))
                first, size = group + 1, 0
    return ranges


def column_names(path: Path) -> list[str]:
    """Names of the columns. Errors as in `row_group_ranges`."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def row_count(path: Path) -> int:
    """Rows of the file. Errors as in `row_group_ranges`."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def read_rows(path: Path, start: int, stop: int, columns: Sequence[str], tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number in the file (from 1) and values of every row of row groups start..stop-1. `tally` takes the bytes of the groups.

    A string that is not UTF-8 comes as `BadText`. Errors as in `row_group_ranges`.
    """
    with _opened(path) as file:
        meta = file.metadata
        groups = [meta.row_group(group) for group in range(start, stop)]
        rows = sum(group.num_rows for group in groups)
        mean = sum(group.total_byte_size for group in groups) // max(rows, 1)
        number = sum(meta.row_group(group).num_rows for group in range(start))
        _take(path, [_span(group) for group in groups], tally)
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(mean, 1)))
        for batch in file.iter_batches(batch_rows, row_groups=range(start, stop), columns=list(columns), use_threads=False):
            values = {name: _values(batch.column(name)) for name in columns}
            for row in range(batch.num_rows):
                number += 1
                yield number, {name: column[row] for name, column in values.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        parquet, arrow = optional_module("pyarrow.parquet"), optional_module("pyarrow")
    except DataError as error:
        raise DataError(error.what, where=path, fix=error.fix) from None
    try:
        # buffer_size: pages are read one after the other, not a whole column of a row group
        with parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"cannot be read as Parquet ({reason})", where=path, fix="copy or write it again") from None


def _span(group: Any) -> tuple[int, int]:
    """Bytes of a row group in the file: start, stop."""
    starts, stops = [], []
    for index in range(group.num_columns):
        column = group.column(index)
        offsets = [column.data_page_offset]
        if column.has_dictionary_page and column.dictionary_page_offset:
            offsets.append(column.dictionary_page_offset)
        starts.append(min(offsets))
        stops.append(min(offsets) + column.total_compressed_size)
    return min(starts, default=0), max(stops, default=0)


def _take(path: Path, spans: Sequence[tuple[int, int]], tally: Tally) -> None:
    block = bytearray(BLOCK)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        for start, stop in spans:
            at = file.seek(start)
            while at < stop and (count := file.readinto(view[: stop - at])):
                tally.add(view[:count])
                at += count


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BadText(error)
