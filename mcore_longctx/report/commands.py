"""Commands that take an exported folder into other people's programs: transformers, vLLM, lm-evaluation-harness.

vLLM's sizes and flags are `convert.checks.commands`'s; nothing is derived twice. lm-eval runs our ruler-like tasks from
`examples/lm_eval_tasks` without a network (docs/lm_eval.md).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from mcore_longctx.convert.checks.commands import GPU_BYTES, kv_bytes, serve_commands, smallest_layout
from mcore_longctx.families import ModelShape

__all__ = ["LM_EVAL_FOLDER", "LM_EVAL_TASKS", "export_commands"]

LM_EVAL_FOLDER = "examples/lm_eval_tasks"  # below the source tree of this project
LM_EVAL_TASKS = ("longctx_needle", "longctx_ruler", "longctx_choices")


def export_commands(
    shape: ModelShape, length: int, *, weight_bytes: int, path: str, settings: Mapping[str, Any] | None = None
) -> list[tuple[str, list[str]]]:
    """(title, lines for a shell). Lines that begin with # are remarks.

    Args:
        shape: of the exported model.
        length: longest request that its config promises, tokens.
        weight_bytes: of the weights in the folder.
        path: of the folder, as the commands name it.
        settings: what lm-eval passes to our tasks: `max_seq_lengths` (those above `length` are left out; none: the model's own length
            and a quarter of it), `haystack`, `samples`, `seed`.
    """
    return [
        ("transformers", _transformers(shape, length, weight_bytes, path)),
        ("vLLM and SGLang", serve_commands(shape, length, weight_bytes=weight_bytes, path=path)),
        ("lm-evaluation-harness", _lm_eval(shape, length, weight_bytes, path, settings or {})),
    ]


def _transformers(shape: ModelShape, length: int, weight_bytes: int, path: str) -> list[str]:
    """One prompt. The text is read from a file, because a prompt of this length fits on no command line."""
    needed = weight_bytes + kv_bytes(shape, length, "bf16")
    return [
        "# needs torch, transformers >= 4.57 and accelerate; prompt.txt is your text",
        f"# weights and keys/values of {length:,} tokens: {needed / 1e9:,.1f} GB in bf16, over all GPUs that it finds",
        "python - <<'END'",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({path!r})",
        f'model = AutoModelForCausalLM.from_pretrained({path!r}, dtype="bfloat16", device_map="auto")',
        'prompt = tokenizer(open("prompt.txt", encoding="utf-8").read(), return_tensors="pt").input_ids.to(model.device)',
        "output = model.generate(prompt, max_new_tokens=64, do_sample=False)",
        "print(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))",
        "END",
    ]


def _lm_eval(shape: ModelShape, length: int, weight_bytes: int, path: str, settings: Mapping[str, Any]) -> list[str]:
    lengths = [one for one in settings.get("max_seq_lengths", ()) if one <= length] or [length // 4, length]
    metadata = shlex.quote(json.dumps({**settings, "max_seq_lengths": lengths}))
    layout = smallest_layout(shape, length, weight_bytes=weight_bytes, kv="bf16", gpu_bytes=GPU_BYTES["H100"])
    models = [("hf", f"pretrained={path},dtype=bfloat16,max_length={length}")]
    if layout is not None:
        # what lm-eval does not know of --model_args it hands to vLLM as it is
        split = f",decode_context_parallel_size={layout.dcp}" if layout.dcp > 1 else ""
        models.append(
            ("vllm", f"pretrained={path},dtype=bfloat16,max_model_len={length},tensor_parallel_size={layout.tp}{split}")
        )
    lines = ["# our needles, ruler-like tasks and short questions, offline, from this project's source tree (docs/lm_eval.md)"]
    if "," in path or "=" in path:
        lines.append("# --model_args is divided at , and =: give the folder a name without them")
    lines += [
        f"lm_eval --model {model} --model_args {shlex.quote(arguments)} --include_path {LM_EVAL_FOLDER}"
        f" --tasks {','.join(LM_EVAL_TASKS)} --metadata {metadata} --batch_size 1 --log_samples --output_path lm_eval_results"
        for model, arguments in models
    ]
    lines.append(
        "# numbers to hold against published RULER: the tasks `ruler` of the same program (they fetch data), or NVIDIA/RULER"
    )
    return lines
