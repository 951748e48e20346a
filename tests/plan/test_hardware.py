from pathlib import Path

import pytest
import yaml

from mcore_longctx.errors import ConfigError
from mcore_longctx.plan import hardware
from mcore_longctx.plan.hardware import find_gpu, known_gpus

OWN = Path(hardware.__file__).with_name("hardware.yaml")
FIGURES = {
    "peak_flops",
    "memory_bytes",
    "memory_bandwidth",
    "nvlink_bandwidth",
    "network_bandwidth",
    "pcie_bandwidth",
    "host_memory_bytes",
}


@pytest.mark.parametrize(
    ("name", "peak", "memory", "bandwidth", "nvlink"),
    [  # data sheets: dense bf16, decimal bytes, one direction
        ("h100-80gb", 989e12, 80e9, 3.35e12, 450e9),
        ("h200-141gb", 989e12, 141e9, 4.8e12, 450e9),
        ("b200-180gb", 2250e12, 180e9, 8.0e12, 900e9),
        ("a100-80gb", 312e12, 80e9, 2.0e12, 300e9),
    ],
)
def test_the_table_holds_the_data_sheets(name, peak, memory, bandwidth, nvlink):
    gpu = find_gpu(name)
    assert (gpu.peak_flops, gpu.memory_bytes, gpu.memory_bandwidth, gpu.nvlink_bandwidth) == (peak, memory, bandwidth, nvlink)


def test_every_figure_and_every_kernel_has_a_source():
    entries = yaml.safe_load(OWN.read_text())["gpus"]
    for name, entry in entries.items():
        given = FIGURES & set(entry) | ({"sustained"} & set(entry))
        assert given <= set(entry["sources"]), name
        assert all(kernel["source"] for kernel in entry.get("kernels", {}).values()), name
    assert all(gpu.source for gpu in known_gpus().values())


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("h100", "h100-80gb"),
        ("h200", "h200-141gb"),
        ("b200", "b200-180gb"),
        ("a100", "a100-80gb"),
        ("h800", "h800-80gb"),
        ("h100_500w", "h100-96gb-500w"),
        ("H100", "h100-80gb"),
    ],
)
def test_short_names(short, name):
    assert find_gpu(short).name == name


def test_an_unknown_gpu_names_the_nearest():
    with pytest.raises(ConfigError, match="no GPU 'h100-80g' in the hardware table; did you mean 'h100-80gb'"):
        find_gpu("h100-80g")


def test_a_power_limited_board_runs_its_kernels_slower():
    full, limited = find_gpu("h100"), find_gpu("h100_500w")
    assert limited.kernel("fa2").forward == pytest.approx(full.kernel("fa2").forward * limited.sustained)


def test_an_unknown_kernel_names_those_that_are_there():
    with pytest.raises(ConfigError, match=r"a100-80gb has no attention kernel 'fa3'; it has fa2"):
        find_gpu("a100").kernel("fa3")


def test_a_site_takes_a_gpu_over_and_gives_its_own_rates(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text(
        "gpus:\n"
        "  h100-80gb:\n    network_bandwidth: 25e9\n"
        "  ours:\n    like: h100-80gb\n    gpus_per_node: 4\n    default_kernel: measured\n"
        "    kernels: {measured: {forward: 610e12, backward: 500e12}}\n"
    )
    assert find_gpu("h100-80gb", site).network_bandwidth == 25e9
    ours = find_gpu("ours", site)
    assert (ours.gpus_per_node, ours.kernel().forward, ours.peak_flops) == (4, 610e12, 989e12)
    assert find_gpu("h100-80gb").network_bandwidth == 50e9  # the package's table stands as it was


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gpus:\n  x:\n    like: h100-80gb\n    peak_flop: 1e15\n",
            r"site\.yaml:4: gpus\.x\.peak_flop: unknown name; did you mean 'peak_flops'",
        ),
        (
            "gpus:\n  x:\n    like: h100-80gb\n    memory_bytes: -1\n",
            r"site\.yaml:\d: gpus\.x: memory_bytes is -1\.0, expected above 0",
        ),
        ("gpus:\n  x:\n    like: h100-80gb\n    memory_bytes: large\n", r"site\.yaml:4: gpus\.x\.memory_bytes: 'large' is not"),
        ("gpus:\n  x:\n    like: h1000\n", r"site\.yaml:2: gpus\.x\.like: no GPU 'h1000' above; did you mean 'h100"),
        ("gpus:\n  x:\n    peak_flops: 1e15\n", r"site\.yaml:2: gpus\.x: memory_bytes is missing"),
        ("gpus:\n  x:\n    like: h100-80gb\n    default_kernel: fa9\n", r"default_kernel 'fa9' is not one of its kernels"),
        ("gpus:\n  x:\n    like: h100-80gb\n    sustained: 1.2\n", r"sustained is 1\.2, expected at most 1"),
        ("gpus:\n  x:\n    like: h100-80gb\n    memory_bytes: .inf\n", r"not a finite number"),
        ("gpus: [1\n", r"not valid YAML"),
        ("", r"gpus: missing"),
    ],
)
def test_a_bad_site_file_is_one_clear_line(tmp_path, text, message):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        known_gpus(site)
    assert "\n" not in str(caught.value)


def test_a_site_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        known_gpus(tmp_path / "none.yaml")
