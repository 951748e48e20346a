"""A model in float32 from a checkpoint's own files: Megatron's of a torch_dist folder, transformers' of a Hugging Face folder.

transformers is imported only here, and code in a folder is never loaded.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_longctx.convert.views import locate_checkpoint
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.families import ModelShape, config_for_export, family_of, model_tensors, read_shape
from mcore_longctx.formats.dcp_read import is_torch_dist
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.recipe.card import CARD, read_card
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling, read_hf_rope

__all__ = ["ModelSource", "RunningModel", "read_source", "running"]


@dataclass(frozen=True)
class ModelSource:
    """What a folder says about its model, before any weight is read."""

    folder: Path
    shape: ModelShape
    rope: RopeScaling
    is_megatron: bool
    described_by: str  # where sizes and rope were read

    @property
    def reader(self) -> str:
        """Which program builds the model, from which files."""
        program = (
            f"megatron-core {megatron.core.__version__}" if self.is_megatron else f"transformers {_transformers().__version__}"
        )
        return f"{program}, from its tensors and {self.described_by}"

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer lies, if there is one."""
        return self.folder / "hf" if self.is_megatron else self.folder

    @property
    def float32_bytes(self) -> int:
        """Of all weights."""
        return 4 * sum(tensor.rows * (tensor.columns or 1) for tensor in model_tensors(self.shape))


@dataclass(frozen=True)
class RunningModel:
    """A model that is loaded. `logits(ids, positions)`: int64 [s] and [s] -> float32 [s, vocabulary] on the CPU."""

    logits: Callable[[Tensor, Tensor], Tensor]
    inverse_frequencies: Tensor  # float32 [d/2] on the CPU
    attention_factor: float


def read_source(path: Path, given: Path | None = None) -> ModelSource:
    """Sizes and rope of a checkpoint of either format.

    Args:
        path: its folder, or the folder around it (`locate_checkpoint`).
        given: config.json of the model, or its folder, for a torch_dist checkpoint without a card.

    Raises:
        CheckpointError: no checkpoint here, or a torch_dist folder without its card.
        ConfigError: a config.json that is not supported; transformers is needed and not installed.
    """
    folder = locate_checkpoint(path)
    if is_torch_dist(folder):
        if given is None or (folder / CARD).exists():
            card = read_card(folder)
            return ModelSource(folder, card.shape, card.rope, is_megatron=True, described_by="its card")
        return _of_config(folder, given if given.is_file() else given / "config.json", is_megatron=True)
    _transformers()
    if (folder / "hf_quant_config.json").exists():  # of modelopt; older ones leave config.json as it is
        raise ConfigError(
            "written by modelopt: transformers would take the raw fp8 numbers for weights, without an error",
            where=folder,
            fix="use the bf16 model",
        )
    return _of_config(folder, folder / "config.json", is_megatron=False)


def _of_config(folder: Path, path: Path, *, is_megatron: bool) -> ModelSource:
    config = _read_config(path)
    described_by = str(path) if is_megatron else "its config.json"
    return ModelSource(folder, read_shape(config, where=path), read_hf_rope(config, where=path), is_megatron, described_by)


@contextmanager
def running(source: ModelSource, seq_length: int) -> Iterator[RunningModel]:
    """The model, loaded in float32; gone when the block ends. `seq_length`: tokens of the longest sequence it will see."""
    if source.is_megatron:
        with _megatron(source, seq_length) as model:
            yield model
    else:
        yield _hf(source)
    gc.collect()


@contextmanager
def _megatron(source: ModelSource, seq_length: int) -> Iterator[RunningModel]:
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError("logits are compared in one process", fix="start it without torchrun")
    had_world = dist.is_initialized()
    init_process_groups(Parallel(), seed=0)
    try:
        with device_context():
            model: Any = build_gpt_model(
                source.shape, source.rope, Parallel(), precision="fp32", seq_length=seq_length, seed=None
            )
            load_model_weights(model, source.folder)
            model.eval()

            def logits(ids: Tensor, positions: Tensor) -> Tensor:
                device = training_device()
                rows = torch.arange(len(ids), device=device)
                found: Tensor = model.logits_at(ids[None].to(device), positions[None].to(device), rows)
                return found.cpu()

            yield RunningModel(logits, model.rotary_pos_emb.inv_freq.cpu(), source.rope.frequencies()[1])
    finally:
        if not had_world:
            destroy_process_groups()


def _hf(source: ModelSource) -> RunningModel:
    model = _load_hf(source.folder)

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        # the mask of ones matters: without it transformers takes a jump in the positions for a new document
        whole = torch.ones(1, len(ids), dtype=torch.int64)
        with torch.no_grad():
            out = model(input_ids=ids[None], position_ids=positions[None], attention_mask=whole, use_cache=False)
        found: Tensor = out.logits[0].float()
        return found

    rotary = model.model.rotary_emb
    return RunningModel(logits, rotary.original_inv_freq.float().clone(), float(rotary.attention_scaling))


def _load_hf(folder: Path) -> Any:
    transformers = _transformers()
    path, settings = str(folder.absolute()), _read_config(folder / "config.json")
    try:
        if family_of(settings).exported_as:  # readable without the code that it came with
            patched = config_for_export({key: value for key, value in settings.items() if key != "auto_map"})
            config = transformers.AutoConfig.for_model(**patched)
        else:
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=any(folder.glob("*.safetensors")),  # else .bin, of which torch reads tensors only
            weights_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers {transformers.__version__} cannot load it: {first_line}", where=folder) from error
    for kind in ("missing", "mismatched", "unexpected"):  # transformers fills or drops them with a warning
        names = sorted(str(name) for name in info[f"{kind}_keys"] if not str(name).endswith("rotary_emb.inv_freq"))
        if names:
            raise CheckpointError(f"transformers finds {len(names)} {kind} tensors (first: {names[0]})", where=folder)
    return model.eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=path) from None
    if not isinstance(settings, dict):
        raise CheckpointError("is not a JSON object", where=path)
    return settings


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "comparing logits needs transformers, which is not installed", fix="pip install 'transformers>=4.57'"
        ) from None
    return transformers
