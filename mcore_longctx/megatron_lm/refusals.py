"""What is refused before anything is built: flags that Megatron-LM accepts and then ignores, or computes wrongly, at long context.

Each check raises one line that says what is wrong and how to say it instead. `docs/megatron_lm.md` lists them with the reasons.
"""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from collections.abc import Set
from typing import TYPE_CHECKING, Any, NoReturn

from mcore_longctx import megatron_compat as _imports_megatron_quietly  # noqa: F401  # isort: skip

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.enums import AttnBackend

from mcore_longctx.errors import ConfigError, LayoutError
from mcore_longctx.layout import check_seq_length
from mcore_longctx.layout.heads import key_head_replicas
from mcore_longctx.megatron_lm.model import is_our_spec, load_spec
from mcore_longctx.megatron_lm.rope import rope_of
from mcore_longctx.model import spec
from mcore_longctx.parallel.exchange import CP_COMM_TYPES

if TYPE_CHECKING:
    from mcore_longctx.megatron_lm.programs import Program

__all__ = ["check_arguments"]

_MEGATRON_COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")


def check_arguments(args: Namespace, given: Set[str], program: Program) -> None:
    """Raise LongctxError for the first thing that would be lost or wrong.

    Args:
        args: parsed flags, before or after Megatron-LM's own checks.
        given: names of the flags that stand on the command line.
        program: what supplies batches and loss.
    """
    if args.yaml_cfg is not None:
        _refuse("--yaml-cfg: settings of a file pass by the checks that are made here", fix="give them as flags")
    layers = load_spec(args.spec)
    is_ours = is_our_spec(layers)
    _check_sizes(args, given)
    if is_ours:
        _check_layers(args, layers)
    rope_of(args, given)
    _check_context_parallel(args, CP_COMM_TYPES if is_ours else _MEGATRON_COMM_TYPES)
    _check_loss(args)
    _check_memory(args, layers)
    _check_batches(args, program, is_ours=is_ours)
    if "async_save" in given and not args.use_persistent_ckpt_worker:
        _refuse(
            "--async-save without --use-persistent-ckpt-worker: Megatron-LM would go back to saves that stop the training",
            fix="give both",
        )


def _check_sizes(args: Namespace, given: Set[str]) -> None:
    for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length"):
        if getattr(args, name) is None:
            _refuse(f"{_flag(name)} is missing")
    if "num_query_groups" in given and not args.group_query_attention:
        _refuse(
            "--num-query-groups has no effect without --group-query-attention: each head would have its own keys",
            fix="give both, or neither",
        )


# --------------------------------------------------------------------------------------------------------------------- our layers

# what our layers compute, whatever the flag says
_FIXED = {"normalization": "RMSNorm", "attention_dropout": 0.0, "softmax_type": "vanilla"}
# what our layers do not have: without a word they would train without it
_ABSENT = {
    "num_experts": "--num-experts",
    "multi_latent_attention": "--multi-latent-attention",
    "experimental_attention_variant": "--experimental-attention-variant",
    "heterogeneous_layers_config_path": "--heterogeneous-layers-config-path",
    "heterogeneous_layers_config_encoded_json": "--heterogeneous-layers-config-encoded-json",
    "attention_output_gate": "--attention-output-gate",
    "qk_l2_norm": "--qk-l2-norm",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "window_size": "--window-size",
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "tp_comm_overlap": "--tp-comm-overlap",
    "use_te_activation_func": "--use-te-activation-func",
    "activation_func_clamp_value": "--activation-func-clamp-value",
    "glu_linear_offset": "--glu-linear-offset",
}


def _check_layers(args: Namespace, layers: Any) -> None:
    for name, computed in _FIXED.items():
        if getattr(args, name) != computed:
            wanted = f"{computed:g}" if isinstance(computed, float) else computed
            _refuse(f"{_flag(name)} is {getattr(args, name)}, our layers compute {wanted}", fix=f"give {_flag(name)} {wanted}")
    if not args.swiglu:
        _refuse("--swiglu is missing, and our layers compute nothing else", fix="give --swiglu")
    for name, flag in _ABSENT.items():
        if getattr(args, name):
            _refuse(
                f"{flag}: our layers have nothing of the kind and would train without it",
                fix="leave it out, or give a --spec of your own",
            )
    if args.attention_backend in (AttnBackend.local, AttnBackend.unfused):
        _refuse(
            f"--attention-backend {args.attention_backend.name} asks for Megatron's attention in the place of ours, and it keeps"
            " s x s scores",
            fix="leave it out, or give auto, flash or fused",
        )
    if layers is spec.llama and args.qk_layernorm:
        _refuse(
            "--spec mcore_longctx.model.spec llama with --qk-layernorm: this spec has no norms of queries and keys",
            fix="give --spec mcore_longctx.model.spec llama_block, or no --spec",
        )
    if layers is spec.llama and args.sequence_parallel:
        _refuse(
            "--spec mcore_longctx.model.spec llama with --sequence-parallel: the final norm would be Megatron's, which refuses it",
            fix="give --spec mcore_longctx.model.spec llama_block, or no --spec",
        )


# --------------------------------------------------------------------------------------------------------------- context parallel


def _check_context_parallel(args: Namespace, known: tuple[str, ...]) -> None:
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    check_seq_length(args.seq_length, cp, where="--seq-length")
    if args.sequence_parallel and args.seq_length // cp % tp:
        raise LayoutError(
            f"{args.seq_length // cp:,} tokens of each context-parallel rank are not a multiple of --tensor-model-parallel-size {tp}",
            where="--sequence-parallel",
        )
    types = args.cp_comm_type if isinstance(args.cp_comm_type, list) else [args.cp_comm_type]
    for name in types:
        if name not in known:
            fix = "it is spelled all_gather" if name in ("allgather", "all-gather") else f"use one of {', '.join(known)}"
            _refuse(f"--cp-comm-type {name} is none that is computed", fix=fix)
    if len(types) not in (1, args.num_layers):
        _refuse(f"--cp-comm-type names {len(types)} types for {args.num_layers} layers", fix="name one, or one a layer")
    _check_hierarchy(types, args.hierarchical_context_parallel_sizes, cp)
    _check_heads(args, types)
    if args.dataloader_inter_document_masking and cp > 1:
        _refuse(
            "--dataloader-inter-document-masking with --context-parallel-size above 1: Megatron-LM slices the tokens over the whole"
            " sample and reads them as if sliced per document, so that losses are wrong without an error",
            fix="leave it out",
        )


def _check_hierarchy(types: list[str], sizes: list[int] | None, cp: int) -> None:
    if "a2a+p2p" not in types or cp == 1:
        return
    where = "--cp-comm-type a2a+p2p"
    if sizes is None:
        _refuse("how many ranks exchange by a2a is not said", where=where, fix="give --hierarchical-context-parallel-sizes A P")
    if len(sizes) != 2 or math.prod(sizes) != cp:
        said = " ".join(str(size) for size in sizes)
        pairs = ", ".join(f"{a} {cp // a}" for a in range(2, cp) if cp % a == 0) or f"{cp} 1"
        raise LayoutError(
            f"--hierarchical-context-parallel-sizes {said} are not two sizes whose product is --context-parallel-size {cp}",
            where=where,
            fix=f"these are: {pairs}",
        )
    if importlib.util.find_spec("einops") is None:
        _refuse(
            "megatron-core builds the groups of these ranks with einops, which is not installed",
            where=where,
            fix="pip install einops",
        )


def _check_heads(args: Namespace, types: list[str]) -> None:
    tp, cp, sizes = args.tensor_model_parallel_size, args.context_parallel_size, args.hierarchical_context_parallel_sizes
    key_heads = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    for name, ranks in (("a2a", cp), ("a2a+p2p", sizes[0] if sizes else 1)):
        if name in types and cp > 1:
            key_head_replicas(args.num_attention_heads // tp, max(1, key_heads // tp), ranks, where=f"--cp-comm-type {name}")


# ------------------------------------------------------------------------------------------------------------------ loss and memory


# what takes Megatron's logits, which are never all there
_NEEDS_LOGITS = (
    *("logits_save_dir", "logits_load_dir", "mtp_num_layers", "use_mup", "fp16_lm_cross_entropy"),
    "defer_embedding_wgrad_compute",
)


def _check_loss(args: Namespace) -> None:
    for name in _NEEDS_LOGITS:
        if getattr(args, name):
            _refuse(f"{_flag(name)} works on the logits, and here the loss is computed without holding them", fix="leave it out")
    if args.eod_mask_loss and args.context_parallel_size > 1 and not args.calculate_per_token_loss:
        _refuse(
            "--eod-mask-loss with --context-parallel-size above 1: each rank would divide by its own number of tokens, and the mean of"
            " these means is not the loss",
            fix="give --calculate-per-token-loss",
        )


def _check_memory(args: Namespace, layers: Any) -> None:
    ours = args.longctx_recompute != "none"
    if (ours or args.longctx_mlp_tile) and layers is not spec.llama_block:
        _refuse(
            f"{'--longctx-recompute' if ours else '--longctx-mlp-tile'} changes our layers, and --spec {' '.join(args.spec)} is another",
            fix="give no --spec, or put it into your spec: longctx_layer_spec(recompute=..., mlp_tile=...)",
        )
    # Megatron-LM deletes the second of these after reading it
    if ours and (args.recompute_granularity or getattr(args, "recompute_activations", False)):
        _refuse(
            f"--longctx-recompute {args.longctx_recompute} beside Megatron's own recompute: a layer is recomputed by one of them",
            fix="leave the --recompute-... flags out",
        )
    if ours and args.hidden_dropout:
        _refuse(
            f"--hidden-dropout is {args.hidden_dropout} with --longctx-recompute {args.longctx_recompute}: random numbers are not replayed",
            fix="give --hidden-dropout 0",
        )
    if args.recompute_granularity == "full" and args.recompute_modules:
        _refuse(
            "--recompute-modules has no effect with --recompute-granularity full",
            fix="leave it out, or give --recompute-granularity selective",
        )
    offload = "--fine-grained-activation-offloading" if args.fine_grained_activation_offloading else ""
    if args.cpu_offloading_num_layers:
        offload = "--cpu-offloading-num-layers"
    if offload and not gpt_layer_specs.HAVE_TE:
        _refuse(f"{offload} needs TransformerEngine, which is not installed", fix="leave it out")
    if offload and (ours or args.recompute_granularity == "full"):
        _refuse(f"{offload} beside full recompute: nothing is kept that it could offload", fix="give one of them")


# ------------------------------------------------------------------------------------------------------------------------- batches

_PACKED = ("sft", "hybrid_context_parallel")
_NEEDS_CHECKOUT = (*_PACKED, "dataloader_inter_document_masking", "fim_data", "overlap_moe_expert_parallel_comm")


def _check_batches(args: Namespace, program: Program, *, is_ours: bool) -> None:
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(args, name):
            effect = "no attention mask is made" if name == "reset_attention_mask" else "rope does not look at position ids"
            _refuse(
                f"{_flag(name)} has no effect: {effect}",
                fix="leave it out: a sample is one sequence, whatever documents are in it",
            )
    for name in _PACKED:
        if is_ours and getattr(args, name):
            _refuse(f"{_flag(name)} gives packed sequences, which our layers do not take here", fix="leave it out")
    for name in _NEEDS_CHECKOUT:
        if program.is_own and getattr(args, name):
            _refuse(f"{_flag(name)} needs pretrain_gpt.py, which the wheel does not bring", fix="give --megatron-lm CHECKOUT")
    if args.longctx_data is not None:
        _check_packed_samples(args, program)
    if getattr(args, "modelopt_enabled", False):
        _refuse("--modelopt-enabled builds a model of its own", fix="use pretrain_gpt.py itself")


_OTHER_DATA = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path", "mock_data")


def _check_packed_samples(args: Namespace, program: Program) -> None:
    if not program.is_own:
        _refuse("--longctx-data is read by the program of the wheel, not by pretrain_gpt.py", fix="leave --megatron-lm out")
    for name in _OTHER_DATA:
        if getattr(args, name):
            _refuse(f"{_flag(name)} beside --longctx-data: the samples come from one of them", fix="leave one out")
    if args.eval_iters or args.dataloader_type not in (None, "single"):
        what = "--eval-iters" if args.eval_iters else f"--dataloader-type {args.dataloader_type}"
        _refuse(
            f"{what} with --longctx-data: it has one part and one order, those of mcore-longctx train", fix="give --eval-iters 0"
        )


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _refuse(what: str, *, where: str = "command line", fix: str = "") -> NoReturn:
    raise ConfigError(what, where=where, fix=fix)
