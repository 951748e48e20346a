"""The files that travel beside the weights: config.json, generation settings, tokenizer, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from mcore_longctx.manifest import sha256_file

__all__ = ["carried_files", "copy_sidecars", "tokenizer_sha256"]

# A list of what is carried, so that weights, code and a model card about another model never are.
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_CARRIED_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_NEVER = (".py", ".safetensors", ".bin", ".pt", ".pth")


def carried_files(source: Path) -> list[str]:
    """Names of the files of a model folder that travel with the weights. `config.json` is not among them."""
    found = {source / name for name in _CARRIED} | {path for pattern in _CARRIED_PATTERNS for path in source.glob(pattern)}
    return sorted(path.name for path in found if path.is_file() and path.suffix not in _NEVER)


def copy_sidecars(source: Path, target: Path) -> list[str]:
    """Copy the carried files of a model folder into `target` and return their names."""
    carried = carried_files(source)
    for name in carried:
        shutil.copyfile(source / name, target / name)
    return carried


def tokenizer_sha256(folder: Path) -> str | None:
    """SHA-256 of the tokenizer: `tokenizer.json`, else `tokenizer.model`; None if the folder has neither."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return sha256_file(folder / name)
    return None
