"""What is refused, and in which words; before anything is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcore_longctx.errors import LongctxError
from mcore_longctx.megatron_lm import launcher
from mcore_longctx.megatron_lm.rope import rope_of
from mcore_longctx.rope import read_hf_rope
from tests.megatron_lm.program import MODEL, PLAIN_ROPE, TINY, TRAINING, needs_program

pytestmark = needs_program

RUN = [*MODEL, *TRAINING, *PLAIN_ROPE, "--train-iters", "2", "--mock-data"]
CP4 = ["--context-parallel-size", "4"]
YARN = ["--position-embedding-type", "yarn", "--rotary-scaling-factor", "4"]


def refusal(*flags: str) -> str:
    with pytest.raises(LongctxError) as caught:
        launcher.read_arguments([*RUN, *flags])
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_a_command_line_without_fault_is_parsed() -> None:
    line = launcher.read_arguments(RUN)
    assert line.args.hidden_size == 128
    assert "train_iters" in line.given
    assert "rope_scaling_factor" not in line.given
    assert "--no-rope-fusion" in line.added


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cp-size 4", "command line: unrecognized arguments: --cp-size 4; --help lists all flags"),
        ("--rotary-base 500000.0", "command line: argument --rotary-base: invalid int value: '500000.0'; --help lists all flags"),
        (
            "--longctx-loss-chunk 0",
            "command line: argument --longctx-loss-chunk: invalid token_count value: '0'; --help lists all flags",
        ),
        ("--exit-signal usr1", "command line: 'usr1' is not a value of the flag it is given to"),
        (
            "--yaml-cfg x.yaml",
            "command line: --yaml-cfg: settings of a file pass by the checks that are made here; give them as flags",
        ),
    ],
)
def test_flags_that_do_not_parse(flags: str, message: str) -> None:
    assert refusal(*flags.split()) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "mcore_longctx.model.spce llama",
            "cannot be imported: ModuleNotFoundError: No module named 'mcore_longctx.model.spce'; Megatron-LM would train its own layers",
        ),
        (
            "tests.megatron_lm.needs_a_library llama",
            "cannot be imported: ModuleNotFoundError: No module named 'library_that_is_not_there';"
            " Megatron-LM would train its own layers",
        ),
        (
            "mcore_longctx.model.spec lama",
            "there is no lama in mcore_longctx.model.spec; MODULE NAME: a ModuleSpec, or a function",
        ),
        ("local", "takes two words, MODULE NAME; for example mcore_longctx.model.spec llama_block"),
        ("mcore_longctx.model.spec:llama", "takes two words, MODULE NAME; for example mcore_longctx.model.spec llama_block"),
        (
            "tests.megatron_lm.specs NOTHING",
            "is of type int; it must be a ModuleSpec, TransformerBlockSubmodules or a function",
        ),
    ],
)
def test_a_spec_that_megatron_would_replace_by_its_own_layers(words: str, message: str) -> None:
    assert refusal("--spec", *words.split()) == f"--spec {words}: {message}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--normalization LayerNorm", "--normalization is LayerNorm, our layers compute RMSNorm; give --normalization RMSNorm"),
        ("--attention-dropout 0.1", "--attention-dropout is 0.1, our layers compute 0; give --attention-dropout 0"),
        ("--softmax-type off-by-one", "--softmax-type is off-by-one, our layers compute vanilla; give --softmax-type vanilla"),
        (
            "--attention-backend local",
            "--attention-backend local asks for Megatron's attention in the place of ours, and it keeps s x s scores;"
            " leave it out, or give auto, flash or fused",
        ),
        (
            "--spec mcore_longctx.model.spec llama --tensor-model-parallel-size 2 --sequence-parallel",
            "--spec mcore_longctx.model.spec llama with --sequence-parallel: the final norm would be Megatron's, which refuses it;"
            " give --spec mcore_longctx.model.spec llama_block, or no --spec",
        ),
    ],
)
def test_what_our_layers_compute_otherwise(flags: str, message: str) -> None:
    assert refusal(*flags.split()) == f"command line: {message}"


@pytest.mark.parametrize(
    "flags",
    [
        "--num-experts 4",
        "--multi-latent-attention",
        "--attention-output-gate",
        "--qk-l2-norm",
        "--apply-layernorm-1p",
        "--window-size 64,0",
        "--fp8-format hybrid",
        "--tp-comm-overlap",
    ],
)
def test_what_our_layers_do_not_have(flags: str) -> None:
    wanted = (
        f"command line: {flags.split(maxsplit=1)[0]}: our layers have nothing of the kind and would train without it;"
        " leave it out, or give a --spec of your own"
    )
    assert refusal(*flags.split()) == wanted
    spec = ["--spec", "tests.megatron_lm.specs", "layer_function"]
    launcher.read_arguments([*RUN, *flags.split(), *spec])  # layers of the user's may have it


def test_what_our_layers_always_do_must_be_said() -> None:
    with pytest.raises(LongctxError, match=r"--swiglu is missing, and our layers .*; give --swiglu"):
        launcher.read_arguments([text for text in RUN if text != "--swiglu"])


def test_norms_of_heads_need_the_spec_that_reads_the_config() -> None:
    launcher.read_arguments([*RUN, "--qk-layernorm"])
    assert refusal("--qk-layernorm", "--spec", "mcore_longctx.model.spec", "llama") == (
        "command line: --spec mcore_longctx.model.spec llama with --qk-layernorm: this spec has no norms of queries and keys;"
        " give --spec mcore_longctx.model.spec llama_block, or no --spec"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--longctx-recompute full --recompute-granularity full",
            "--longctx-recompute full beside Megatron's own recompute: a layer is recomputed by one of them;"
            " leave the --recompute-... flags out",
        ),
        (
            "--longctx-recompute attention_kept --recompute-activations",
            "--longctx-recompute attention_kept beside Megatron's own recompute: a layer is recomputed by one of them;"
            " leave the --recompute-... flags out",
        ),
        (
            "--longctx-recompute attention_kept --hidden-dropout 0.1",
            "--hidden-dropout is 0.1 with --longctx-recompute attention_kept: random numbers are not replayed; give --hidden-dropout 0",
        ),
        (
            "--longctx-recompute full --spec mcore_longctx.model.spec llama",
            "--longctx-recompute changes our layers, and --spec mcore_longctx.model.spec llama is another;"
            " give no --spec, or put it into your spec: longctx_layer_spec(recompute=..., mlp_tile=...)",
        ),
        (
            "--longctx-mlp-tile 64 --spec tests.megatron_lm.specs layer_function",
            "--longctx-mlp-tile changes our layers, and --spec tests.megatron_lm.specs layer_function is another;"
            " give no --spec, or put it into your spec: longctx_layer_spec(recompute=..., mlp_tile=...)",
        ),
    ],
)
def test_memory_of_our_layers(flags: str, message: str) -> None:
    assert refusal(*flags.split()) == f"command line: {message}"


def test_query_groups_that_have_no_effect() -> None:
    flags = [text for text in RUN if text != "--group-query-attention"]
    with pytest.raises(LongctxError, match="--num-query-groups has no effect without --group-query-attention"):
        launcher.read_arguments(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--cp-comm-type ring",
            "command line: --cp-comm-type ring is none that is computed; use one of p2p, all_gather, a2a, a2a+p2p",
        ),
        ("--cp-comm-type allgather", "command line: --cp-comm-type allgather is none that is computed; it is spelled all_gather"),
        ("--cp-comm-type p2p p2p", "command line: --cp-comm-type names 2 types for 4 layers; name one, or one a layer"),
        (
            "--cp-comm-type a2a+p2p",
            "--cp-comm-type a2a+p2p: how many ranks exchange by a2a is not said; give --hierarchical-context-parallel-sizes A P",
        ),
        (
            "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 4 2",
            "--cp-comm-type a2a+p2p: --hierarchical-context-parallel-sizes 4 2 are not two sizes whose product is"
            " --context-parallel-size 4; these are: 2 2",
        ),
        (
            "--cp-comm-type a2a --tensor-model-parallel-size 2",
            "--cp-comm-type a2a: a2a over 4 ranks cannot divide 2 query heads and 1 key heads (of one tensor-parallel rank);"
            " use a2a over 1, 2 ranks, and p2p for the rest (a2a+p2p)",
        ),
        (
            "--seq-length 126",
            "--seq-length: seq_length 126 is not a multiple of 2 x context_parallel_size (8); nearest: 120 or 128",
        ),
        (
            "--seq-length 72 --tensor-model-parallel-size 4 --sequence-parallel",
            "--sequence-parallel: 18 tokens of each context-parallel rank are not a multiple of --tensor-model-parallel-size 4",
        ),
        (
            "--dataloader-inter-document-masking",
            "command line: --dataloader-inter-document-masking with --context-parallel-size above 1: Megatron-LM slices the tokens over"
            " the whole sample and reads them as if sliced per document, so that losses are wrong without an error; leave it out",
        ),
    ],
)
def test_context_parallelism(flags: str, message: str) -> None:
    assert refusal(*CP4, *flags.split()).startswith(message)


@pytest.mark.parametrize("flags", ["--logits-save-dir x", "--logits-load-dir x", "--mtp-num-layers 1", "--use-mup"])
def test_what_needs_logits(flags: str) -> None:
    name = flags.split(maxsplit=1)[0]
    wanted = f"command line: {name} works on the logits, and here the loss is computed without holding them; leave it out"
    assert refusal(*flags.split()) == wanted


def test_an_uneven_loss_mask_under_context_parallelism_needs_one_division() -> None:
    flags = [text for text in RUN if text != "--calculate-per-token-loss"] + ["--eod-mask-loss"]
    launcher.read_arguments(flags)
    with pytest.raises(LongctxError, match="each rank would divide by its own number of tokens"):
        launcher.read_arguments([*flags, *CP4])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --recompute-modules core_attn",
            "--recompute-modules has no effect with --recompute-granularity full;"
            " leave it out, or give --recompute-granularity selective",
        ),
        (
            "--fine-grained-activation-offloading --offload-modules core_attn",
            "--fine-grained-activation-offloading needs TransformerEngine, which is not installed; leave it out",
        ),
        (
            "--cpu-offloading-num-layers 2",
            "--cpu-offloading-num-layers needs TransformerEngine, which is not installed; leave it out",
        ),
    ],
)
def test_memory_of_megatrons_own_layers(flags: str, message: str) -> None:
    assert refusal(*flags.split()) == f"command line: {message}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--reset-attention-mask", "--reset-attention-mask has no effect: no attention mask is made; leave it out"),
        ("--reset-position-ids", "--reset-position-ids has no effect: rope does not look at position ids; leave it out"),
        ("--sft", "--sft gives packed sequences, which our layers do not take here; leave it out"),
        ("--hybrid-context-parallel", "--hybrid-context-parallel gives packed sequences, which our layers do not take here"),
        (
            "--dataloader-inter-document-masking",
            "--dataloader-inter-document-masking needs pretrain_gpt.py, which the wheel does not bring; give --megatron-lm CHECKOUT",
        ),
        ("--fim-data", "--fim-data needs pretrain_gpt.py, which the wheel does not bring; give --megatron-lm CHECKOUT"),
        (
            "--sft --spec tests.megatron_lm.specs layer_function",
            "--sft needs pretrain_gpt.py, which the wheel does not bring; give --megatron-lm CHECKOUT",
        ),
    ],
)
def test_batches(flags: str, message: str) -> None:
    assert refusal(*flags.split()).startswith(f"command line: {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--rope-scaling-factor 512",
            "--rope-scaling-factor has no effect without --use-rope-scaling; give both, or neither",
        ),
        (
            "--rotary-scaling-factor 512",
            "--rotary-scaling-factor has no effect with --position-embedding-type rope;"
            " leave it out, or give --position-embedding-type yarn",
        ),
        (
            "--yarn-beta-fast 4",
            "--yarn-beta-fast has no effect with --position-embedding-type rope;"
            " leave it out, or give --position-embedding-type yarn",
        ),
        (
            "--use-rope-scaling --rotary-seq-len-interpolation-factor 2",
            "--rotary-seq-len-interpolation-factor scales a second time what is scaled already; leave one out",
        ),
        (
            "--position-embedding-type learned_absolute",
            "--position-embedding-type is learned_absolute, and what is trained here has a rope;"
            " give --position-embedding-type rope, or --longctx-rope",
        ),
        ("--position-embedding-type yarn", "YaRN without a factor scales nothing; give --rotary-scaling-factor"),
        ("--rotary-percent 0.5", "--rotary-percent is 0.5; partly rotated heads are not supported"),
        ("--rotary-interleaved", "--rotary-interleaved is not supported: pairs are those of Llama, i and i + d/2"),
        (
            " ".join(YARN) + " --use-rope-scaling",
            "--use-rope-scaling has no effect with --position-embedding-type yarn; leave it out, or give --position-embedding-type"
            " rope, scaled by --use-rope-scaling --rope-scaling-factor",
        ),
        (
            " ".join(YARN) + " --use-rotary-position-embeddings",
            "--use-rotary-position-embeddings turns yarn into rope without scaling; leave it out: it is deprecated",
        ),
        ("--use-rope-scaling --rope-scaling-factor 0.5", "factor is 0.5, expected 1 or more"),
    ],
)
def test_rope_flags_that_contradict_each_other_or_have_no_effect(flags: str, message: str) -> None:
    assert refusal(*flags.split()) == f"rope flags: {message}"


@pytest.fixture
def scaled(tmp_path: Path) -> Path:
    """The tiny model's config with its rope scaled 16 times, as Llama 3 does."""
    config = json.loads((TINY / "config.json").read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    "flags",
    ["--rotary-base 500000", "--use-rope-scaling", "--use-rope-scaling --rope-scaling-factor 8", " ".join(YARN)],
)
def test_rope_flags_that_contradict_the_config(scaled: Path, flags: str) -> None:
    text = refusal("--longctx-rope", str(scaled), *flags.split())
    assert text.startswith(f"--longctx-rope {scaled}: contradicted by --")
    assert "the file says llama3 factor 16 over 8,192" in text


def test_rope_flags_that_say_what_the_config_says(scaled: Path) -> None:
    flags = ["--longctx-rope", str(scaled / "config.json"), "--use-rope-scaling", "--rope-scaling-factor", "16"]
    launcher.read_arguments([*RUN, *flags])


def test_a_config_that_cannot_be_used(scaled: Path) -> None:
    (scaled / "text").write_text("{")
    assert "nothing: cannot be read: No such file or directory" in refusal("--longctx-rope", str(scaled / "nothing"))
    assert "text: is not JSON: " in refusal("--longctx-rope", str(scaled / "text"))
    config = json.loads((scaled / "config.json").read_text()) | {"head_dim": 64}
    (scaled / "config.json").write_text(json.dumps(config))
    assert refusal("--longctx-rope", str(scaled)).startswith(
        f"--longctx-rope {scaled}: is for heads of 64, the model's have 32; check"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--async-save",
            "--async-save without --use-persistent-ckpt-worker: Megatron-LM would go back to saves that stop the training",
        ),
        ("--longctx-data here", "--mock-data beside --longctx-data: the samples come from one of them; leave one out"),
        (
            "--longctx-data here --data-path there",
            "--data-path beside --longctx-data: the samples come from one of them; leave one out",
        ),
    ],
)
def test_saves_and_samples_that_would_not_be_what_they_say(flags: str, message: str) -> None:
    assert refusal(*flags.split()).startswith(f"command line: {message}")


def test_packed_samples_have_one_part_and_one_order() -> None:
    words = [word for word in RUN if word != "--mock-data"]
    for flags in (["--eval-iters", "1"], ["--dataloader-type", "cyclic"]):
        with pytest.raises(
            LongctxError, match=rf"{' '.join(flags[: 1 + (flags[1] != '1')])} with --longctx-data: it has one part"
        ):
            launcher.read_arguments([*words, "--longctx-data", "here", *flags])


def test_a_rope_that_is_given_as_text(scaled: Path) -> None:
    text = (scaled / "config.json").read_text()
    line = launcher.read_arguments([*RUN, "--longctx-rope", text])
    assert rope_of(line.args, line.given) == read_hf_rope(json.loads(text))
    assert refusal("--longctx-rope", "{not json").startswith("--longctx-rope: is not JSON: ")
    assert refusal("--longctx-rope", text, "--rotary-base", "7").startswith("--longctx-rope: contradicted by --rotary-base 7")
