"""What a folder of FP8 weights says about itself: `quantization_config` of config.json and `quantize_report.json`.

The format is compressed-tensors' `float-quantized`, strategy `channel`: a weight [out, in] of float8_e4m3fn and beside it
`<name>_scale` [out, 1] float32, activations scaled per token at run time, so that nothing is calibrated. transformers (with
compressed-tensors), vLLM, SGLang and TensorRT-LLM read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.convert.copying.execute import QuantizedRows
from mcore_longctx.errors import ConversionError
from mcore_longctx.families import ModelShape, hf_shapes, model_tensors
from mcore_longctx.formats.safetensors_io import read_header

__all__ = ["MAX_RELATIVE_RMS", "QUANTIZE_REPORT", "quantization_config", "quantized_weights", "write_quantize_report"]

QUANTIZE_REPORT = "quantize_report.json"
# Rounding to E4M3 is wrong by at most 1/17 = 0.059 of a number (a tie at the foot of a power of two), and by 0.026 for the
# weights of real and random models: what lies above was not rounded, it was damaged, or too small for any scale.
MAX_RELATIVE_RMS = 0.06


def quantized_weights(shape: ModelShape) -> frozenset[str]:
    """Hugging Face names of the weights that become FP8: the linear layers; embedding, head, norms and biases stay."""
    linear = [tensor for tensor in model_tensors(shape) if tensor.columns is not None and not tensor.is_vocabulary]
    return frozenset(hf_shapes(linear))


def quantization_config() -> dict[str, Any]:
    """`quantization_config` for config.json of a folder whose `quantized_weights` are float8_e4m3fn with a scale a row.

    Source: `QuantizationConfig` of compressed-tensors 0.20; the keys that vLLM 0.33 and transformers 4.57 read.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],  # there also when the head is tied: the module is a Linear all the same
    }


def write_quantize_report(folder: Path, facts: Iterable[QuantizedRows]) -> None:
    """Write `quantize_report.json` into a folder whose weight files are complete, and refuse what quantising has damaged.

    For each tensor: rows, largest magnitude before, and the root mean square of (scale x quantised - weight) over that of the
    weight. The text does not depend on the order of `facts`.

    Args:
        folder: with the safetensors files; the rows in `facts` must be all rows of their FP8 tensors.
        facts: what quantising bands of rows did.

    Raises:
        ConversionError: a tensor with a relative error above MAX_RELATIVE_RMS, or one of which `facts` lacks rows.
    """
    bands: dict[str, list[QuantizedRows]] = {}
    for fact in facts:
        bands.setdefault(fact.name, []).append(fact)
    _check_rows(folder, {name: sum(band.rows for band in parts) for name, parts in bands.items()})
    tensors = {name: _summary(bands[name]) for name in sorted(bands)}
    if bad := [name for name, row in tensors.items() if not row["relative_rms"] <= MAX_RELATIVE_RMS]:
        worst = max(bad, key=lambda name: tensors[name]["relative_rms"])
        raise ConversionError(
            f"{tensors[worst]['relative_rms']:.3g} relative error of {worst} in fp8, more than {MAX_RELATIVE_RMS}"
            + (f"; {len(bad)} tensors are above it" if len(bad) > 1 else ""),
            where=folder,
            fix="its weights are too small for fp8 or damaged; export without --quantize",
        )
    report = {
        "format": 1,
        "weights": "float8_e4m3fn, one float32 scale per output row (largest magnitude / 448), rounded to nearest even",
        "activations": "scaled per token at run time, nothing calibrated",
        "max_relative_rms": MAX_RELATIVE_RMS,
        "total": {"tensors": len(tensors), **_summary([band for parts in bands.values() for band in parts])},
        "tensors": tensors,
    }
    (folder / QUANTIZE_REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _summary(bands: Iterable[QuantizedRows]) -> dict[str, Any]:
    """Rows, amax and relative RMS. `fsum` rounds once, so bands may come in any order."""
    bands = list(bands)
    squared = math.fsum(band.squared for band in bands)
    error = math.fsum(band.squared_error for band in bands)
    return {
        "rows": sum(band.rows for band in bands),
        "amax": max((band.amax for band in bands), default=0.0),
        "relative_rms": float(f"{math.sqrt(error / squared) if squared else 0.0:.6g}"),
    }


def _check_rows(folder: Path, rows: Mapping[str, int]) -> None:
    """Raise unless `rows` counts each row of each FP8 tensor of the folder once: a report of half a tensor would prove nothing."""
    stored: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= {name: tensor.shape[0] for name, tensor in read_header(path).items() if tensor.dtype.safetensors == "F8_E4M3"}
    for name in sorted(stored.keys() | rows.keys()):
        if rows.get(name) != stored.get(name):
            raise ConversionError(
                f"{rows.get(name, 0):,} rows of {name} were quantised, it has {stored.get(name, 0):,}",
                where=folder,
                fix="remove this folder and start again",
            )
