"""What `pretrain` is given: batches, datasets and loss, from a checkout's pretrain_gpt.py or from `own_program`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import MEGATRON_VERSION, quiet_import
from mcore_longctx.megatron_lm.own_program import datasets_provider, forward_step

__all__ = ["OWN_PROGRAM", "Program", "find_program"]

_FILE = "pretrain_gpt.py"
_VARIABLE = "MEGATRON_LM_PATH"


@dataclass(frozen=True)
class Program:
    """Arguments of Megatron-LM's `pretrain`, and the flags that go with them."""

    name: str
    datasets_provider: Callable[..., Any]
    forward_step: Callable[..., Any]
    embedding_ranks: Callable[..., Any] | None = None
    extra_args: Callable[..., Any] | None = None
    is_own: bool = False


OWN_PROGRAM = Program("mcore-longctx", datasets_provider, forward_step, is_own=True)


def find_program(argv: Sequence[str]) -> Program:
    """That of the checkout which the user names (`--megatron-lm`, MEGATRON_LM_PATH, PYTHONPATH), else the one of the wheel.

    Raises:
        ConfigError: no pretrain_gpt.py where one is named, or one of another version than megatron-core.
    """
    named, where = _named_folder(argv)
    if named is not None:
        folder = Path(named).expanduser()
        if not (folder / _FILE).is_file():
            raise ConfigError(f"there is no {_FILE} in {folder}", where=where, fix="give the folder of a Megatron-LM checkout")
    else:
        spec = importlib.util.find_spec("pretrain_gpt")
        if spec is None or spec.origin is None:
            return OWN_PROGRAM
        folder = Path(spec.origin).parent
    _check_version(folder)
    if named is not None:
        # behind everything that is installed: megatron.core and megatron.training stay those of the wheel
        sys.path.append(str(folder.resolve()))
    with quiet_import():
        module = importlib.import_module("pretrain_gpt")  # importing it runs nothing
    module.train_valid_test_datasets_provider.is_distributed = True
    return Program(
        str(folder / _FILE),
        module.train_valid_test_datasets_provider,
        module.forward_step,
        module.get_embedding_ranks,
        module.add_modelopt_args if getattr(module, "has_nvidia_modelopt", False) else None,
    )


def _named_folder(argv: Sequence[str]) -> tuple[str | None, str]:
    """The folder that the user names, and by what. The other flags are read later, by a parser that needs the program."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--megatron-lm", nargs="?")
    named = parser.parse_known_args(list(argv))[0].megatron_lm
    return (named, "--megatron-lm") if named else (os.environ.get(_VARIABLE) or None, _VARIABLE)


def _check_version(folder: Path) -> None:
    """Its functions change with each minor version, and it is given objects of the megatron-core that is installed."""
    info = folder / "megatron" / "core" / "package_info.py"
    found = dict(re.findall(r"^(MAJOR|MINOR) = (\d+)", info.read_text(), re.MULTILINE)) if info.is_file() else {}
    version = f"{found.get('MAJOR', '?')}.{found.get('MINOR', '?')}"
    if version != ".".join(MEGATRON_VERSION.split(".")[:2]):
        raise ConfigError(
            f"this Megatron-LM is of version {version}, the installed megatron-core of {MEGATRON_VERSION}",
            where=folder,
            fix=f"check out core_v{'.'.join(MEGATRON_VERSION.split('.')[:2])}.0, or leave it out: the wheel suffices",
        )
