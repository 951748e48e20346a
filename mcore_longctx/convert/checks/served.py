"""What vLLM, SGLang and transformers will make of a Hugging Face folder, found out without any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_longctx.convert.checks.commands import serve_commands
from mcore_longctx.convert.checks.findings import Finding, Findings
from mcore_longctx.convert.checks.served_settings import check_generation, check_settings, check_tokenizer, served_lengths
from mcore_longctx.convert.checks.served_weights import check_quantization, check_weights, read_stored
from mcore_longctx.convert.disk import io_errors
from mcore_longctx.convert.views import CONFIG
from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.families import ModelShape, read_shape
from mcore_longctx.formats.dcp_read import is_torch_dist
from mcore_longctx.formats.safetensors_io import read_json
from mcore_longctx.recipe import CARD, read_card
from mcore_longctx.rope import RopeScaling, misreadings, read_hf_rope, write_hf_rope

__all__ = ["FolderReport", "check_folder", "served_lengths"]


@dataclass(frozen=True)
class FolderReport:
    """What `check_folder` found. `good`: no errors; warnings are for programs that may not be yours."""

    folder: Path
    length: int | None
    served: Mapping[str, int]
    rope_in_words: str | None
    findings: tuple[Finding, ...]
    commands: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether there are no errors."""
        return all(finding.level != "error" for finding in self.findings)

    def text(self) -> str:
        """For people: findings, the verdict, and the commands to serve the folder."""
        lines = [str(self.folder)]
        if self.rope_in_words is not None:
            lines.append(f"  rope      {self.rope_in_words}")
        if self.length is not None:
            lines.append(f"  length    {self.length:,} tokens")
        lines += [f"  {name:<10}{length:,} tokens" for name, length in self.served.items()]
        lines += [finding.describe() for finding in self.findings]
        errors = sum(finding.level == "error" for finding in self.findings)
        lines.append(f"{errors} errors, {len(self.findings) - errors} warnings" if self.findings else "nothing wrong found")
        return "\n".join([*lines, *(self.commands if self.good else ())])

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "path": str(self.folder),
            "good": self.good,
            "length": self.length,
            "served": dict(self.served),
            "rope_in_words": self.rope_in_words,
            "findings": [{"level": one.level, "where": one.where, "what": one.what} for one in self.findings],
            "commands": list(self.commands),
        }


@io_errors()
def check_folder(folder: Path) -> FolderReport:
    """Look at everything in a Hugging Face folder that decides how it is served. Reads headers, settings and scales, not weights.

    Checked: sizes and rope; lengths as vLLM and SGLang derive them; keys that are missing or stale; EOS ids; the tokenizer; a
    complete index without unknown tensors; of FP8 folders every scale.

    Raises:
        CheckpointError: no such folder, no config.json, or one that is not JSON.
    """
    if not folder.is_dir():
        what = "is a file, expected a folder" if folder.exists() else "no such folder"
        raise CheckpointError(what, where=folder, fix="check the path")
    if is_torch_dist(folder):
        raise CheckpointError(
            "a Megatron checkpoint; servers read Hugging Face folders", where=folder, fix="use `convert export` first"
        )
    config = read_json(folder / CONFIG)
    findings = Findings()
    rope = _rope(config, findings)
    shape = _shape(config, findings)
    length = None if rope is None else rope.resolved_max_position_embeddings
    _check_trained(folder, rope, findings)
    served = served_lengths(config)
    check_settings(config, length, findings)
    check_generation(folder, config, shape, findings)
    check_tokenizer(folder, length, findings)
    stored = read_stored(folder, findings)
    if stored is not None:
        check_quantization(folder, config, stored, findings)
        if shape is not None:
            check_weights(config, shape, stored, findings)
    commands: list[str] = []
    if shape is not None and stored is not None and length is not None:
        weight_bytes = sum(tensor.nbytes for tensor in stored.values())
        commands = serve_commands(shape, length, weight_bytes=weight_bytes, path=str(folder))
    words = None if rope is None else rope.describe()
    return FolderReport(folder, length, served, words, tuple(findings.found), tuple(commands))


def _rope(config: Mapping[str, Any], findings: Findings) -> RopeScaling | None:
    for found in misreadings(config):
        if not found.program.startswith(("Megatron", "mbridge", "older Megatron")):  # they train, they do not serve
            findings.warning(CONFIG, f"{found.program} {found.does} [{found.source}]")
    try:
        rope = read_hf_rope(config)
    except ConfigError as error:
        findings.refused(CONFIG, error)
        return None
    if rope.type != "dynamic":
        try:
            write_hf_rope(rope)
        except ConfigError as error:
            findings.refused(CONFIG, error)
    return rope


def _check_trained(folder: Path, rope: RopeScaling | None, findings: Findings) -> None:
    """The rope against its own factor, and against that of the checkpoint that was exported."""
    if rope is None or rope.max_position_embeddings is None:
        return
    length = rope.max_position_embeddings
    if rope.type in ("llama3", "yarn") and length < (scaled := int(rope.factor * rope.original_length)):
        findings.error(
            CONFIG,
            f"max_position_embeddings {length:,} is less than factor x original length ({scaled:,}): servers go no further",
        )
    if not (folder / CARD).exists():
        return
    try:
        trained = read_card(folder).rope
    except CheckpointError as error:
        findings.refused(CARD, error)
        return
    if trained.fingerprint() != rope.fingerprint():
        findings.error(CONFIG, f"the rope is not the one that was trained: {trained.describe()}")
    elif (reached := trained.resolved_max_position_embeddings) is not None and reached != length:
        findings.error(CONFIG, f"reaches {length:,} tokens, {reached:,} were trained")


def _shape(config: Mapping[str, Any], findings: Findings) -> ModelShape | None:
    try:
        return read_shape({key: value for key, value in config.items() if key != "quantization_config"})
    except ConfigError as error:
        findings.refused(CONFIG, error)
        return None
