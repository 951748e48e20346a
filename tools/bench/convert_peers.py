"""The converters that `convert.py` is measured against, each on a machine without GPU and without TransformerEngine.

    PEER_PYTHON tools/bench/convert_peers.py PEER import HF OUT             HF folder -> model -> torch_dist folder
    PEER_PYTHON tools/bench/convert_peers.py PEER export CHECKPOINT OUT HF  torch_dist folder -> model -> HF folder; HF: for its config.json
    PEER_PYTHON tools/bench/convert_peers.py PEER versions

PEER is `mbridge`, `modelopt`, `megatron-bridge` or `mcore-bridge`, installed in that Python: mbridge 0.15.1 needs megatron-core 0.16, the
export of nvidia-modelopt 0.47.0 a later one. The last line printed is JSON: seconds from after the imports of Python packages to the end,
CPU-seconds of the same stretch, or why the package cannot be used. Every process group is gloo, of one.

What is put in the place of something that needs a GPU, and nothing else: three calls of `torch.cuda` (and `Module.cuda`) do nothing;
mbridge's layers are Megatron's own ("local spec") in the place of TransformerEngine's, whose names its table expects for two norms.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = {
    "mbridge": "mbridge",
    "modelopt": "nvidia-modelopt",
    "megatron-bridge": "megatron-bridge",
    "mcore-bridge": "mcore-bridge",
}
MODULES = {
    "mbridge": "mbridge",
    "modelopt": "modelopt.torch.export",
    "megatron-bridge": "megatron.bridge",
    "mcore-bridge": "mcore_bridge",
}
UNFUSED = {
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "use_cpu_initialization": True,
}


def start() -> None:
    """One process group of one rank, and no GPU."""
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.empty_cache = lambda: None
    torch.nn.Module.cuda = lambda self, *_, **__: self
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()


def mbridge() -> tuple[Callable[[Path, Path], None], Callable[[Path, Path, Path], None]]:
    """Its import and its export."""
    from mbridge import AutoBridge
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def build(hf: Path) -> tuple[Any, Any]:
        bridge = AutoBridge.from_pretrained(str(hf))
        kind = type(bridge)
        names = kind._weight_name_mapping_mcore_to_hf

        def local_names(self: Any, name: str) -> Any:
            name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            return names(self, name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"))

        kind._weight_name_mapping_mcore_to_hf = local_names
        kind._get_transformer_layer_spec = lambda *_, **__: get_gpt_layer_local_spec(normalization="RMSNorm")
        bridge.set_extra_args(**UNFUSED)
        (model,) = bridge.get_model(use_cpu_initialization=True, wrap_with_ddp=False)
        return bridge, model

    def import_(hf: Path, out: Path) -> None:
        bridge, model = build(hf)
        bridge.load_weights([model], str(hf))
        out.mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(out))

    def export(checkpoint: Path, out: Path, hf: Path) -> None:
        bridge, model = build(hf)
        load(model, checkpoint)
        bridge.safetensor_io = bridge._get_safetensor_io(str(hf))  # its load_weights would have set it
        out.mkdir()
        bridge.save_weights([model], str(out))

    return import_, export


def modelopt() -> tuple[Callable[[Path, Path], None], Callable[[Path, Path, Path], None]]:
    """Its import and its export. It takes and leaves a Megatron model; making and storing that is megatron-core's part of the job."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.export import export_mcore_gpt_to_hf, import_mcore_gpt_from_hf

    def build(hf: Path) -> Any:
        config = json.loads((hf / "config.json").read_text())
        transformer = TransformerConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config["head_dim"],
            ffn_hidden_size=config["intermediate_size"],
            normalization="RMSNorm",
            layernorm_epsilon=config["rms_norm_eps"],
            activation_func=torch.nn.functional.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            params_dtype=torch.bfloat16,
            **UNFUSED,
        )
        return GPTModel(
            transformer,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=config["vocab_size"],
            max_sequence_length=4096,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=config["rope_theta"],
        )

    def import_(hf: Path, out: Path) -> None:
        model = build(hf)
        import_mcore_gpt_from_hf(model, str(hf), dtype=torch.bfloat16)
        out.mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(out))

    def export(checkpoint: Path, out: Path, hf: Path) -> None:
        model = build(hf)
        load(model, checkpoint)
        export_mcore_gpt_to_hf(model, str(hf), dtype=torch.bfloat16, export_dir=str(out))

    return import_, export


def load(model: Any, checkpoint: Path) -> None:
    """A torch_dist folder into a model, by megatron-core."""
    from megatron.core import dist_checkpointing

    model = getattr(model, "module", model)  # mbridge wraps it for bf16
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(checkpoint))
    own = model.state_dict()
    missing = model.load_state_dict({key: value for key, value in loaded.items() if key in own}, strict=False).missing_keys
    if weights := [key for key in missing if not key.endswith("_extra_state")]:
        raise SystemExit(f"not loaded: {weights[:3]}")


def versions(peer: str) -> str:
    """Of the peer and what it stands on."""
    names = (PACKAGES[peer], "megatron-core", "torch", "transformers")
    told = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            told.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(told)


def main() -> None:
    """Do the job and print what it took."""
    peer, verb, *paths = sys.argv[1:]
    try:
        importlib.metadata.version(PACKAGES[peer])
    except importlib.metadata.PackageNotFoundError:
        print(json.dumps({"missing": "not installed"}))
        return
    try:
        importlib.import_module(MODULES[peer])
        makers = {"mbridge": mbridge, "modelopt": modelopt}
        import_, export = makers[peer]() if verb != "versions" and peer in makers else (None, None)
    except ImportError as error:
        print(json.dumps({"missing": f"{PACKAGES[peer]} {importlib.metadata.version(PACKAGES[peer])}: {error}"[:200]}))
        return
    if verb == "versions":
        print(json.dumps({"versions": versions(peer)}))
        return
    if import_ is None or export is None:
        print(json.dumps({"missing": "imports here, and nobody has written its part of this script"}))
        return
    start()
    wall, cpu = time.monotonic(), os.times()
    import torch

    with torch.no_grad():
        (import_ if verb == "import" else export)(*map(Path, paths))
    took, now = time.monotonic() - wall, os.times()
    seconds = sum(now[:4]) - sum(cpu[:4])
    print(json.dumps({"wall": round(took, 3), "cpu": round(seconds, 3)}))


if __name__ == "__main__":  # megatron-core starts a process that imports this file again
    main()
