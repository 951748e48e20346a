"""`doctor` on a machine: each trap is planted, and named with its cure."""

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcore_longctx.launch import doctor
from mcore_longctx.launch.doctor import Finding, environment, libraries, machine
from mcore_longctx.launch.doctor.probes import MEGATRON, TORCH, Probe

ROOT = Path(__file__).parents[2]


def texts(findings: Iterable[Finding], level: str) -> dict[str, str]:
    return {finding.subject: f"{finding.text}; {finding.fix}" for finding in findings if finding.level == level}


def package(folder: Path, name: str, version: str, summary: str, code: str | None = None) -> None:
    """What pip leaves of a package: its record and, with `code`, a module that runs it."""
    record = folder / f"{name}-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\nSummary: {summary}\n"
    )
    (record / "RECORD").write_text("")
    if code is not None:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)


def answer(code: str, **question: Any) -> dict[str, Any]:
    with Probe("-c", code, question=question) as probe:
        return probe.answer()


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return doctor.examine()


def test_this_machine_is_fit(findings: list[Finding]) -> None:
    assert not texts(findings, "wrong")
    assert {"python", "torch", "attention", "megatron-core", "apex", "host memory", "environment"} <= texts(findings, "ok").keys()


def test_the_kernel_is_the_one_that_the_rule_chooses(findings: list[Finding]) -> None:
    import torch

    from mcore_longctx.kernels.attention import choose_kernel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = getattr(choose_kernel(device, torch.bfloat16, 128), "name", "")
    assert f"kernel {name} for bfloat16 heads of 128" in texts(findings, "ok")["attention"]


def test_a_fault_has_a_fix() -> None:
    with pytest.raises(ValueError, match="without its fix"):
        Finding("wrong", "x", "y")


def test_a_probe_that_nobody_waits_for_ends_with_its_block() -> None:
    with Probe("-c", "import time; time.sleep(60)", question={}) as probe:
        process = probe._process
    assert process.returncode == -9


# ---------------------------------------------------------------------------------------------------------------------- libraries


def test_the_apex_of_pypi_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "apex", "0.9.10.dev0", "Pyramid toolkit to add Velruse, Flash Messages, CSRF, ReCaptcha and Sessions")
    monkeypatch.syspath_prepend(tmp_path)
    assert "pip uninstall apex" in texts(libraries.installed(), "wrong")["apex"]


def test_an_apex_of_nvidia_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "apex", "0.1", "PyTorch Extensions written by NVIDIA")
    monkeypatch.syspath_prepend(tmp_path)
    assert "installed" in texts(libraries.installed(), "ok")["apex"]


def test_the_empty_transformer_engine_is_named_by_its_record_and_by_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "Found empty `transformer-engine` meta package installed."
    package(tmp_path, "transformer_engine", "2.20.2", "Transformer acceleration library", f"raise RuntimeError({message!r})")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    wrong = texts(libraries.megatron_found(answer(MEGATRON)), "wrong")
    assert "pip uninstall transformer-engine" in wrong["megatron-core"]
    monkeypatch.syspath_prepend(tmp_path)
    assert "empty shell" in texts(libraries.installed(), "wrong")["transformer-engine"]


def test_a_transformer_engine_with_a_library_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "transformer_engine", "2.20.2", "Transformer acceleration library")
    package(tmp_path, "transformer_engine_torch", "2.20.2", "Transformer acceleration library - Torch Lib")
    monkeypatch.syspath_prepend(tmp_path)
    assert "transformer-engine" not in texts(libraries.installed(), "wrong")


def test_a_missing_psutil_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [d for d in libraries.metadata.distributions() if str(d.metadata["Name"]).lower() != "psutil"]
    monkeypatch.setattr(libraries.metadata, "distributions", lambda: kept)
    assert "pip install psutil" in texts(libraries.installed(), "wrong")["psutil"]


def test_a_missing_torch_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    found = answer(TORCH, heads=[])
    assert "No module named 'torch'; reinstall torch" in texts(libraries.torch_found(found), "wrong")["torch"]


def test_a_gpu_without_nccl_is_a_fault_and_a_cpu_without_gloo_too() -> None:
    gpu = {"name": "H100", "bytes": 80 * 10**9, "capability": [9, 0]}
    found = {"torch": "2", "cuda": "13.0", "built_for": "13.0", "gpus": [gpu], "nccl": False, "gloo": True, "kernels": []}
    assert "nccl" in texts(libraries.torch_found(found), "wrong")
    assert "H100" in texts(libraries.torch_found(found), "ok")["torch"]
    found |= {"cuda": None, "gpus": [], "gloo": False}
    assert "no gloo" in texts(libraries.torch_found(found), "wrong")["torch"]


# -------------------------------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "wrong"),
        ("NCCL_BLOCKING_WAIT", "1", "wrong"),
        ("CUDA_LAUNCH_BLOCKING", "1", "wrong"),
        ("NCCL_P2P_DISABLE", "1", "wrong"),
        ("NCCL_IB_DISABLE", "1", "wrong"),
        ("NCCL_TIMEOUT", "3600", "note"),
        ("NCCL_DEBUG", "TRACE", "note"),
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "60", "note"),
    ],
)
def test_a_variable_that_harms_is_named(name: str, value: str, level: str) -> None:
    assert name in texts(environment.variables({name: value}, nodes=2), level)["environment"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        ("NCCL_DEBUG", "WARN"),
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "900"),
        ("NCCL_ALGO", ""),
    ],
)
def test_a_variable_that_does_not_is_not(name: str, value: str) -> None:
    assert [finding.level for finding in environment.variables({name: value}, nodes=2)] == ["ok"]


def test_infiniband_may_be_off_on_one_node() -> None:
    assert not texts(environment.variables({"NCCL_IB_DISABLE": "1"}, nodes=1), "wrong")


@pytest.mark.parametrize(
    ("variable", "value", "is_there"),
    [
        ("NCCL_SOCKET_IFNAME", "ib", True),
        ("NCCL_SOCKET_IFNAME", "=ib", False),
        ("NCCL_SOCKET_IFNAME", "eth,ens", True),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "bond0", False),
        ("GLOO_SOCKET_IFNAME", "ib0", True),
        ("GLOO_SOCKET_IFNAME", "ib", False),
    ],
)
def test_an_interface_that_is_named_must_exist(tmp_path: Path, variable: str, value: str, is_there: bool) -> None:
    for name in ("lo", "ens3", "ib0"):
        (tmp_path / "sys/class/net" / name).mkdir(parents=True)
    wrong = texts(environment.variables({variable: value}, root=tmp_path), "wrong")
    assert bool(wrong) is not is_there


# ------------------------------------------------------------------------------------------------------------------------ machine


def made_up_memory(root: Path, *, available: int, cgroup: str, limits: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999999999 kB\nMemAvailable: {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in limits.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return root


def test_the_limit_of_a_job_bounds_the_memory_of_its_machine(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/job/step/memory.max": "max", "sys/fs/cgroup/job/memory.max": str(64 << 30)}
    root = made_up_memory(tmp_path, available=512 << 30, cgroup="0::/job/step\n", limits=limits)
    assert machine.host_memory(root) == (64 << 30, 64 << 30)
    needed = 100e9
    assert "raise the memory of the job" in texts([machine.memory_found(needed, root=root)], "wrong")["host memory"]
    assert machine.memory_found(needed, root=root, only_here=False).level == "note"
    assert machine.memory_found(60e9, root=root).level == "ok"
    assert machine.memory_found(63e9, root=root).level == "wrong"  # above nine tenths


def test_control_groups_of_version_1_are_read_and_no_limit_is_none(tmp_path: Path) -> None:
    cgroup = "5:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm\n"
    limits = {"sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": str(32 << 30)}
    assert machine.host_memory(made_up_memory(tmp_path / "a", available=512 << 30, cgroup=cgroup, limits=limits))[1] == 32 << 30
    limits = {"sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "9223372036854771712"}
    root = made_up_memory(tmp_path / "b", available=512 << 30, cgroup=cgroup, limits=limits)
    assert machine.host_memory(root) == (512 << 30, 0)


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB at tmp_path/dev/shm."""
    folder = tmp_path / "dev/shm"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_shared_memory_stops_ranks_on_gpus(small_file_system: Path) -> None:
    root = small_file_system.parents[1]
    assert "--ipc=host" in texts([machine.shared_memory(8, on_gpus=True, root=root)], "wrong")["/dev/shm"]
    assert machine.shared_memory(8, on_gpus=False, root=root).level == "note"


def test_a_missing_shared_memory_is_a_fault(tmp_path: Path) -> None:
    assert machine.shared_memory(1, on_gpus=False, root=tmp_path).level == "wrong"


def test_few_open_files_and_locked_memory_beside_infiniband_are_named(tmp_path: Path) -> None:
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    code = (
        "import resource; from pathlib import Path; from mcore_longctx.launch.doctor.machine import limits\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)); resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        f"print([(f.level, f.subject, f.fix) for f in limits(root=Path({str(tmp_path)!r}))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    levels = {subject: (level, fix) for level, subject, fix in ast.literal_eval(result.stdout)}
    assert levels["ulimit nofile"][0] == levels["ulimit memlock"][0] == "wrong"
    assert "ulimit -n 4096" in levels["ulimit nofile"][1]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 512


def test_a_clock_that_is_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.clock(tmp_path).level == "ok"
    true_time = machine.time.time
    monkeypatch.setattr(machine.time, "time", lambda: true_time() + 3600)
    assert "chrony" in texts([machine.clock(tmp_path)], "wrong")["clock"]


def test_a_run_folder_that_cannot_be_written_is_named() -> None:
    assert machine.clock(Path("/proc")).level == "wrong"


def test_a_missing_sbatch_is_worth_a_note_to_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert machine.slurm(wanted=True).level == "note"
    assert machine.slurm(wanted=False).level == "ok"
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert machine.slurm(wanted=True).text == str(tmp_path / "sbatch")
