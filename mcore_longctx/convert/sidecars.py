"""The files that travel beside the weights: config.json, generation settings, tokenizer, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.convert.views import CONFIG, CheckpointView
from mcore_longctx.errors import CheckpointError
from mcore_longctx.families import config_for_export, family_of
from mcore_longctx.formats.safetensors_io import read_json
from mcore_longctx.manifest import sha256_file
from mcore_longctx.reading import is_there, regular_size
from mcore_longctx.rope import RopeScaling, merge_hf_rope

__all__ = [
    "GENERATION_CONFIG",
    "LENGTH_KEYS",
    "TOKENIZER_CONFIG",
    "carried_files",
    "check_sidecars",
    "copy_sidecars",
    "export_config",
    "tokenizer_sha256",
    "write_hf_config",
    "write_hf_sidecars",
]

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
# A list of what is carried, so that weights, code and a model card about another model never are. What tokenizers need: Llama 3,
# Qwen and most others tokenizer.json (Qwen's slow one vocab.json and merges.txt), Llama 2 and Skywork tokenizer.model, Mistral
# tekken.json or tokenizer.model.v3.
_CARRIED = (
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
_CARRIED_PATTERNS = ("tokenizer.model.v*", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NEVER = (".py", ".safetensors", ".bin", ".pt", ".pth")

# SGLang takes the first of these that config.json has for the model's length, before max_position_embeddings
LENGTH_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length")
# would send a reader to code or a place that does not come along, or say how weights were quantised that no longer are
_DROPPED = ("auto_map", "_name_or_path", "quantization_config", *LENGTH_KEYS)


def carried_files(source: Path) -> list[str]:
    """Names of the files of a model folder that travel with the weights, broken links too. `config.json` is not among them."""
    found = {source / name for name in _CARRIED} | {path for pattern in _CARRIED_PATTERNS for path in source.glob(pattern)}
    return sorted(path.name for path in found if is_there(path) and not path.is_dir() and path.suffix not in _NEVER)


def check_sidecars(source: Path) -> None:
    """Whether the carried files of a model folder can be: opened, and those that an export edits parsed.

    Raises:
        CheckpointError: one that is no regular file, that cannot be opened, or whose JSON is damaged.
    """
    for name in carried_files(source):
        path = source / name
        regular_size(path)
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise CheckpointError(f"cannot be opened ({error.strerror})", where=path) from None
        if name in (GENERATION_CONFIG, TOKENIZER_CONFIG):
            read_json(path)


def copy_sidecars(source: Path, target: Path) -> list[str]:
    """Copy the carried files of a model folder into `target` and return their names."""
    carried = carried_files(source)
    for name in carried:
        shutil.copyfile(source / name, target / name)
    return carried


def write_hf_sidecars(
    view: CheckpointView,
    folder: Path,
    *,
    source: Path,
    rope: RopeScaling,
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write all that an export has beside weights and index: config.json, tokenizer, generation settings, licences.

    Args:
        view: the checkpoint that is exported.
        folder: the export.
        source: folder with the model's tokenizer files (`hf/` of a checkpoint, or the folder of `--config`).
        rope: written to config.json; its length also to tokenizer_config.json.
        dtype: torch's name of the weights' element type; of FP8 weights that of all else.
        quantization: `quantization_config` of quantised weights.

    Raises:
        ConfigError: as `export_config`.
        CheckpointError: a JSON file in `source` that cannot be read.
    """
    copy_sidecars(source, folder)
    write_hf_config(view, folder, rope=rope, dtype=dtype, quantization=quantization)
    # a stale max_length would cut what servers and transformers generate; EOS ids and sampling stay as they are
    _edit_json(folder / GENERATION_CONFIG, {}, drop=("max_length",))
    _edit_json(
        folder / TOKENIZER_CONFIG, {"model_max_length": rope.resolved_max_position_embeddings}, drop=("auto_map", "name_or_path")
    )


def write_hf_config(
    view: CheckpointView, folder: Path, *, rope: RopeScaling, dtype: str, quantization: Mapping[str, Any] | None = None
) -> None:
    """Write `export_config` as config.json. Raises as it does."""
    _write_json(folder / CONFIG, export_config(view, rope=rope, dtype=dtype, quantization=quantization))


def export_config(
    view: CheckpointView, *, rope: RopeScaling, dtype: str, quantization: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of an export: the model's own, with this rope in both spellings and its length.

    Whatever servers look for is there, even where transformers would take a default (`architectures`, `head_dim`,
    `num_key_value_heads`, both spellings of the element type). What would send them elsewhere is not: keys that SGLang reads as a
    length, `auto_map`, an old `quantization_config`.

    Raises:
        ConfigError: a rope that a Hugging Face config cannot hold (`mcore_longctx.rope.write_hf_rope`).
    """
    config = {key: value for key, value in config_for_export(view.config).items() if key not in _DROPPED}
    if not config.get("architectures"):
        config["architectures"] = [family_of(config).architectures[0]]
    config |= {"head_dim": view.shape.kv_channels, "num_key_value_heads": view.shape.num_query_groups}
    config = merge_hf_rope(config, rope) | {"torch_dtype": dtype, "dtype": dtype}  # transformers 4 and vLLM read the first
    return config if quantization is None else {**config, "quantization_config": dict(quantization)}


def tokenizer_sha256(folder: Path) -> str | None:
    """SHA-256 of the tokenizer: `tokenizer.json`, else `tokenizer.model`, else `tekken.json`; None if the folder has none."""
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json"):
        if (folder / name).is_file():
            return sha256_file(folder / name)
    return None


def _edit_json(path: Path, values: Mapping[str, Any], *, drop: tuple[str, ...]) -> None:
    """Set and drop keys of a JSON file, if there is one. Others keep their places."""
    if path.exists():
        kept = {key: value for key, value in read_json(path).items() if key not in drop}
        _write_json(path, {**kept, **values})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
