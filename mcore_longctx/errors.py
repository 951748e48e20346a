"""Errors that end in one clear line: what is wrong, where, and how to fix it.

LongctxError                exit code 2: bad input or usage (a launcher must not requeue it)
|-- ConfigError             a recipe, a config.json or a command line
|-- LayoutError             sizes that do not divide: heads, sequence, ranks
|-- DataError               documents, tokenizers, .bin/.idx files
|-- CheckpointError         a checkpoint that is missing, damaged or belongs to something else
|-- ConversionError         tensors that do not map
|-- InUseError              another process works on the same folder
|-- DifferenceFound         exit code 1: a check ran and found a difference
|-- StorageError            exit code 1: disk full or a device that failed while writing; run again to go on
|-- TrainingError           exit code 1: training cannot go on (NaN, no space left while saving)
|-- NoProgress              exit code 3: stop the chain of jobs
`-- StoppedBySignal         exit code 75: stopped on a signal with a checkpoint saved; requeue
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "DataError",
    "DifferenceFound",
    "InUseError",
    "LayoutError",
    "LongctxError",
    "NoProgress",
    "StoppedBySignal",
    "StorageError",
    "TrainingError",
]


class LongctxError(Exception):
    """One line for the user. `str(error)` is `where: what; fix`."""

    exit_code = 2
    agreed = False  # set where every rank of a job raises the same: then one of them speaks

    def __init__(self, what: str, *, where: object = None, fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f"{where}: " if where is not None else ""
        super().__init__(place + what + (f"; {fix}" if fix else ""))


class ConfigError(LongctxError):
    """A recipe, a config.json or a command line holds something that cannot be used."""


class LayoutError(LongctxError):
    """Sizes that do not divide: heads by TP, sequence length by 2 x CP, ranks by the layout."""


class DataError(LongctxError):
    """Documents, tokenizers or packed data that cannot be read."""


class CheckpointError(LongctxError):
    """A checkpoint that is missing, damaged, or belongs to another model or rope."""


class ConversionError(LongctxError):
    """Tensors of one format that have no place in the other."""


class InUseError(LongctxError):
    """Another process works on the same folder."""


class DifferenceFound(LongctxError):
    """A check ran to its end and found a difference."""

    exit_code = 1


class StorageError(LongctxError):
    """The disk is full or a device failed while an output was written; nothing that looks finished is left."""

    exit_code = 1


class TrainingError(LongctxError):
    """Training cannot go on."""

    exit_code = 1


class NoProgress(LongctxError):
    """Nothing moved forward since the last start: whoever requeues must stop."""

    exit_code = 3


class StoppedBySignal(LongctxError):
    """Stopped on SIGTERM or SIGUSR1 with a checkpoint saved."""

    exit_code = 75
