"""A folder of FP8 weights as a checkpoint whose scales are known, so that it can be compared with one of ordinary numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_longctx.convert.checks.findings import Findings
from mcore_longctx.convert.checks.served_weights import FP8, check_quantization, check_weights
from mcore_longctx.convert.views import BAND_BYTES, CONFIG, CheckpointView, TensorRows
from mcore_longctx.errors import ConversionError
from mcore_longctx.families import hf_shapes, model_tensors, read_shape
from mcore_longctx.formats.dcp_read import is_torch_dist
from mcore_longctx.formats.safetensors_io import StoredTensor, read_folder, read_json
from mcore_longctx.recipe import CARD, read_card
from mcore_longctx.rope import read_hf_rope

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["QuantisedTensor", "is_quantised", "open_quantised", "relative_rms", "with_scales"]


@dataclass(frozen=True)
class QuantisedTensor:
    """How far an FP8 weight times its scales is from the weight that it stands for: root mean square over that of the weight."""

    name: str
    relative_rms: float


def is_quantised(folder: Path) -> bool:
    """Whether this is a Hugging Face folder that says its weights are quantised."""
    return (
        not is_torch_dist(folder) and (folder / CONFIG).is_file() and bool(read_json(folder / CONFIG).get("quantization_config"))
    )


def open_quantised(folder: Path) -> tuple[CheckpointView, dict[str, TensorRows]]:
    """A Hugging Face folder of FP8 weights, and the scales by the name of their weight. All of its scales are checked.

    Raises:
        CheckpointError, ConfigError: as `open_checkpoint`.
        ConversionError: a scale that is missing or cannot be used, or other tensors than config.json says.
    """
    config = read_json(folder / CONFIG)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    shape = read_shape(plain, where=folder / CONFIG)
    rope = read_hf_rope(plain, where=folder / CONFIG)
    stored, findings = read_folder(folder), Findings()
    check_quantization(folder, config, stored, findings)
    check_weights(config, shape, stored, findings)
    if errors := [finding for finding in findings.found if finding.level == "error"]:
        raise ConversionError(errors[0].what, where=f"{folder}: {errors[0].where}", fix="`convert check` lists everything")
    tensors = {name: _rows(stored[name]) for name in hf_shapes(model_tensors(shape))}
    scales = {
        name: _rows(scale)
        for name, rows in tensors.items()
        if rows.dtype.name == FP8
        if (scale := stored.get(name + "_scale") or stored.get(name + "_scale_inv")) is not None
    }
    card = read_card(folder) if (folder / CARD).exists() else None
    return CheckpointView(folder, "hf", config, shape, rope, tensors, card), scales


def _rows(tensor: StoredTensor) -> TensorRows:
    """A scalar is a vector of one, a tensor of more than two axes a matrix of its first and all others."""
    shape = (
        tensor.shape if len(tensor.shape) in (1, 2) else (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.shape else (1,)
    )
    return TensorRows.stored(tensor.dtype, shape, tensor.file, tensor.offset)


def relative_rms(name: str, weight: TensorRows, scale: TensorRows, other: TensorRows) -> QuantisedTensor:
    """`weight` (FP8) times `scale` against `other` of the same shape, a band at a time."""
    import numpy as np

    from mcore_longctx.convert.copying.cast import widen

    scales = np.frombuffer(scale.read(0, scale.rows), "<f4").astype(np.float64).reshape(scale.rows, scale.columns)
    squared, error = 0.0, 0.0
    step = max(1, BAND_BYTES // max(1, 8 * weight.columns))
    for row in range(0, weight.rows, step):
        rows = min(step, weight.rows - row)
        exact = widen(other.read(row, rows), other.dtype).reshape(rows, weight.columns)
        numbers = _numbers(weight.read(row, rows)).reshape(rows, weight.columns)
        numbers *= _of_rows(scales, row, rows, weight)
        squared += float(np.square(exact).sum())
        error += float(np.square(numbers - exact).sum())
    if not squared:
        return QuantisedTensor(name, math.inf if error else 0.0)
    return QuantisedTensor(name, math.sqrt(error / squared))


def _numbers(data: bytearray) -> npt.NDArray[np.float64]:
    import ml_dtypes
    import numpy as np

    return np.frombuffer(data, ml_dtypes.float8_e4m3fn).astype(np.float64)


def _of_rows(scales: npt.NDArray[np.float64], row: int, rows: int, weight: TensorRows) -> npt.NDArray[np.float64]:
    """The factor of each element of rows [row, row + rows): one for all, one a row, or one a block."""
    import numpy as np

    if scales.size == 1:
        return scales.reshape(1, 1)
    if scales.size == weight.rows:
        return scales.reshape(-1, 1)[row : row + rows]
    high, wide = -(-weight.rows // scales.shape[0]), -(-weight.columns // scales.shape[1])
    high, wide = (1 << (size - 1).bit_length() for size in (high, wide))  # blocks are powers of two; the last one may be cut
    lines = np.arange(row, row + rows) // high
    found: npt.NDArray[np.float64] = scales[lines].repeat(wide, axis=1)[:, : weight.columns]
    return found


def with_scales(view: CheckpointView, scales: Mapping[str, TensorRows]) -> CheckpointView:
    """`view` with its scales among its tensors, for a comparison with another quantised folder byte by byte."""
    beside: dict[str, Any] = {f"{name} (scale)": rows for name, rows in scales.items()}
    return replace(view, tensors={**view.tensors, **beside})
