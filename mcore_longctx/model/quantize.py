"""FP8 with calibrated scales, through nvidia-modelopt: one scale for the inputs of each linear layer, and for keys and values.

Only what needs calibration is here. FP8 weights alone need neither modelopt nor torch: `convert export --quantize fp8`.

A static scale is the largest magnitude that calibration met, over 448. Rotation changes a key's component by at most sqrt 2, but
activations far out in a long context may grow, and servers clip what exceeds the scale. So the same tokens are measured at
several lengths, cut into windows of each, and a scale that grows with the length is an error instead of a guess.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcore_longctx.errors import CheckpointError, ConfigError, DifferenceFound

__all__ = ["MAX_GROWTH", "MAX_RELATIVE_RMS", "Calibration", "calibrate"]

MAX_GROWTH = 2.0  # of a largest magnitude, from the shortest length to the longest: one bit of the scale
MAX_RELATIVE_RMS = 0.06  # rounding to E4M3 gives 0.026 for weights, at most 0.059 for any number
_E4M3_MAX = 448.0
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what servers compute as one matrix, with one scale
_QUANTIZED, _QUANT_FILE, _CONFIG = "quantization_config", "hf_quant_config.json", "config.json"


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    Attributes:
        lengths: in tokens, ascending.
        inputs: linear layer -> largest magnitude of its input at each length.
        keys_values: `...self_attn.k` and `.v` -> the same of keys after the rope, and of values; empty without a KV cache in FP8.
        weights: linear layer -> {"amax", "relative_rms"}: largest magnitude before, and relative error of the written weight.
    """

    lengths: tuple[int, ...]
    inputs: Mapping[str, tuple[float, ...]]
    keys_values: Mapping[str, tuple[float, ...]]
    weights: Mapping[str, Mapping[str, float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON form, as `quantize_report.json` holds it."""
        measured = {**self.inputs, **self.keys_values}
        return {
            "format": 1,
            "weights": "float8_e4m3fn, one float32 scale per tensor; q, k, v share one, gate and up share one",
            "activations": "static scales, largest magnitude / 448",
            "lengths": list(self.lengths),
            "max_growth": MAX_GROWTH,
            "growth": max((_growth(row) for row in measured.values()), default=1.0),
            "max_relative_rms": MAX_RELATIVE_RMS,
            "amax_by_length": {"inputs": dict(self.inputs), "keys_values": dict(self.keys_values)},
            "tensors": dict(self.weights),
        }


def calibrate(
    hf: Path,
    out: Path,
    windows: Mapping[int, Sequence[Tensor]],
    *,
    kv: bool,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Quantise the model of folder `hf` with static scales and write weights and settings into the folder `out`.

    Args:
        hf: Hugging Face folder of an unquantised model.
        out: an empty folder that nobody takes for finished. Gets config.json (that of `hf`, with `quantization_config`),
            hf_quant_config.json and safetensors; tokenizer and generation settings are the caller's.
        windows: length -> token ids, int64 [length] each, which should be the same tokens at every length.
        kv: scales for keys and values, too.
        say: takes lines of progress.

    Raises:
        ConfigError: nvidia-modelopt is not installed, or too old or new to be used.
        CheckpointError: transformers cannot load the model, or it gives NaN.
        DifferenceFound: a largest magnitude grows more than MAX_GROWTH times from the shortest length to the longest; a written
            weight is further than MAX_RELATIVE_RMS from the original; a scale is missing or not positive; two files disagree.
    """
    mtq, export_hf_checkpoint = _modelopt()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load(hf, device)
    # rules in a list, later ones count: KV is added to the weights' and inputs'
    settings = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    if kv:
        settings["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG)["quant_cfg"]
    measured: dict[str, list[float]] = {}
    stdout = sys.stdout

    def aloud(line: str) -> None:
        with contextlib.redirect_stdout(stdout):
            say(line)

    with _quiet(), torch.no_grad():
        mtq.quantize(model, settings, lambda quantised: _measure(quantised, windows, measured, device, aloud))
    lengths = tuple(sorted(windows))
    inputs = {name.removesuffix(".input_quantizer"): tuple(row) for name, row in measured.items() if "bmm" not in name}
    keys_values = {name.removesuffix("_bmm_quantizer"): tuple(row) for name, row in measured.items() if "bmm" in name}
    _check_growth({**inputs, **keys_values}, lengths, hf)
    _share_scales(model)
    with _quiet(), torch.no_grad():
        export_hf_checkpoint(model, export_dir=str(out))
    del model
    _write_config(hf, out)
    weights = _check_written(hf, out, sorted(inputs), kv=kv)
    return Calibration(lengths, inputs, keys_values, weights)


def _modelopt() -> tuple[Any, Callable[..., None]]:
    """`modelopt.torch.quantization` and its exporter, imported only here: half a minute, and it patches what it finds."""
    try:
        with _quiet():
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise ConfigError(
            f"calibration needs nvidia-modelopt, which cannot be imported ({error})",
            where="quantize calibrate",
            fix="pip install 'mcore-longctx[quantize]'",
        ) from None
    if not isinstance(mtq.FP8_DEFAULT_CFG.get("quant_cfg"), list):
        raise ConfigError("this nvidia-modelopt spells its settings in another way", fix="pip install 'mcore-longctx[quantize]'")
    return mtq, export_hf_checkpoint


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what modelopt prints to stderr, and drop its warnings about what is not used here: stdout is the command's."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _load(hf: Path, device: torch.device) -> Any:
    import transformers

    try:
        # from a folder: a model built in memory has no `architectures`, which the exporter needs; and with its own dtype from
        # the start: a cast afterwards would round the rope's frequencies, too
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(hf.absolute()), dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers {transformers.__version__} cannot load it: {first_line}", where=hf) from error
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"NaN or infinity in {name}", where=hf, fix="repair the checkpoint")
    return model.eval().to(device)


def _quantizers(model: Any) -> dict[str, Any]:
    """Name -> quantiser of inputs, keys and values: what calibration decides."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith((".input_quantizer", ".k_bmm_quantizer", ".v_bmm_quantizer")) and module.is_enabled
    }


def _measure(
    model: Any,
    windows: Mapping[int, Sequence[Tensor]],
    measured: dict[str, list[float]],
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Run all windows length by length; `measured` gets the largest magnitudes of each, the calibrators those of all."""
    quantizers = _quantizers(model)
    largest: dict[str, Tensor] = {}
    for length in sorted(windows):
        for quantizer in quantizers.values():
            quantizer._calibrator.reset()
        for ids in windows[length]:
            try:
                # without the head: it is not quantised, and logits of a long window would be the largest tensor of all
                model.base_model(input_ids=ids[None].to(device), use_cache=False)
            except AssertionError as error:  # how a calibrator says that it met NaN or infinity
                raise CheckpointError(
                    f"the model gives NaN or infinity at {length:,} tokens", where=model.name_or_path
                ) from error
        for name, quantizer in quantizers.items():
            amax = quantizer._calibrator.compute_amax()
            measured.setdefault(name, []).append(float(amax))
            largest[name] = torch.maximum(largest.get(name, amax), amax)
        say(f"{length:>11,} tokens x {len(windows[length]):,}: largest input {max(row[-1] for row in measured.values()):.4g}")
    for name, quantizer in quantizers.items():
        quantizer._calibrator.reset()
        quantizer._calibrator.collect(largest[name])


def _growth(row: Sequence[float]) -> float:
    """How many times larger the last is than the first."""
    return row[-1] / row[0] if row[0] > 0 else (math.inf if row[-1] > 0 else 1.0)


def _check_growth(measured: Mapping[str, Sequence[float]], lengths: Sequence[int], hf: Path) -> None:
    grown = {name: _growth(row) for name, row in measured.items() if not _growth(row) <= MAX_GROWTH}
    if grown:
        worst = max(grown, key=lambda name: grown[name])
        first, last = measured[worst][0], measured[worst][-1]
        raise DifferenceFound(
            f"the largest magnitude of {worst} grows {grown[worst]:.2f} times from {lengths[0]:,} to {lengths[-1]:,} tokens "
            f"({first:.4g} to {last:.4g}), more than {MAX_GROWTH:g}; {len(grown)} of {len(measured)} do: static scales do not fit",
            where=hf,
            fix="use scales per token: convert export --quantize fp8",
        )


def _share_scales(model: Any) -> None:
    """Give matrices that servers fuse the largest of their scales; else they take it themselves and round FP8 a second time."""
    for _, module in model.named_modules():
        for names in _FUSED:
            if all(hasattr(module, name) for name in names):
                quantizers = [getattr(module, name).weight_quantizer for name in names]
                largest = torch.stack([quantizer.amax for quantizer in quantizers]).amax()
                for quantizer in quantizers:
                    quantizer.amax = largest.clone()


def _write_config(hf: Path, out: Path) -> None:
    """Put the source's own config.json, rope and all, in the place of the one that transformers spelled anew."""
    quantised = json.loads((out / _CONFIG).read_text(encoding="utf-8"))[_QUANTIZED]
    config = json.loads((hf / _CONFIG).read_text(encoding="utf-8"))
    text = json.dumps({**config, _QUANTIZED: quantised}, indent=2, ensure_ascii=False)
    (out / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _check_written(hf: Path, out: Path, layers: Sequence[str], *, kv: bool) -> dict[str, dict[str, float]]:
    """Read the folder back, against the original weights. Relative error and largest magnitude of each linear layer."""
    _check_settings(out, kv=kv)
    before, after = _Weights(hf), _Weights(out)
    found: dict[str, dict[str, float]] = {}
    for layer in layers:
        weight, quantised = before[f"{layer}.weight"], after[f"{layer}.weight"]
        names = [f"{layer}.weight_scale", f"{layer}.input_scale"]
        if kv and layer.endswith(("k_proj", "v_proj")):
            names.append(f"{layer}.{layer[-6]}_scale")
        for name in names:
            scale = after[name]
            if scale.dtype != torch.float32 or scale.numel() != 1 or not bool((scale > 0) & scale.isfinite()):
                raise DifferenceFound(f"{name} is {scale.tolist()}, expected one positive number", where=out)
        error = quantised.double() * after[f"{layer}.weight_scale"].double() - weight.double()
        relative = float(error.square().sum().sqrt() / weight.double().square().sum().sqrt())
        if quantised.dtype != torch.float8_e4m3fn or not relative <= MAX_RELATIVE_RMS:
            raise DifferenceFound(
                f"{layer}.weight was written with a relative error of {relative:.3g}, more than {MAX_RELATIVE_RMS}", where=out
            )
        found[layer] = {"amax": float(weight.abs().max()), "relative_rms": float(f"{relative:.6g}")}
    return found


def _check_settings(out: Path, *, kv: bool) -> None:
    """The two files in which servers look must say the same, and what was asked for."""
    quantised = json.loads((out / _CONFIG).read_text(encoding="utf-8"))[_QUANTIZED]
    other = json.loads((out / _QUANT_FILE).read_text(encoding="utf-8"))["quantization"]
    said = (quantised["quant_algo"], quantised.get("kv_cache_scheme") is not None, sorted(quantised["ignore"]))
    also = (other["quant_algo"], other.get("kv_cache_quant_algo") is not None, sorted(other["exclude_modules"]))
    if said != also or said[:2] != ("FP8", kv):
        raise DifferenceFound(f"{_CONFIG} says {said} and {_QUANT_FILE} {also}, expected FP8 and the same in both", where=out)


class _Weights:
    """Tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._folder = folder
        self._files = [safe_open(str(path), "pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in list(file.keys())}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise DifferenceFound(f"{name} is missing", where=self._folder)
        return self._where[name].get_tensor(name)
