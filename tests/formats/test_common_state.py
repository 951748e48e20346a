"""The common state as plain values: nothing is imported, everything is bounded."""

from __future__ import annotations

import argparse
import collections
import enum
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore_longctx.errors import CheckpointError
from mcore_longctx.formats.common_state import read_common_state
from tests.convert.fuzz import mutations, only_our_errors


class Colour(enum.Enum):
    RED = "red"


def written(folder: Path, value: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / "common.pt")
    return folder


STATE = {
    "args": argparse.Namespace(
        num_layers=4, norm_epsilon=1e-5, params_dtype=torch.bfloat16, colour=Colour.RED, betas=(0.9, 0.95)
    ),
    "ordered": collections.OrderedDict(a=1, b=[2, None, True]),
    "default": collections.defaultdict(list, {"x": [1]}),
    "tensor": torch.zeros(3),
    "function": math.sqrt,
    "iteration": 7,
    "large": 1 << 80,
}


def test_namespaces_and_dicts_are_dicts_and_the_rest_is_named(tmp_path: Path) -> None:
    shown = read_common_state(written(tmp_path / "ck", STATE))
    assert shown == {
        "args": {
            "num_layers": 4,
            "norm_epsilon": 1e-5,
            "params_dtype": "bfloat16",
            "colour": "not shown (tests.formats.test_common_state.Colour)",
            "betas": (0.9, 0.95),
        },
        "ordered": {"a": 1, "b": [2, None, True]},
        "default": {"x": [1]},
        "tensor": "not shown (torch._utils._rebuild_tensor_v2)",
        "function": "not shown (math.sqrt)",
        "iteration": 7,
        "large": 1 << 80,
    }
    json.dumps(shown)


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    from tests.formats.test_dcp import written as torch_dist_folder

    folder = torch_dist_folder(tmp_path / "ck")
    (folder / "common.pt").unlink()
    assert read_common_state(folder) is None


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def test_what_would_run_is_only_named(tmp_path: Path) -> None:
    shown = read_common_state(written(tmp_path / "ck", {"a": RunsCode(tmp_path / "ran")}))
    assert shown == {"a": "not shown (posix.mkdir)"}
    assert not (tmp_path / "ran").exists()


def test_a_small_file_that_describes_a_tree_without_end_is_cut_off(tmp_path: Path) -> None:
    tree: list[Any] = [1]
    for _ in range(15):
        tree = [tree] * 10
    circle: list[Any] = []
    circle.append(circle)
    shown = read_common_state(written(tmp_path / "ck", {"tree": tree, "circle": circle}))
    assert shown is not None
    assert "not shown (too much)" in str(shown["tree"])
    assert "not shown (too much)" in str(shown["circle"])


def test_damaged_files_give_only_our_errors(tmp_path: Path) -> None:
    folder = written(tmp_path / "ck", STATE)
    data = (folder / "common.pt").read_bytes()
    refused = 0
    for damaged in mutations(data, 1000, seed=9):
        (folder / "common.pt").write_bytes(damaged)
        refused += only_our_errors(lambda: read_common_state(folder))
    assert refused > 300
    shutil.copyfile(__file__, folder / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt: the common state has no zip directory"):
        read_common_state(folder)


def test_memory_is_bounded_by_the_size_of_the_file(tmp_path: Path) -> None:
    """1,000 damaged pickles in a process that may not have more than 1 GiB."""
    program = f"""
import resource, random, sys
from mcore_longctx.formats.pickle_data import decode, PickleError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from tests.convert.fuzz import mutations
from mcore_longctx.formats.common_state import _AnyName
data = open({str(tmp_path / "pickle")!r}, "rb").read()
for damaged in mutations(data, 1000, seed=10):
    try:
        decode(damaged, _AnyName())
    except PickleError:
        pass
print("ended")
"""
    (tmp_path / "pickle").write_bytes(pickle.dumps(STATE["ordered"], 4))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert found.stdout == "ended\n", found.stderr[-2000:]
