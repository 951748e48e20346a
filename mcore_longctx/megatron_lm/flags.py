"""The flags: Megatron-LM's, ours, and those that this machine needs."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, get_args

import torch

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.models.gpt import gpt_layer_specs

from mcore_longctx.errors import ConfigError
from mcore_longctx.megatron_compat import quiet_import
from mcore_longctx.model.recompute import RecomputePolicy
from mcore_longctx.units import parse_count

if TYPE_CHECKING:
    from mcore_longctx.megatron_lm.programs import Program

__all__ = ["CommandLine", "extra_args_provider", "parse"]

_WITHOUT_CUDA = (
    *("--distributed-backend", "gloo", "--use-cpu-initialization", "--num-workers", "0"),
    *("--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion"),
)
_WITHOUT_TE = ("--transformer-impl", "local", "--no-persist-layer-norm")
_WITHOUT_APEX = ("--no-gradient-accumulation-fusion",)
# Angles come from our rotary embedding, and a mask of s x s entries cannot exist at these lengths.
_ALWAYS = ("--no-rope-fusion", "--no-create-attention-mask-in-dataloader")


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the flags that were added to it, everything together, the values, and which of them the user gave."""

    added: tuple[str, ...]
    line: tuple[str, ...]
    args: argparse.Namespace
    given: frozenset[str]


def parse(argv: Sequence[str], program: Program) -> CommandLine:
    """Parse `argv`, with the flags that this machine needs in front: those of the user come later and win.

    Raises:
        ConfigError: an unknown flag or a value that cannot be one.
    """
    with quiet_import():
        from megatron.training.arguments import add_megatron_arguments

    added = machine_flags()
    if any(text.split("=")[0] == "--longctx-rope" for text in argv):
        added += ("--position-embedding-type", "rope")
    parser = extra_args_provider(program)(add_megatron_arguments(_Parser()))
    try:
        args = parser.parse_args([*added, *argv])
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        given = frozenset(vars(parser.parse_args(list(argv))))
    except KeyError as error:  # flags whose values are the names of an enum look them up without a word
        raise ConfigError(f"{error} is not a value of the flag it is given to", where="command line") from None
    return CommandLine(added, (*added, *argv), args, given)


def machine_flags() -> tuple[str, ...]:
    """Flags without which the program stops here: for what is not installed, and for what this machine does not have."""
    flags: tuple[str, ...] = _ALWAYS
    if not torch.cuda.is_available():
        flags += _WITHOUT_CUDA
    if not gpt_layer_specs.HAVE_TE:
        flags += _WITHOUT_TE
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        flags += _WITHOUT_APEX
    return flags


def extra_args_provider(program: Program) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """What `parse_args` of Megatron-LM takes: adds our flags to its parser."""

    def add(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        if program.extra_args is not None:
            parser = program.extra_args(parser)
        group = parser.add_argument_group("mcore-longctx", "docs/megatron_lm.md")
        group.add_argument(
            "--longctx-rope",
            metavar="PATH",
            help="config.json of a Hugging Face model, its folder, or the JSON itself: train with this rope instead of that of the rope"
            " flags",
        )
        group.add_argument(
            "--longctx-phase-dtype",
            choices=("float32", "float64"),
            default="float32",
            help="float32: the bits of transformers; float64: angles right to 1e-6 rad at 4M tokens",
        )
        group.add_argument(
            "--longctx-recompute",
            choices=get_args(RecomputePolicy),
            default="none",
            help="what our layers keep for the backward pass (attention_kept: attention is never computed twice); docs/memory.md",
        )
        group.add_argument(
            "--longctx-mlp-tile", type=token_count, metavar="TOKENS", help="tokens of the MLP computed at once (default: all)"
        )
        group.add_argument(
            "--longctx-loss-chunk",
            type=token_count,
            metavar="TOKENS",
            help="tokens whose logits are held at once in the loss (default: as many as 256 MiB hold)",
        )
        group.add_argument(
            "--longctx-data",
            metavar="PREFIX",
            help="packed samples of mcore-longctx data, in the order and with the loss masks of mcore-longctx train; in place of"
            " --data-path",
        )
        group.add_argument(
            "--megatron-lm",
            metavar="PATH",
            help="a checkout of Megatron-LM, whose pretrain_gpt.py then supplies batches, datasets and loss (or MEGATRON_LM_PATH)",
        )
        return parser

    return add


def token_count(text: str) -> int:
    """A number of tokens above 0; 8k, as recipes write it, is 8,192. Raises ValueError."""
    number = parse_count(text)
    if number < 1:
        raise ValueError
    return number


class _Parser(argparse.ArgumentParser):
    """Says what is wrong, without the usage of 850 flags."""

    def __init__(self) -> None:
        usage = "python -m mcore_longctx.megatron_lm FLAGS"
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="command line", fix="--help lists all flags")


class _HelpFormatter(argparse.HelpFormatter):
    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError):  # Megatron-LM writes a bare %, and its own --help ends there
            return action.help or ""
