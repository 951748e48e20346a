"""`mcore-longctx convert`: its options. What the actions do stands in `convert_actions.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Convert a model between Hugging Face safetensors and Megatron torch_dist by copying ranges of bytes: bit for bit, without torch, in the
memory of a bare interpreter. Llama, Mistral, Qwen2, Qwen3 and Skywork; docs/convert.md tells what is checked.

  mcore-longctx convert import Llama-3.1-8B checkpoints/base        loads at any TP and PP, megatron-core 0.16.1 and 0.19.2
  mcore-longctx convert import Llama-3.1-8B base --rope llama3:128  another rope from here on: the weights stay, the card says so
  mcore-longctx convert export checkpoints/extend/iter_0000200 out  loads in transformers 4 and 5, vLLM, SGLang
  mcore-longctx convert export MEGATRON_LM_SAVE out --config HF     any torch_dist folder, with the config of its model
  mcore-longctx convert verify checkpoints/base Llama-3.1-8B        exit 1 and names where anything differs
  mcore-longctx convert inspect out                                 sizes, rope in words, context, who would read that rope wrongly
  mcore-longctx convert check out                                   what servers will make of it, and the commands to serve it
  mcore-longctx convert merge A B out --weights 0.5,0.5             weighted mean of two checkpoints of one model

A folder appears whole or not at all. A run that is killed goes on where it stopped: give the same command again.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face <-> Megatron checkpoints: import, export, verify, inspect, check, merge",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_import(actions)
    _add_export(actions)
    _add_verify(actions)
    _add_inspect(actions)
    _add_check(actions)
    _add_merge(actions)


def _add_import(actions: Any) -> None:
    parser = actions.add_parser("import", help="Hugging Face folder -> torch_dist checkpoint")
    parser.add_argument("hf", type=Path, metavar="HF", help="folder with config.json, safetensors (or .bin) and tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make")
    _add_rope(parser)
    _add_dtype(parser)
    parser.add_argument(
        "--chunks-for-tp",
        type=int,
        default=1,
        metavar="N",
        help="store each matrix in the pieces that ranks of tensor parallel size N read (default 1: whole). Loads at any size; at N "
        "no rank reads more than its own",
    )
    parser.add_argument(
        "--vocab-multiple",
        type=int,
        default=128,
        metavar="N",
        help="pad the vocabulary to a multiple of N x chunks-for-tp, as Megatron's --make-vocab-size-divisible-by (default 128)",
    )
    parser.add_argument(
        "--layer-keys",
        choices=("stacked", "per-layer"),
        default="stacked",
        help="one tensor over all layers (Megatron-LM's default), or one a layer (models of unlike layers)",
    )
    _add_execution(parser)


def _add_export(actions: Any) -> None:
    parser = actions.add_parser("export", help="torch_dist checkpoint -> Hugging Face folder")
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="folder with .metadata, an iter_* or release folder, or the folder above",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="Hugging Face folder to make")
    _add_config(parser)
    _add_rope(parser)
    _add_dtype(parser)
    parser.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest safetensors file, for example 500MB (default 5GB)"
    )
    parser.add_argument("--from-master", action="store_true", help="take the optimizer's float32 weights in place of the model's")
    parser.add_argument(
        "--quantize",
        choices=("fp8",),
        help="linear weights as float8_e4m3 with a scale a row (compressed-tensors); no GPU needed",
    )
    _add_execution(parser)


def _add_verify(actions: Any) -> None:
    parser = actions.add_parser("verify", help="compare two checkpoints of either format, tensor by tensor")
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    _add_config(parser)
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also compare inverse frequencies and logits, up to the end of the context: A through megatron-core, B through "
        "transformers (both must be installed)",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="with --logits: compare log-probabilities of this text, too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--json-file", type=Path, metavar="FILE", help="write the result as JSON to FILE, too")


def _add_inspect(actions: Any) -> None:
    parser = actions.add_parser("inspect", help="what is in a checkpoint, and what its rope really is")
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _add_check(actions: Any) -> None:
    parser = actions.add_parser(
        "check", help="what vLLM, SGLang and transformers will make of a Hugging Face folder; exit 1 on errors"
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="Hugging Face folder")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _add_merge(actions: Any) -> None:
    parser = actions.add_parser("merge", help="weighted sum of two checkpoints of one model")
    parser.add_argument("first", type=Path, metavar="A")
    parser.add_argument("second", type=Path, metavar="B")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make, in the format of A")
    parser.add_argument("--weights", default="0.5,0.5", metavar="X,Y", help="of A and of B (default 0.5,0.5)")
    _add_config(parser)
    _add_execution(parser)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="config.json of the model, or its folder, for a checkpoint that Megatron-LM or Megatron-Bridge wrote",
    )


def _add_rope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rope",
        metavar="SPEC",
        help="change the rope on the way: TYPE[:FACTOR][,key=value...], for example llama3:128 or yarn:32,original=8192 "
        "(docs/rope.md); the weights stay as they are",
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("keep", "bf16", "fp16", "fp32"),
        default="keep",
        help="element type of the weights (default: as they are)",
    )


def _add_execution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that copy (default 1)")
    parser.add_argument(
        "--checksum",
        action="store_true",
        help="compare the source with its manifest's sha256 and list sha256 of what is written (reads everything once more)",
    )
    parser.add_argument(
        "--no-fsync", action="store_true", help="do not wait for the disk, as cp; a power cut may cost the output"
    )
    parser.add_argument(
        "--srun",
        action="store_true",
        help="this is one of the tasks of an srun step, which share the work; OUT is on a shared disk",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written; reads headers only")


def run(args: argparse.Namespace) -> int:
    """Do one action; 1 if `verify` found a difference or `check` an error."""
    from mcore_longctx.cli import convert_actions

    action = {
        "import": convert_actions.import_,
        "export": convert_actions.export,
        "verify": convert_actions.verify,
        "inspect": convert_actions.inspect,
        "check": convert_actions.check,
        "merge": convert_actions.merge,
    }[args.action]
    return action(args)
