"""A file of published measurements (docs/plan.md, Validation): read strictly, and turned into setups that the formulas take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from mcore_longctx.errors import ConfigError, LongctxError
from mcore_longctx.families import ModelShape
from mcore_longctx.plan.hardware import find_gpu
from mcore_longctx.plan.models import find_model, step_flops
from mcore_longctx.plan.setup import Setup
from mcore_longctx.recipe.load import read_typed
from mcore_longctx.recipe.schema import Parallel, TokenCount

__all__ = ["Conf", "KernelPoint", "LossPoint", "Measurement", "Point", "PublishedFile", "Use", "read_measurements"]

Use = Literal["fit", "held", "show"]
Conf = Literal["given", "inferred"]
_MAX_BYTES = 1 << 20
_GIB = 2**30
_EXTRAS = ("zero3", "cpu_adam", "bf16_adam", "param_offload", "ckpt_offload", "tiled_mlp", "chunked_loss", "native_ce")
_RECOMPUTE: Mapping[str, Literal["none", "full", "attention_kept", "selective"]] = {
    "full": "full",
    "kept": "attention_kept",
    "sel": "selective",
    "none": "none",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published training step, as the file gives it."""

    id: str
    src: str = ""
    model: str
    gpu: str
    n: int | None = None  # GPUs; None: tp x cp x pp x dp
    seq: TokenCount
    gbs: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int | None = None  # None: n / (tp x cp x pp)
    vpp: int = 1
    cp_type: Literal["p2p", "all_gather", "a2a", "a2a+p2p"] = "p2p"
    a2a: int = 1  # ranks of the all-to-all of a2a+p2p
    recompute: Literal["full", "kept", "sel", "none"] = "full"
    kernel: str = ""
    gemm: Literal["bf16", "fp8"] = "bf16"
    time_s: float | None = None
    tps_gpu: float | None = None
    tflops: float | None = None
    convention: Literal["causal", "noncausal"] | None = None
    mem_gb: float | None = None
    mem_unit: Literal["GB", "GiB"] = "GB"
    extras: tuple[str, ...] = ()
    use: Use = "show"
    conf: Conf = "given"
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("n", "seq", "gbs", "tp", "cp", "pp", "dp", "vpp", "a2a", "time_s", "tps_gpu", "tflops", "mem_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{self.id}: {name} is {value}, expected above 0")
        for extra in self.extras:
            if extra not in _EXTRAS:
                near = difflib.get_close_matches(extra, _EXTRAS, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_EXTRAS)}"
                raise ConfigError(f"{self.id}: unknown extra {extra!r}", fix=hint)
        if self.time_s is None and self.tps_gpu is None and self.tflops is None and self.mem_gb is None:
            raise ConfigError(f"{self.id}: nothing was measured", fix="give time_s, tps_gpu, tflops or mem_gb")
        if self.tflops is not None and self.convention is None:
            raise ConfigError(f"{self.id}: tflops without convention", fix="say causal or noncausal")
        if self.cp_type == "a2a+p2p" and self.cp % self.a2a:
            raise ConfigError(f"{self.id}: a2a {self.a2a} does not divide cp {self.cp}")
        if {"cpu_adam", "bf16_adam"} <= set(self.extras):
            raise ConfigError(f"{self.id}: cpu_adam and bf16_adam exclude each other")

    @property
    def gpus(self) -> int:
        """GPUs of the run."""
        return self.n if self.n is not None else self.tp * self.cp * self.pp * (self.dp or 1)


@dataclass(frozen=True, kw_only=True)
class KernelPoint:
    """One attention, distributed or not: its rate, or its ratio to one monolithic call."""

    id: str
    src: str = ""
    gpu: str
    n: int = 1
    tokens_per_rank: TokenCount | None = None
    seq: TokenCount | None = None
    q: int
    kv: int
    method: str
    fwd_ratio: float | None = None
    fwdbwd_ratio: float | None = None
    fwd_tflops: float | None = None
    bwd_tflops: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.tokens_per_rank is None and self.seq is None:
            raise ConfigError(f"{self.id}: give tokens_per_rank or seq")
        for name in ("n", "q", "kv", "fwd_ratio", "fwdbwd_ratio", "fwd_tflops", "bwd_tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{self.id}: {name} is {value}, expected above 0")
        if self.q % self.kv:
            raise ValueError(f"{self.id}: {self.q} query heads do not divide into {self.kv} groups")


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """One loss layer, forward and backward."""

    id: str
    src: str = ""
    tokens: TokenCount
    vocab_local: int
    hidden: int | None = None
    method: str
    ms: float | None = None
    gib: float | None = None
    mb: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab_local", "hidden", "ms", "gib", "mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{self.id}: {name} is {value}, expected above 0")


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A model of the file's own: `L h q kv d f V`, `mats` 3 for SwiGLU and 2 for GELU."""

    L: int
    h: int
    q: int
    kv: int
    d: int
    f: int
    V: int
    mats: int = 3
    tied: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("L", "h", "q", "kv", "d", "f", "V"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.mats not in (2, 3):
            raise ValueError(f"mats is {self.mats}, expected 3 (SwiGLU) or 2 (GELU)")

    def shape(self) -> ModelShape:
        """Two matrices of f columns weigh and cost what three of 2f/3 do."""
        return ModelShape(
            num_layers=self.L,
            hidden_size=self.h,
            ffn_hidden_size=self.f * self.mats // 3,
            num_attention_heads=self.q,
            num_query_groups=self.kv,
            kv_channels=self.d,
            vocab_size=self.V,
            tie_word_embeddings=self.tied,
            qk_layernorm=self.qk_norm,
        )


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """The file as a whole."""

    source_keys: dict[str, str] = field(default_factory=dict)
    models: dict[str, _Model] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    kernel_points: tuple[KernelPoint, ...] = ()
    loss_points: tuple[LossPoint, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """A point, what it was run with, and what was measured in seconds of a step and bytes of a GPU."""

    point: Point
    source: str
    setup: Setup
    seconds: float | None
    bytes: float | None
    where: str = ""  # file:line
    doubt: str = ""  # why it is shown and counted in no mean


def read_measurements(path: Path | None = None) -> tuple[tuple[Measurement, ...], PublishedFile]:
    """All points of a file, ours if none is named.

    Raises:
        ConfigError: the file cannot be read, has an unknown or missing name, an impossible value, an unknown model, GPU or kernel, or
            the same id twice; one line with file and line.
    """
    text, name = _read(path)
    file, lines = read_typed(PublishedFile, text, name)
    measurements = []
    for i, point in enumerate(file.points):
        where = lines.get(f"points.{i}", name)
        try:
            setup = _setup(point, file.models)
        except (LongctxError, ValueError) as error:  # a layout or a name that cannot be
            what, fix = (error.what, error.fix) if isinstance(error, LongctxError) else (str(error), "")
            raise ConfigError(f"{point.id}: {what}", where=where, fix=fix) from None
        bytes_ = None if point.mem_gb is None else point.mem_gb * (_GIB if point.mem_unit == "GiB" else 1e9)
        seconds = _seconds(point, setup.shape)
        source = file.source_keys.get(point.src, point.src)
        measurements.append(Measurement(point, source, setup, seconds, bytes_, where, _doubt(point, setup, seconds)))
    for kind, points in (("points", file.points), ("kernel_points", file.kernel_points), ("loss_points", file.loss_points)):
        _check_ids(kind, points, lines, name)
    for i, kernel_point in enumerate(file.kernel_points):
        try:
            find_gpu(kernel_point.gpu)
        except ConfigError as error:
            raise ConfigError(
                f"{kernel_point.id}: {error.what}", where=lines.get(f"kernel_points.{i}", name), fix=error.fix
            ) from None
    return tuple(measurements), file


def _read(path: Path | None) -> tuple[str, str]:
    if path is None:
        return (resources.files("mcore_longctx.plan") / "validation.yaml").read_text(encoding="utf-8"), "validation.yaml"
    try:
        if not path.is_file() and path.exists():
            raise ConfigError("is not a regular file", where=path)
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError("larger than 1 MiB: not a file of measurements", where=path)
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 (byte {error.start})", where=path, fix="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=path) from None


def _setup(point: Point, models: Mapping[str, _Model]) -> Setup:
    shape = models[point.model].shape() if point.model in models else find_model(point.model)
    gpu = find_gpu(point.gpu)
    gpu.kernel(point.kernel)
    extras = set(point.extras)
    ranks = point.tp * point.cp * point.pp
    dp = max(1, point.gpus // ranks)  # n is the truth: dp is what is left of it
    if shape.num_layers < point.pp:
        raise ConfigError(f"pp {point.pp} is more than the {shape.num_layers} layers")
    chunked = "chunked_loss" in extras
    parallel = Parallel(
        tensor_model_parallel_size=point.tp,
        pipeline_model_parallel_size=point.pp,
        context_parallel_size=point.cp,
        data_parallel_size=dp,
        sequence_parallel=point.tp > 1,
        cp_comm_type=point.cp_type,
        hierarchical_context_parallel_sizes=(point.a2a, point.cp // point.a2a) if point.cp_type == "a2a+p2p" else None,
    )
    return Setup(
        shape=shape,
        gpu=gpu,
        seq_length=int(point.seq),
        global_batch_size=point.gbs,
        parallel=parallel,
        virtual_pipeline_chunks=point.vpp,
        recompute=_RECOMPUTE[point.recompute],
        offload_fraction=1.0 if "ckpt_offload" in extras else 0.0,
        mlp_tile=8192 if "tiled_mlp" in extras else None,
        loss="chunked" if chunked else "native" if "native_ce" in extras else "hf" if "zero3" in extras else "unfused",
        gemm=point.gemm,
        kernel=point.kernel,
        sharding="zero3" if "zero3" in extras else "distributed_optimizer",
        optimizer="adam_cpu" if "cpu_adam" in extras else "adam_bf16" if "bf16_adam" in extras else "adam",
        parameters_on_host="param_offload" in extras,
    )


def _doubt(point: Point, setup: Setup, seconds: float | None) -> str:
    """What cannot be as it is written, though the formulas give a number."""
    ranks = point.tp * point.cp * point.pp
    if point.gpus % ranks:
        return f"n {point.gpus} is not divisible by tp x cp x pp = {ranks}"
    if setup.shape.num_attention_heads % point.tp:
        return f"{setup.shape.num_attention_heads} query heads are not divisible by tp {point.tp}"
    if point.gemm == "fp8" and not setup.gpu.fp8:
        return f"gemm fp8: {setup.gpu.name} has no FP8"
    if seconds is not None:
        peak = setup.gpu.peak_flops * (2 if point.gemm == "fp8" else 1)
        if point.gbs * sum(step_flops(setup.shape, setup.seq_length)) / point.gpus / seconds > peak:
            return "above the peak of these GPUs: check n and convention"
    return ""


def _seconds(point: Point, shape: ModelShape) -> float | None:
    """Of a step: as published, from tokens/s, or from FLOP/s by the count that its source used."""
    if point.time_s is not None:
        return point.time_s
    if point.tps_gpu is not None:
        return point.gbs * point.seq / point.tps_gpu / point.gpus
    if point.tflops is None:
        return None
    linear, head, attention = step_flops(shape, int(point.seq))
    counted = linear + head + attention * (2 if point.convention == "noncausal" else 1)
    return point.gbs * counted / point.gpus / (point.tflops * 1e12)


def _check_ids(kind: str, points: Iterable[Point | KernelPoint | LossPoint], lines: Mapping[str, str], name: str) -> None:
    seen: set[str] = set()
    for i, point in enumerate(points):
        if point.id in seen:
            raise ConfigError(f"{kind}: id {point.id!r} is given twice", where=lines.get(f"{kind}.{i}", name), fix="keep one")
        seen.add(point.id)
