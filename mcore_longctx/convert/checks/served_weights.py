"""The tensors of a Hugging Face folder as servers load them: names, shapes, and the scales of FP8 weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mcore_longctx.convert.checks.findings import Findings
from mcore_longctx.convert.views import BAND_BYTES, CONFIG
from mcore_longctx.errors import CheckpointError
from mcore_longctx.families import ModelShape, hf_shapes, model_tensors
from mcore_longctx.formats.safetensors_io import INDEX, StoredTensor, read_folder, read_json

__all__ = ["FP8", "check_quantization", "check_weights", "read_stored"]

FP8 = "float8_e4m3fn"
HF_QUANT_CONFIG = "hf_quant_config.json"
_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "k_scale", "v_scale")
_Shapes = tuple[tuple[int, ...], ...]


def read_stored(folder: Path, findings: Findings) -> dict[str, StoredTensor] | None:
    """Every tensor of the folder; None where its files or its index are damaged (which is found)."""
    try:
        stored = read_folder(folder)
        index = folder / INDEX
        if index.exists():
            metadata = read_json(index).get("metadata")
            total, stated = sum(tensor.nbytes for tensor in stored.values()), None
            if isinstance(metadata, Mapping):
                stated = metadata.get("total_size")
            if stated != total:
                findings.warning(INDEX, f"total_size is {stated!r}, the tensors have {total:,} bytes")
    except CheckpointError as error:
        findings.refused(str(error.where), error)
        return None
    return stored


def check_weights(config: Mapping[str, Any], shape: ModelShape, stored: Mapping[str, StoredTensor], findings: Findings) -> None:
    """Names and shapes against config.json: vLLM stops at a tensor that it does not know, and at one that is missing."""
    expected = hf_shapes(model_tensors(shape))
    for name, wanted in expected.items():
        if name not in stored:
            findings.error(name, "missing")
        elif stored[name].shape != wanted:
            findings.error(name, f"shape {list(stored[name].shape)}, {CONFIG} implies {list(wanted)}")
    quantised = bool(config.get("quantization_config"))
    for name in stored.keys() - expected.keys():
        if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
            findings.warning(name, "follows from other tensors; leave it out")
        elif not (quantised and name.rpartition(".")[2] in _SCALES):
            findings.error(name, "has no place in this model; vLLM stops at it")
    kinds = {stored[name].dtype.name for name in expected if name in stored and stored[name].dtype.name != FP8}
    stated = config.get("dtype", config.get("torch_dtype"))
    if stated is not None and kinds and not (isinstance(stated, str) and stated in kinds):
        findings.warning(CONFIG, f"dtype is {stated!r}, the weights are {' and '.join(sorted(kinds))}")


def check_quantization(folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor], findings: Findings) -> None:
    """Every FP8 weight has its scales, of the right shape, float32, positive and finite; and those who would not heed them."""
    settings = config.get("quantization_config")
    settings = settings if isinstance(settings, Mapping) else {}
    weights = {name: tensor for name, tensor in stored.items() if tensor.dtype.name == FP8}
    if weights and not settings:
        findings.error(
            CONFIG, f"{len(weights):,} tensors are {FP8}, but there is no quantization_config: scales would be ignored"
        )
    if settings and not weights:
        findings.error(CONFIG, "quantization_config is there, but no tensor is quantised")
    if not settings:
        return
    method = settings.get("quant_method")
    if method == "modelopt":
        _check_modelopt(folder, settings, findings)
        findings.warning(
            CONFIG,
            "transformers loads a modelopt folder without its scales: silently wrong weights; serve it with vLLM or SGLang",
        )
    elif method == "compressed-tensors":
        _check_compressed_tensors(settings, weights, findings)
    elif method == "fp8":
        if not settings.get("weight_block_size"):
            findings.warning(CONFIG, "transformers takes quant_method fp8 for its own block format and stops")
    else:
        findings.error(CONFIG, f"quant_method {method!r} is not known here: nothing of the weights was checked")
        return
    for name, tensor in weights.items():
        if not name.endswith(".weight") or len(tensor.shape) != 2:
            findings.error(name, f"{FP8}, but not the weight of a linear layer")
            continue
        for scale, shapes in _scales_of(name, tensor, settings).items():
            _check_scale(scale, shapes, stored, findings)


def _scales_of(name: str, weight: StoredTensor, settings: Mapping[str, Any]) -> dict[str, _Shapes]:
    """Name -> shapes that are right, of every scale that an FP8 weight must have."""
    stem, (rows, columns) = name.removesuffix("weight"), weight.shape
    scalar: _Shapes = ((), (1,))
    block = settings.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block):
        return {stem + "weight_scale_inv": ((math.ceil(rows / block[0]), math.ceil(columns / block[1])),)}
    method, algorithm = settings.get("quant_method"), settings.get("quant_algo")
    if method == "compressed-tensors":
        strategies = {_strategy(group) for group in _groups(settings)}
        return {stem + "weight_scale": scalar if strategies == {"tensor"} else ((rows, 1),)}
    if method == "fp8":
        dynamic = {} if settings.get("activation_scheme", "dynamic") == "dynamic" else {stem + "input_scale": scalar}
        return {stem + "weight_scale": scalar, **dynamic}
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        scales: dict[str, _Shapes] = {stem + "weight_scale": ((rows,), (rows, 1))}
    elif algorithm == "fp8_pb_wo":
        scales = {stem + "weight_scale": ((math.ceil(rows / 128), 1, math.ceil(columns / 128), 1), *scalar)}
    else:
        scales = {stem + "weight_scale": scalar, stem + "input_scale": scalar}
    if settings.get("kv_cache_scheme"):
        scales |= {stem + f"{part}_scale": scalar for part in "kv" if stem.endswith(f".{part}_proj.")}
    return scales


def _check_scale(name: str, shapes: _Shapes, stored: Mapping[str, StoredTensor], findings: Findings) -> None:
    scale = stored.get(name)
    if scale is None:
        findings.error(name, "missing: its weight is FP8")
    elif scale.dtype.name != "float32":
        findings.error(name, f"{scale.dtype.name}, expected float32")
    elif scale.shape not in shapes:
        findings.error(name, f"shape {list(scale.shape)}, expected {list(shapes[0])}")
    elif (bad := _unusable(scale)) is not None:
        findings.error(name, f"holds {bad:g}, expected positive finite numbers")


def _unusable(scale: StoredTensor) -> float | None:
    """The first number that is not positive and finite, read a band at a time."""
    with scale.file.open("rb") as file:
        file.seek(scale.offset)
        left = scale.nbytes
        while left > 0:
            values = np.frombuffer(file.read(min(left, BAND_BYTES)), "<f4")
            bad = values[~(np.isfinite(values) & (values > 0))]
            if len(bad):
                return float(bad[0])
            left -= values.nbytes
    return None


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _strategy(group: Mapping[str, Any]) -> object:
    weights = group.get("weights")
    return weights.get("strategy") if isinstance(weights, Mapping) else None


def _check_compressed_tensors(settings: Mapping[str, Any], weights: Mapping[str, StoredTensor], findings: Findings) -> None:
    if settings.get("format") != "float-quantized":
        findings.error(
            CONFIG, f"quantization_config.format is {settings.get('format')!r}, expected 'float-quantized' of FP8 weights"
        )
    if not _groups(settings):
        findings.error(CONFIG, "quantization_config has no config_groups")
    ignored = settings.get("ignore")
    if "lm_head.weight" not in weights and not (isinstance(ignored, list) and "lm_head" in ignored):
        findings.error(
            CONFIG, "quantization_config.ignore lacks lm_head, which is not quantised: readers would look for its scale"
        )


def _check_modelopt(folder: Path, settings: Mapping[str, Any], findings: Findings) -> None:
    path = folder / HF_QUANT_CONFIG
    if not path.exists():
        findings.error(HF_QUANT_CONFIG, "missing; vLLM and SGLang look for it in a modelopt folder")
        return
    try:
        other = read_json(path).get("quantization")
    except CheckpointError as error:
        findings.refused(HF_QUANT_CONFIG, error)
        return
    other = other if isinstance(other, Mapping) else {}
    if other.get("quant_algo") != settings.get("quant_algo"):
        findings.error(
            HF_QUANT_CONFIG, f"quant_algo is {other.get('quant_algo')!r}, {CONFIG} says {settings.get('quant_algo')!r}"
        )
    if bool(other.get("kv_cache_quant_algo")) != bool(settings.get("kv_cache_scheme")):
        findings.error(HF_QUANT_CONFIG, f"and {CONFIG} disagree on whether the KV cache is quantised")
