"""What `mcore-longctx convert` does, from its arguments to the room `convert/`."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_longctx.errors import ConfigError

if TYPE_CHECKING:
    from mcore_longctx.convert import Execution, Plan
    from mcore_longctx.rope import RopeScaling

__all__ = ["check", "export", "import_", "inspect", "merge", "verify"]


def import_(args: argparse.Namespace) -> int:
    """Hugging Face folder -> torch_dist."""
    from mcore_longctx import convert

    old, rope = _ropes(args, args.hf, None)
    settings: dict[str, Any] = {
        "rope": rope,
        "dtype": _dtype(args.dtype),
        "chunks_for_tp": args.chunks_for_tp,
        "vocab_multiple": args.vocab_multiple,
        "stacked": args.layer_keys == "stacked",
    }
    if args.dry_run:
        return _show_plan(convert.plan_import(args.hf, **settings), args.out)
    if not convert.import_hf(args.hf, args.out, **settings, how=_execution(args)):
        return 0  # another task of the step finished it
    _show_rope(old, rope)
    return _describe(args.out)


def export(args: argparse.Namespace) -> int:
    """torch_dist -> Hugging Face folder."""
    from mcore_longctx import convert

    old, rope = _ropes(args, args.checkpoint, args.config)
    settings: dict[str, Any] = {
        "config": args.config,
        "rope": rope,
        "dtype": _dtype(args.dtype),
        "shard_bytes": _parse_bytes(args.shard_size),
        "from_master": args.from_master,
        "quantize": args.quantize,
    }
    if args.dry_run:
        return _show_plan(convert.plan_export(args.checkpoint, **settings), args.out)
    if not convert.export_hf(args.checkpoint, args.out, **settings, how=_execution(args)):
        return 0  # another task of the step finished it
    _show_notes(args.out)
    _show_rope(old, rope)
    return _describe_quantized(args.out) if args.quantize else _describe(args.out)


def merge(args: argparse.Namespace) -> int:
    """Weighted sum of two checkpoints."""
    from mcore_longctx import convert

    weights = _weights(args.weights)
    if args.dry_run:
        return _show_plan(convert.plan_merge(args.first, args.second, weights=weights, config=args.config), args.out)
    if not convert.merge(args.first, args.second, args.out, weights=weights, config=args.config, how=_execution(args)):
        return 0  # another task of the step finished it
    _show_notes(args.out)
    return _describe(args.out)


def verify(args: argparse.Namespace) -> int:
    """Compare two checkpoints; 1 if they differ."""
    from mcore_longctx.convert import compare
    from mcore_longctx.convert.disk import io_errors
    from mcore_longctx.manifest import write_atomic

    if args.text is not None and not args.logits:
        raise ConfigError("--text compares log-probabilities", where="convert verify", fix="give --logits, too")
    if args.json_file is not None:
        _check_file(args.json_file)
    report = compare(args.first, args.second, config=args.config)
    equal, facts, texts = report.equal, report.as_dict(), [report.text()]
    if args.logits:
        from mcore_longctx.evaluate.logits import compare_logits

        logits = compare_logits(args.first, args.second, text=args.text, config=args.config)
        equal, facts = equal and logits.equal, {**facts, "equal": equal and logits.equal, "logits": logits.as_dict()}
        texts.append(logits.text())
    text = json.dumps(facts, indent=1)
    if args.json_file is not None:
        with io_errors():
            write_atomic(args.json_file, text + "\n")
    print(text if args.json else "\n".join(texts))
    return 0 if equal else 1


def inspect(args: argparse.Namespace) -> int:
    """What is in a folder."""
    from mcore_longctx.convert import describe_folder, inspect_folder

    facts = inspect_folder(args.path)
    print(json.dumps(facts, indent=1) if args.json else describe_folder(facts))
    return 0


def check(args: argparse.Namespace) -> int:
    """What servers will make of a Hugging Face folder; 1 if something is wrong."""
    from mcore_longctx.convert import check_folder

    report = check_folder(args.path)
    print(json.dumps(report.as_dict(), indent=1) if args.json else report.text())
    return 0 if report.good else 1


def _execution(args: argparse.Namespace) -> Execution:
    from mcore_longctx.convert import Execution

    return Execution(workers=args.workers, fsync=not args.no_fsync, checksum=args.checksum, srun=args.srun)


def _check_file(path: Path) -> None:
    """Raise ConfigError where no file can be written: a comparison may take long."""
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError("is a folder", where=path, fix="name a file")
    if not folder.is_dir():
        raise ConfigError("its folder is not there", where=path, fix="make the folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError("its folder cannot be written", where=path, fix="choose another")


def _ropes(args: argparse.Namespace, source: Path, config: Path | None) -> tuple[RopeScaling | None, RopeScaling | None]:
    """The rope of the source and the one that `--rope` makes of it; nothing without `--rope`."""
    if args.rope is None:
        return None, None
    from mcore_longctx.convert import open_checkpoint
    from mcore_longctx.convert.copying.execute import failures_told_to_rank_0
    from mcore_longctx.convert.disk import io_errors
    from mcore_longctx.rope import parse_rope_spec

    with io_errors(), failures_told_to_rank_0(args.out, _execution(args)):
        old = open_checkpoint(source, config=config).rope
        return old, parse_rope_spec(args.rope, old)


def _show_rope(old: RopeScaling | None, new: RopeScaling | None) -> None:
    if old is not None and new is not None:
        print(f"rope: {old.describe()} -> {new.describe()}")


def _show_notes(out: Path) -> None:
    """What could not be checked of the source: its manifest says it."""
    from mcore_longctx.manifest import MANIFEST

    for note in json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("notes", []):
        print(f"note: {note}")


def _dtype(name: str) -> str | None:
    return {"keep": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[name]


def _show_plan(plan: Plan, out: Path) -> int:
    from mcore_longctx.convert.disk import free_bytes
    from mcore_longctx.manifest import readable_bytes

    print(f"{out}: {len(plan.files):,} files of {readable_bytes(plan.bytes)} from {len(plan.sources):,} files; nothing written")
    print(f"free on its file system: {readable_bytes(free_bytes(out))}")
    return 0


def _describe(out: Path) -> int:
    from mcore_longctx.convert import open_checkpoint

    view = open_checkpoint(out)
    print(f"{out}: {view.num_parameters:,} parameters, {' and '.join(view.dtypes)}; rope {view.rope.describe()}")
    return 0


def _describe_quantized(out: Path) -> int:
    """A folder of FP8 weights is for servers: `open_checkpoint` refuses it."""
    from mcore_longctx.convert.quantization import QUANTIZE_REPORT

    report = json.loads((out / QUANTIZE_REPORT).read_text(encoding="utf-8"))
    total, worst = report["total"], max(row["relative_rms"] for row in report["tensors"].values())
    print(
        f"{out}: {total['tensors']:,} matrices in float8_e4m3fn, relative error {total['relative_rms']:.4f} "
        f"(largest {worst:.4f}); details in {QUANTIZE_REPORT}"
    )
    return 0


def _weights(text: str) -> tuple[float, float]:
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is not two numbers", where="--weights", fix="write 0.5,0.5") from None
    return first, second


def _parse_bytes(text: str) -> int:
    """Bytes from `5GB`, `500MB`, `1000000` (decimal units, as transformers counts them)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KB|MB|GB)", text.strip(), re.IGNORECASE)
    size = float(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2].upper()] if match else 0.0
    if not 1 <= size < 2**63:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise ConfigError(f"{shown!r} is not a file size", where="--shard-size", fix="write 5GB or 500MB")
    return int(size)
