"""`mcore-longctx convert`: Hugging Face <-> Megatron torch_dist."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from mcore_longctx.errors import ConfigError

_DESCRIPTION = """\
Convert a Llama between Hugging Face safetensors and Megatron torch_dist, bit for bit, without torch.

  mcore-longctx convert import Llama-3.1-8B checkpoints/base        loads at any TP and PP, megatron-core 0.16.1 and 0.19.2
  mcore-longctx convert export checkpoints/extend/iter_0000200 out  loads in transformers 4 and 5, vLLM, SGLang
  mcore-longctx convert verify checkpoints/base Llama-3.1-8B        exit 1 and names where anything differs
  mcore-longctx convert inspect out                                 sizes, rope in words, context, stage, manifest

The rope travels with the weights: import stores the model's own, export writes the one that was trained with.
A folder appears whole or not at all.
"""


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face <-> Megatron checkpoints: import, export, verify, inspect",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    importing = actions.add_parser("import", help="Hugging Face folder -> torch_dist checkpoint")
    importing.add_argument("hf", type=Path, metavar="HF", help="folder with config.json, safetensors and tokenizer")
    importing.add_argument("out", type=Path, metavar="OUT", help="checkpoint folder to make")

    exporting = actions.add_parser("export", help="torch_dist checkpoint -> Hugging Face folder")
    exporting.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder with .metadata, made by import or train")
    exporting.add_argument("out", type=Path, metavar="OUT", help="Hugging Face folder to make")
    exporting.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="largest safetensors file, for example 500MB (default 5GB)"
    )

    verifying = actions.add_parser("verify", help="compare two checkpoints of either format, tensor by tensor")
    verifying.add_argument("first", type=Path, metavar="A")
    verifying.add_argument("second", type=Path, metavar="B")
    verifying.add_argument(
        "--logits",
        action="store_true",
        help="also compare inverse frequencies and logits, up to the end of the context: A through megatron-core, B through "
        "transformers (both must be installed)",
    )
    verifying.add_argument("--json", action="store_true", help="print the result as JSON")
    verifying.add_argument("--json-file", type=Path, metavar="FILE", help="write the result as JSON to FILE, too")

    inspecting = actions.add_parser("inspect", help="what is in a checkpoint, and what its rope really is")
    inspecting.add_argument("path", type=Path, metavar="PATH")
    inspecting.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Do one action; 1 if `verify` found a difference."""
    from mcore_longctx import convert

    if args.action == "import":
        convert.import_hf(args.hf, args.out)
    elif args.action == "export":
        convert.export_hf(args.checkpoint, args.out, shard_bytes=_parse_bytes(args.shard_size))
    elif args.action == "verify":
        return _verify(args)
    else:
        facts = convert.inspect_folder(args.path)
        print(json.dumps(facts, indent=1) if args.json else convert.describe_folder(facts))
        return 0
    view = convert.open_checkpoint(args.out)
    print(f"{args.out}: {view.num_parameters:,} parameters, {' and '.join(view.dtypes)}; rope {view.rope.describe()}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mcore_longctx.convert import compare
    from mcore_longctx.manifest import write_atomic

    report = compare(args.first, args.second)
    equal, facts, texts = report.equal, report.as_dict(), [report.text()]
    if args.logits:
        from mcore_longctx.evaluate.logits import compare_logits

        logits = compare_logits(args.first, args.second)
        equal, facts = equal and logits.equal, {**facts, "equal": equal and logits.equal, "logits": logits.as_dict()}
        texts.append(logits.text())
    text = json.dumps(facts, indent=1)
    if args.json_file is not None:
        write_atomic(args.json_file, text + "\n")
    print(text if args.json else "\n".join(texts))
    return 0 if equal else 1


def _parse_bytes(text: str) -> int:
    """Bytes from `5GB`, `500MB`, `1000000` (decimal units, as transformers counts them)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KB|MB|GB)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a file size", where="--shard-size", fix="write 5GB or 500MB")
    return size
