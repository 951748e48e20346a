"""The only place that knows megatron-core versions, and the redirect that lets megatron-core run without CUDA.

megatron-core 0.16.1 and 0.19.2 are the tested versions. Importing this module imports megatron-core once, without its warnings
about TransformerEngine and apex, which this project does not need. Import it before anything of `megatron`: `mcore_longctx.model`
does so for everybody who builds on it.

megatron-core asks for CUDA in places that no config reaches: the gradient buffers of DistributedDataParallel, every pipeline
schedule, every optimizer, the gathers of tensor and sequence parallelism. `device_context` redirects torch's own device calls, so
that these land on the CPU. No Megatron symbol is replaced. Where CUDA is available it does nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mcore_longctx.errors import ConfigError

__all__ = [
    "MEGATRON_VERSION",
    "NO_CUDA_GRAPHS",
    "device_context",
    "layer_offset",
    "num_layers_to_build",
    "of_layers",
    "offload_fraction_fields",
    "quiet_import",
    "require_training_program",
    "seed_rng",
    "training_device",
    "training_program_context",
]

_OLDEST, _TOO_NEW = (0, 16), (0, 20)
_TRAINING_PROGRAM = (0, 19)  # the first wheel that brings megatron.training
_NOISY_AT_IMPORT = ("torch.utils.cpp_extension", "megatron")  # the first looks for a CUDA toolkit and says so


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Import megatron-core modules inside without their warnings about what is not installed."""
    loggers = [logging.getLogger(name) for name in _NOISY_AT_IMPORT]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _installed_version() -> str:
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise ConfigError("megatron-core is not installed", fix="pip install 'mcore-longctx[train]'") from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _OLDEST <= (major, minor) < _TOO_NEW:
        raise ConfigError(f"megatron-core {version} is not supported", fix="install 0.16.1 or newer, below 0.20")
    return version


MEGATRON_VERSION = _installed_version()

with quiet_import():
    try:
        from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: F401
        from megatron.core.distributed import DistributedDataParallel  # noqa: F401
        from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401
        from megatron.core.optimizer import get_megatron_optimizer  # noqa: F401
        from megatron.core.pipeline_parallel import schedules  # noqa: F401
        from megatron.core.tensor_parallel import random as tensor_parallel_random
        from megatron.core.transformer.transformer_block import get_num_layers_to_build
        from megatron.core.transformer.transformer_config import TransformerConfig
        from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
    except RuntimeError as error:
        # megatron-core catches ImportError only; the empty meta package raises this
        if "transformer-engine" not in str(error).replace("_", "-"):
            raise
        raise ConfigError(
            "the transformer-engine package that is installed holds no library, and megatron-core does not import beside it",
            fix="pip uninstall transformer-engine, or install mcore-longctx[te]",
        ) from error

# 0.19 announces at every construction that GPTModel will go; `model/builder.py` is where that will be mended
logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(lambda record: "IS DEPRECATED" not in record.getMessage())

# 0.16 says so of every MLP class that is not its own; ours takes Megatron's default, the tensor-parallel group
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: "Unknown MLP type" not in record.getMessage()
)


# the default asks for a scope that megatron-core itself calls deprecated; 0.19 renamed the field
NO_CUDA_GRAPHS: dict[str, list[str]] = {
    ("cuda_graph_modules" if "cuda_graph_modules" in TransformerConfig.__dataclass_fields__ else "cuda_graph_scope"): []
}


def require_training_program() -> None:
    """Raise ConfigError unless Megatron-LM's training program, `megatron.training`, can be imported.

    Its functions change with each minor version; `mcore_longctx.megatron_lm` is written against those of 0.19.
    """
    version = tuple(int(part) for part in MEGATRON_VERSION.split(".")[:2])
    if version < _TRAINING_PROGRAM or importlib.util.find_spec("megatron.training") is None:
        raise ConfigError(
            f"megatron-core {MEGATRON_VERSION} is installed, and Megatron-LM's training program comes with 0.19 or newer",
            fix="pip install 'megatron-core>=0.19,<0.20' (Python 3.12), or train with mcore-longctx train",
        )


def offload_fraction_fields(fraction: float) -> dict[str, float]:
    """TransformerConfig field for the share of activations that megatron-core's own offload takes (0.19; all or nothing before)."""
    if "activation_offload_fraction" in TransformerConfig.__dataclass_fields__:
        return {"activation_offload_fraction": fraction}
    if fraction != 1:
        raise ConfigError(
            f"offload_fraction is {fraction}, and megatron-core {MEGATRON_VERSION} offloads all or nothing",
            fix="use 1, or megatron-core 0.19",
        )
    return {}


def num_layers_to_build(config: Any, vp_stage: int | None = None) -> int:
    """Transformer layers that this pipeline stage builds."""
    return int(get_num_layers_to_build(config, vp_stage=vp_stage))


def layer_offset(config: Any, vp_stage: int | None = None) -> int:
    """Global index (from 0) of the first transformer layer of this pipeline stage."""
    return int(get_transformer_layer_offset(config, vp_stage=vp_stage))


# 0.16 reads a per-layer list at the layer's number, which counts from 1, and falls off its end (mended by 0.19)
_LISTS_COUNT_FROM_ONE = "cp_comm_type[self.layer_number]" in inspect.getsource(TransformerLayer.__init__)


class _FromOne(list[str]):
    """A list whose first entry is number 1."""

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(index - 1)


def of_layers(values: Sequence[str]) -> list[str]:
    """A list for TransformerConfig.cp_comm_type that gives each layer its own entry."""
    return _FromOne(values) if _LISTS_COUNT_FROM_ONE else list(values)


def training_device() -> torch.device:
    """The current CUDA device, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------------ random numbers


def seed_rng(seed: int) -> None:
    """Seed Python, numpy, torch and Megatron's tracker of model-parallel random states.

    Ranks of one tensor-parallel group share the default state; each pipeline stage gets its own, as in Megatron-LM.
    """
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel_random.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    else:
        tensor_parallel_random.initialize_rng_tracker(force_reset=True)
        tracker = _CpuRngTracker()
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tracker.add(tensor_parallel_random.get_data_parallel_rng_tracker_name(), seed)
        tracker.add("model-parallel-rng", seed + 2718 + tp_rank)
        tracker.add(tensor_parallel_random.get_expert_parallel_rng_tracker_name(), seed + 1024 + tp_rank)
        # megatron-core has no setter; it reads this global through get_cuda_rng_tracker()
        tensor_parallel_random._CUDA_RNG_STATE_TRACKER = tracker


class _CpuRngTracker(tensor_parallel_random.CudaRNGStatesTracker):
    """Megatron's tracker on the CPU generator. On a CPU the stock one silently tracks nothing and grows with every use."""

    def add(self, name: str, seed: int) -> None:
        if name in self.states_:
            raise ValueError(f"rng state {name} is already there")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            raise ValueError(f"rng state {name} is not there: call seed_rng first")
        outer = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)


# ------------------------------------------------------------------------------------------------------------------ CPU redirect


class _ToCpu(TorchFunctionMode):
    """Sends literal `device="cuda"`, `Tensor.cuda()` and pinned memory to the CPU, and answers `Tensor.type()` as CUDA would."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron's optimizers compare this string with 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.").replace("torch.cuda.cuda.", "torch.cuda.")
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _NoStream:
    """What `torch.cuda.current_stream()` gives on the CPU: every method does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


_CPU = torch.device("cpu")
_REPLACED: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch.cuda, "current_device", lambda: _CPU),
    (torch.cuda, "synchronize", lambda *args, **kwargs: None),
    (torch.cuda, "empty_cache", lambda: None),
    (torch.cuda, "current_stream", lambda *args, **kwargs: _NoStream()),
    (torch.cuda, "default_stream", lambda *args, **kwargs: _NoStream()),
    (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    (torch.cuda.random, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
    (torch.cuda, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
    (torch.cuda, "manual_seed", torch.manual_seed),
]


class _Redirect:
    """Counts the blocks that are open: torch.cuda is shared by all threads, a TorchFunctionMode belongs to one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open_blocks = 0
        self.originals: list[Any] = []
        self.thread = threading.local()

    @contextlib.contextmanager
    def cuda_calls(self) -> Iterator[None]:
        with self.lock:
            self.open_blocks += 1
            if self.open_blocks == 1:
                self.originals = [getattr(module, name) for module, name, _ in _REPLACED]
                for module, name, replacement in _REPLACED:
                    setattr(module, name, replacement)
        try:
            yield
        finally:
            with self.lock:
                self.open_blocks -= 1
                if self.open_blocks == 0:
                    for (module, name, _), original in zip(_REPLACED, self.originals, strict=True):
                        setattr(module, name, original)

    @contextlib.contextmanager
    def function_mode(self) -> Iterator[None]:
        if getattr(self.thread, "active", False):
            yield
            return
        self.thread.active = True
        try:
            with _ToCpu():
                yield
        finally:
            self.thread.active = False


_redirect = _Redirect()


@contextlib.contextmanager
def device_context() -> Iterator[None]:
    """Build, train, save and load Megatron models inside this block. Without CUDA, torch's device calls go to the CPU.

    Does nothing where CUDA is available. Blocks may be nested. It belongs to the thread that opens it (the backward of a CPU graph
    runs in the calling thread). It costs about 15 % of a step that is nothing but Python overhead, and nothing at real lengths.
    """
    if torch.cuda.is_available():
        yield
        return
    with _redirect.cuda_calls(), _redirect.function_mode():
        yield


# What `megatron.training` calls beyond that: it asks for the architecture as soon as TP or CP is above 1, to check an environment
# variable that only older GPUs need, and logs the memory of the device.
_REPLACED_FOR_THE_PROGRAM: list[tuple[Any, str, Any]] = [
    (torch.cuda, "Stream", _NoStream),
    (torch.cuda, "Event", _NoStream),
    (torch.cuda, "stream", lambda *args, **kwargs: contextlib.nullcontext()),
    (torch.cuda, "set_stream", lambda *args, **kwargs: None),
    (torch.cuda, "get_device_properties", lambda *args, **kwargs: SimpleNamespace(major=10, minor=0, name="cpu")),
    (torch.cuda, "get_device_capability", lambda *args, **kwargs: (10, 0)),
    (torch.cuda, "reset_peak_memory_stats", lambda *args, **kwargs: None),
    (torch.cuda, "memory_allocated", lambda *args, **kwargs: 0),
    (torch.cuda, "max_memory_allocated", lambda *args, **kwargs: 0),
    (torch.cuda, "memory_reserved", lambda *args, **kwargs: 0),
    (torch.cuda, "max_memory_reserved", lambda *args, **kwargs: 0),
]


@contextlib.contextmanager
def training_program_context() -> Iterator[None]:
    """`device_context` and the names that only Megatron-LM's training program calls. Does nothing where CUDA is available.

    Not to be nested in itself: there is one training program in a process.
    """
    if torch.cuda.is_available():
        yield
        return
    originals = [getattr(module, name) for module, name, _ in _REPLACED_FOR_THE_PROGRAM]
    for module, name, replacement in _REPLACED_FOR_THE_PROGRAM:
        setattr(module, name, replacement)
    try:
        with device_context():
            yield
    finally:
        for (module, name, _), original in zip(_REPLACED_FOR_THE_PROGRAM, originals, strict=True):
            setattr(module, name, original)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)
