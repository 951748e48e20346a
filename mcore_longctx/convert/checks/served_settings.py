"""The settings of a Hugging Face folder as servers read them: config.json, generation settings, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_longctx.convert.checks.findings import Findings
from mcore_longctx.convert.sidecars import GENERATION_CONFIG, LENGTH_KEYS, TOKENIZER_CONFIG
from mcore_longctx.convert.views import CONFIG
from mcore_longctx.errors import CheckpointError
from mcore_longctx.families import ModelShape
from mcore_longctx.formats.safetensors_io import read_json
from mcore_longctx.reading import is_there, regular_size

__all__ = ["check_generation", "check_settings", "check_tokenizer", "served_lengths"]

_KEPT_BY_VLLM = ("llama3", "yarn", "longrope", "su", "deepseek_yarn", "mrope", "default")
# vLLM takes the smallest of all these that are there
_VLLM_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
              "max_sequence_length", "max_seq_length", "seq_len")  # fmt: skip
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("tekken.json",), ("vocab.json", "merges.txt"))
_MAX_TOKENIZER = 1 << 30  # 256,000 entries with their merges have 35 MB


def served_lengths(config: Mapping[str, Any]) -> dict[str, int]:
    """The longest request that each server derives from a config.json (0: it finds no length).

    vLLM takes the smallest of the keys that may hold a length and multiplies it by `factor`, unless the rope type counts from an
    original length. SGLang takes the first such key, multiplies it by `factor`, and only leaves that where
    `original_max_position_embeddings` is in the rope settings or the type is llama3.

    Source: vLLM 0.33.0 `_get_and_verify_max_len`, SGLang 0.5.23 `get_context_length`.
    """
    rope = next((section for key in ("rope_scaling", "rope_parameters") if isinstance(section := config.get(key), Mapping)), {})
    kind, factor = rope.get("rope_type", rope.get("type", "default")), _number(rope.get("factor"), 1.0)
    lengths = [value for key in _VLLM_KEYS if (value := _number(config.get(key), 0.0))]
    vllm = min(lengths, default=0.0)
    sglang = next((value for key in (*LENGTH_KEYS, "max_position_embeddings") if (value := _number(config.get(key), 0.0))), 0.0)
    if kind not in _KEPT_BY_VLLM:
        vllm *= factor
    if kind != "llama3" and "original_max_position_embeddings" not in rope:
        sglang *= factor
    return {"vllm": int(vllm), "sglang": int(sglang)}


def _number(value: object, default: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e15  # false for NaN
    return float(value) if usable and isinstance(value, int | float) else default


def check_settings(config: Mapping[str, Any], length: int | None, findings: Findings) -> None:
    """Lengths, and keys of config.json that are missing, stale or contradict each other. `length`: that of the rope."""
    for server, served in served_lengths(config).items():
        if length is not None and served != length:
            name = {"vllm": "vLLM", "sglang": "SGLang"}[server]
            findings.error(CONFIG, f"{name} would take {served:,} tokens for the length, the rope is made for {length:,}")
    for key in LENGTH_KEYS:
        if key in config:
            findings.error(CONFIG, f"{key} is there, which SGLang takes for the length before max_position_embeddings; remove it")
    for key in ("architectures", "model_type", "max_position_embeddings"):
        if not config.get(key):
            findings.error(CONFIG, f"{key} is missing")
    for key in ("head_dim", "num_key_value_heads"):
        if config.get(key) is None:
            findings.warning(CONFIG, f"{key} is missing; servers take a default")
    _check_dtypes(config, findings)
    if "auto_map" in config:
        findings.warning(CONFIG, "auto_map asks readers to run code of the folder (trust_remote_code); remove it")
    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        findings.error(CONFIG, f"sliding_window is {config['sliding_window']!r}: attention would see no further; set it to null")


def _check_dtypes(config: Mapping[str, Any], findings: Findings) -> None:
    old, new = config.get("torch_dtype"), config.get("dtype")
    if old is not None and new is not None and old != new:
        findings.error(CONFIG, f"torch_dtype is {old!r} and dtype {new!r}")
    for key, value in (("torch_dtype", old), ("dtype", new)):
        if value is None:
            findings.warning(CONFIG, f"{key} is missing; transformers 4 reads torch_dtype, 5 dtype, and without it takes float32")


def check_generation(folder: Path, config: Mapping[str, Any], shape: ModelShape | None, findings: Findings) -> None:
    """EOS ids: vLLM and SGLang stop at those of generation_config.json, and at that of config.json."""
    generation = _json(folder / GENERATION_CONFIG, findings)
    if "max_length" in generation:
        findings.warning(
            GENERATION_CONFIG, f"max_length is {generation['max_length']!r}; transformers ends prompt and answer there; remove it"
        )
    ids, others = _ids(generation.get("eos_token_id")), _ids(config.get("eos_token_id"))
    if not ids and not others:
        findings.error(GENERATION_CONFIG, "no eos_token_id here or in config.json: generation never ends by itself")
    elif ids and (lost := sorted(others - ids)):
        findings.warning(GENERATION_CONFIG, f"eos_token_id lacks {lost[0]}, which config.json has")
    if shape is not None and (beyond := sorted(one for one in ids | others if not 0 <= one < shape.vocab_size)):
        findings.error(GENERATION_CONFIG, f"eos_token_id {beyond[0]} is not in the vocabulary of {shape.vocab_size:,}")


def _ids(value: object) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {one for one in values if isinstance(one, int) and not isinstance(one, bool)}


def check_tokenizer(folder: Path, length: int | None, findings: Findings) -> None:
    """Whether a tokenizer is there, and what its settings say."""
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        findings.error("tokenizer", "none here: neither " + ", ".join(" with ".join(names) for names in _TOKENIZERS))
    for name in sorted({name for names in _TOKENIZERS for name in names if is_there(folder / name)}):
        _check_tokenizer_file(folder / name, findings)
    settings = _json(folder / TOKENIZER_CONFIG, findings)
    if not settings:
        findings.warning(TOKENIZER_CONFIG, "missing or empty")
        return
    stated = settings.get("model_max_length")
    if length is not None and stated != length:
        findings.warning(
            TOKENIZER_CONFIG, f"model_max_length is {stated!r}, not {length:,}: transformers warns, harnesses cut there"
        )
    if "auto_map" in settings or settings.get("tokenizer_class") == "SkyworkTokenizer":
        findings.error(
            TOKENIZER_CONFIG,
            "the tokenizer asks for Python code, which servers do not run: name a tokenizer_class of transformers",
        )
    if settings.get("add_bos_token") and "bos_token" in str(settings.get("chat_template", "")):
        findings.warning(TOKENIZER_CONFIG, "both add_bos_token and the chat template add a BOS: chats would begin with two")


def _check_tokenizer_file(path: Path, findings: Findings) -> None:
    """Its size and its first bytes; whether it works, only those who load it know."""
    try:
        size = regular_size(path)
    except CheckpointError as error:
        findings.refused(path.name, error)
        return
    if size == 0:
        findings.error(path.name, "empty")
    elif size > _MAX_TOKENIZER:
        findings.error(path.name, f"{size:,} bytes, larger than any tokenizer")
    else:
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                findings.error(path.name, "a Git LFS pointer, not the tokenizer; run `git lfs pull`")


def _json(path: Path, findings: Findings) -> dict[str, Any]:
    """A JSON file, empty where it is missing or cannot be read (which is found)."""
    if not is_there(path):
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        findings.refused(path.name, error)
        return {}
