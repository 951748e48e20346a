"""`mcore-longctx quantize`: FP8 with calibrated scales."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_longctx.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

_DESCRIPTION = """\
Scales that servers cannot find by themselves: of the inputs of each linear layer, and of keys and values in the cache.

  mcore-longctx quantize calibrate exported-1m exported-1m-fp8 --data books.jsonl --lengths 512,32768,131072 --kv

Needs nvidia-modelopt (pip install 'mcore-longctx[quantize]'). FP8 weights with scales made at run time need nothing:
`mcore-longctx convert export CHECKPOINT OUT --quantize fp8`.
"""
_SHORTEST = 16


def add_parser(subparsers: Any) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "quantize",
        help="FP8 with calibrated scales, for servers",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    calibrating = actions.add_parser(
        "calibrate",
        help="Hugging Face folder -> FP8 folder with static scales (modelopt format)",
        description="Exit code 1, and no folder, if a largest magnitude grows more than 2 times from the first length to the last.",
    )
    calibrating.add_argument("hf", type=Path, metavar="HF", help="folder of an unquantised model, as `convert export` writes it")
    calibrating.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    calibrating.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="text to calibrate with (.jsonl, .txt, .md, .parquet, or a folder)",
    )
    calibrating.add_argument(
        "--lengths",
        required=True,
        metavar="N,N,...",
        help="context lengths in tokens, two or more: the same tokens are measured at each, cut into windows of it",
    )
    calibrating.add_argument("--kv", action="store_true", help="scales for an FP8 KV cache, too")


def run(args: argparse.Namespace) -> int:
    """Calibrate; the folder appears whole or not at all."""
    from mcore_longctx.convert.quantization import QUANTIZE_REPORT
    from mcore_longctx.convert.sidecars import copy_sidecars
    from mcore_longctx.families import read_shape
    from mcore_longctx.formats.safetensors_io import read_json
    from mcore_longctx.manifest import staged_folder, write_manifest
    from mcore_longctx.recipe import CARD
    from mcore_longctx.rope import read_hf_rope

    if args.out.exists():
        raise ConfigError("output folder is already there", where=args.out, fix="choose another name or remove it")
    path = args.hf / "config.json"
    if not path.is_file():
        raise CheckpointError("no config.json: not a Hugging Face folder", where=args.hf, fix="check the path")
    config = read_json(path)
    shape, rope = read_shape(config, where=path), read_hf_rope(config, where=path)
    lengths = _lengths(args.lengths, rope.resolved_max_position_embeddings, path)
    windows = _windows(args.hf, args.data, lengths, shape.vocab_size)

    from mcore_longctx.model.quantize import calibrate

    with staged_folder(args.out) as folder:
        found = calibrate(args.hf, folder, windows, kv=args.kv, say=lambda line: print(f"  {line}", flush=True))
        copy_sidecars(args.hf, folder)
        if (args.hf / CARD).is_file():
            shutil.copyfile(args.hf / CARD, folder / CARD)
        report = found.as_dict()
        (folder / QUANTIZE_REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        weights = [file.name for file in folder.glob("*.safetensors")]
        write_manifest(folder, "quantized", sizes_only=weights, rope_fingerprint=rope.fingerprint())
    worst = max(found.weights.values(), key=lambda row: row["relative_rms"])["relative_rms"]
    print(
        f"{args.out}: FP8, {len(found.weights):,} linear layers{' and the KV cache' if args.kv else ''}; scales grow at most "
        f"{report['growth']:.2f} times from {lengths[0]:,} to {lengths[-1]:,} tokens; weights off by at most {worst:.3f}"
    )
    return 0


def _lengths(text: str, longest: int | None, config: Path) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of lengths", where="--lengths", fix="write 512,32768,131072") from None
    if len(lengths) < 2 or lengths != sorted(set(lengths)) or lengths[0] < _SHORTEST:
        raise ConfigError(
            f"{text!r}: expected two or more lengths of at least {_SHORTEST}, ascending",
            where="--lengths",
            fix="scales are compared between the first and the last",
        )
    if longest is not None and lengths[-1] > longest:
        raise ConfigError(f"{lengths[-1]:,} tokens, the model's context has {longest:,}", where="--lengths", fix=f"see {config}")
    return lengths


def _windows(hf: Path, data: Path, lengths: list[int], vocab_size: int) -> Mapping[int, list[Tensor]]:
    """The same text at each length: as many windows of it as fit into one of the longest, begin tokens included."""
    from mcore_longctx.data.documents.readers import read_texts
    from mcore_longctx.data.tokenizers.evaluation import EvaluationTokenizer
    from mcore_longctx.evaluate.held_out import cut_windows

    tokenizer = EvaluationTokenizer(hf, vocab_size)
    needed = lengths[-1] - len(tokenizer.prefix)
    parts, found = [], 0
    for text in read_texts(data):
        parts.append(tokenizer.encode_array(text if text.endswith("\n") else text + "\n"))
        found += len(parts[-1])
        if found >= needed:
            break
    if found < needed:
        raise DataError(
            f"{found:,} tokens of text, a window of {lengths[-1]:,} needs {needed:,}",
            where=data,
            fix="give more text, or shorter --lengths",
        )

    import numpy as np
    import torch

    tokens = np.concatenate(parts)[:needed]
    cut = {
        length: cut_windows(tokens, tokenizer.prefix, count=lengths[-1] // length, length=length, where=data).tokens
        for length in lengths
    }
    return {length: list(torch.from_numpy(windows)) for length, windows in cut.items()}
