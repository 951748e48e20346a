"""The rope that the flags ask for, as one value: it reaches the model through our rotary embedding, whatever Megatron-LM drops.

pretrain_gpt.py drops `--rope-scaling-factor` in every version: with 512 asked for, the model is built with 8 and trains without a
word. Here each rope flag either counts or is refused.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Set
from pathlib import Path
from typing import Any, NoReturn

from mcore_longctx.errors import ConfigError
from mcore_longctx.rope import RopeScaling, read_hf_rope
from mcore_longctx.rope.frequencies import temperature

__all__ = ["rope_of"]

# Llama 3's scaling as Megatron writes it down: only the factor is a flag
_LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# dest of a flag -> (field of RopeScaling, what Megatron takes where the flag is not given)
_YARN: dict[str, tuple[str, Any]] = {
    "rotary_scaling_factor": ("factor", 1.0),
    "yarn_original_max_position_embeddings": ("original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("beta_fast", 32.0),
    "yarn_beta_slow": ("beta_slow", 1.0),
    "yarn_correction_range_round_to_int": ("truncate", True),
}
_YARN_TEMPERATURE = ("mscale", "mscale_all_dim")
_SCALING = {"use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", *_YARN, *_YARN_TEMPERATURE}
_WHERE = "rope flags"


def rope_of(args: Namespace, given: Set[str]) -> RopeScaling:
    """The rope to train with.

    Args:
        args: parsed flags of Megatron-LM and ours.
        given: names of those that stand on the command line.

    Raises:
        ConfigError: flags that contradict each other, have no effect on the kind of rope that is asked for, or ask for something
            that the rotary embedding does not compute.
    """
    head_dim = args.kv_channels or args.hidden_size // args.num_attention_heads
    _check_computed(args)
    if args.longctx_rope is None:
        return _rope_in_flags(args, given, head_dim, args.rotary_base)
    rope = _read(args.longctx_rope)
    if rope.head_dim != head_dim:
        _refuse(
            f"is for heads of {rope.head_dim}, the model's have {head_dim}",
            where=_where_of_file(args),
            fix="check --kv-channels, --hidden-size and --num-attention-heads",
        )
    if "rotary_base" in given and args.rotary_base != rope.rope_theta:
        _contradiction(f"--rotary-base {args.rotary_base}", args, rope)
    if given & _SCALING:
        said = _rope_in_flags(args, given, head_dim, rope.rope_theta)
        if said.fingerprint() != rope.fingerprint():
            _contradiction(", ".join(_flag(name) for name in sorted(given & _SCALING)), args, rope)
    return rope


def _check_computed(args: Namespace) -> None:
    kind = args.position_embedding_type
    if args.use_rotary_position_embeddings and kind == "yarn":
        _refuse("--use-rotary-position-embeddings turns yarn into rope without scaling", fix="leave it out: it is deprecated")
    if kind not in ("rope", "yarn") and not args.use_rotary_position_embeddings:
        _refuse(
            f"--position-embedding-type is {kind}, and what is trained here has a rope",
            fix="give --position-embedding-type rope, or --longctx-rope",
        )
    if args.rotary_percent != 1.0:
        _refuse(f"--rotary-percent is {args.rotary_percent:g}; partly rotated heads are not supported")
    if args.rotary_interleaved:
        _refuse("--rotary-interleaved is not supported: pairs are those of Llama, i and i + d/2")


def _rope_in_flags(args: Namespace, given: Set[str], head_dim: int, base: float) -> RopeScaling:
    """What --position-embedding-type and the flags of its kind say."""
    is_yarn = args.position_embedding_type == "yarn"
    without_effect = given & ({"use_rope_scaling", "rope_scaling_factor"} if is_yarn else {*_YARN, *_YARN_TEMPERATURE})
    if without_effect:
        kind = args.position_embedding_type
        other = "rope, scaled by --use-rope-scaling --rope-scaling-factor" if is_yarn else "yarn"
        _refuse(
            f"{_flag(min(without_effect))} has no effect with --position-embedding-type {kind}",
            fix=f"leave it out, or give --position-embedding-type {other}",
        )
    if "rope_scaling_factor" in given and not args.use_rope_scaling:
        _refuse("--rope-scaling-factor has no effect without --use-rope-scaling", fix="give both, or neither")
    stretch = args.rotary_seq_len_interpolation_factor
    if stretch is not None and (is_yarn or args.use_rope_scaling):
        _refuse("--rotary-seq-len-interpolation-factor scales a second time what is scaled already", fix="leave one out")
    values: dict[str, Any] = {"type": "none"}
    if is_yarn:
        if args.rotary_scaling_factor == 1.0:
            _refuse("YaRN without a factor scales nothing", fix="give --rotary-scaling-factor")
        values = {"type": "yarn", **_yarn_settings(args)}
    elif args.use_rope_scaling:
        values = {"type": "llama3", "factor": args.rope_scaling_factor, **_LLAMA3}
    elif stretch is not None:
        values = {"type": "linear", "factor": stretch}
    try:
        return RopeScaling(head_dim=head_dim, rope_theta=base, **values)
    except ValueError as error:
        raise ConfigError(str(error), where=_WHERE) from None


def _yarn_settings(args: Namespace) -> dict[str, Any]:
    settings = {}
    for name, (field, default) in _YARN.items():
        value = getattr(args, name)
        settings[field] = default if value is None else value
    # Megatron's rule: with mscale 1 and mscale_all_dim 0 this is YaRN's own temperature
    mscale, all_dim = (temperature(settings["factor"], getattr(args, name)) for name in _YARN_TEMPERATURE)
    return settings | {"attention_factor": mscale / all_dim}


def _read(said: str) -> RopeScaling:
    """The rope of a config.json: of its text, of its path, or of the folder that it is in."""
    text, where = said, "--longctx-rope"
    if not _is_json(said):
        file = Path(said) / "config.json" if Path(said).is_dir() else Path(said)
        where = f"--longctx-rope {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=where) from None
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", where=where) from None
    rope = read_hf_rope(config, where=where)
    rope.check_trainable()
    return rope


def _is_json(said: str) -> bool:
    return said.lstrip().startswith("{")


def _contradiction(flags: str, args: Namespace, rope: RopeScaling) -> NoReturn:
    _refuse(
        f"contradicted by {flags}: the file says {rope.describe()}",
        where=_where_of_file(args),
        fix="leave these flags out, or change the file",
    )


def _where_of_file(args: Namespace) -> str:
    return "--longctx-rope" if _is_json(args.longctx_rope) else f"--longctx-rope {args.longctx_rope}"


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _refuse(what: str, *, where: str = _WHERE, fix: str = "") -> NoReturn:
    raise ConfigError(what, where=where, fix=fix)
