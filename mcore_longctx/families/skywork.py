"""Skywork-13B: Llama under another name, with code of its own that is never loaded.

Names, shapes and mathematics are Llama's (ms-swift and TensorRT-LLM read it so, too). Its `auto_map` asks for Python files of the
repository. Those are neither run nor carried, and without them `model_type: skywork` means nothing to anybody. So it is a Llama
from here on: in the checkpoint's card, and in config.json when it is exported.

Source: config.json and modeling_skywork.py of huggingface.co/Skywork/Skywork-13B-base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_longctx.families.family import Family
from mcore_longctx.families.hf_config import read_sizes, refuse_sliding_window
from mcore_longctx.families.llama import LLAMA
from mcore_longctx.families.shape import ModelShape

__all__ = ["SKYWORK"]


def _read(config: Mapping[str, Any], where: object) -> ModelShape:
    refuse_sliding_window(config, where)
    return read_sizes(config, where, family="llama")


SKYWORK = Family(
    "skywork",
    ("SkyworkForCausalLM",),
    LLAMA.table,
    _read,
    exported_as={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
)
