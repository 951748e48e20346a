"""What a plan writes, against Megatron's tensors put together by torch from their definition, and read by torch's own loader."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as torch_checkpoint

from mcore_longctx.convert import Execution, export_hf, hf_export, hf_import, import_hf, plan_export, plan_import
from mcore_longctx.convert.plans.plan import Plan
from mcore_longctx.convert.plans.torch_dist_layout import padded_vocab_size, plan_torch_dist
from mcore_longctx.convert.views import TensorRows
from mcore_longctx.families import hf_shapes, model_tensors, read_shape
from mcore_longctx.formats.dcp_read import read_torch_dist
from mcore_longctx.formats.dtypes import BY_TORCH
from tests.convert.hf_folders import llama_config, random_weights, read_weights, write_folder
from tests.convert.reference_execute import contents, reference_execute

QKV, PROJ = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.self_attention.linear_proj.weight"
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
FOUR_GROUPS = llama_config(num_key_value_heads=4, num_attention_heads=8, head_dim=6, vocab_size=131)


def megatron_tensors(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], vocab_rows: int) -> dict[str, torch.Tensor]:
    """Megatron's tensors from their definition (`GPTModel`, fused qkv and gate/up), layers stacked."""
    groups, head = config["num_key_value_heads"], config["head_dim"]

    def padded(name: str) -> torch.Tensor:
        return torch.nn.functional.pad(weights[name], (0, 0, 0, vocab_rows - weights[name].shape[0]))

    def of_layer(i: int) -> dict[str, torch.Tensor]:
        def get(name: str) -> torch.Tensor:
            return weights[f"model.layers.{i}.{name}.weight"]

        q, k, v = (get(f"self_attn.{part}_proj").reshape(groups, -1, head, config["hidden_size"]) for part in "qkv")
        return {
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight": get("input_layernorm"),
            QKV: torch.cat([q, k, v], 1).reshape(-1, config["hidden_size"]),
            PROJ: get("self_attn.o_proj"),
            "decoder.layers.mlp.linear_fc1.layer_norm_weight": get("post_attention_layernorm"),
            FC1: torch.cat([get("mlp.gate_proj"), get("mlp.up_proj")]),
            FC2: get("mlp.down_proj"),
        }

    layers = [of_layer(i) for i in range(config["num_hidden_layers"])]
    found = {key: torch.stack([layer[key] for layer in layers]) for key in layers[0]}
    found |= {"embedding.word_embeddings.weight": padded("model.embed_tokens.weight")}
    found |= {"decoder.final_layernorm.weight": weights["model.norm.weight"]}
    return found if config["tie_word_embeddings"] else found | {"output_layer.weight": padded("lm_head.weight")}


def loaded_by_torch(folder: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a torch_dist folder; NaN where nothing was loaded."""
    state = {key: torch.full_like(tensor, torch.nan) for key, tensor in wanted.items()}
    torch_checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


def per_layer(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in tensors.items():
        if key.startswith("decoder.layers."):
            found |= {key.replace("layers.", f"layers.{i}."): layer for i, layer in enumerate(tensor)}
        else:
            found[key] = tensor
    return found


# ------------------------------------------------------------------------------------------------------------ import
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per-layer"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_torch_loads_megatrons_tensors_from_an_import(tmp_path: Path, tp: int, stacked: bool, tied: bool) -> None:
    config = FOUR_GROUPS | {"tie_word_embeddings": tied}
    weights = random_weights(config)
    import_hf(
        write_folder(tmp_path / "hf", config, weights),
        tmp_path / "ck",
        chunks_for_tp=tp,
        stacked=stacked,
        vocab_multiple=8,
    )
    vocab_rows = {1: 136, 2: 144, 4: 160}[tp]
    expected = megatron_tensors(config, weights, vocab_rows)
    expected = expected if stacked else per_layer(expected)
    found = loaded_by_torch(tmp_path / "ck", expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    read = read_torch_dist(tmp_path / "ck").tensors
    assert {key: tensor.shape for key, tensor in read.items()} == {key: tuple(tensor.shape) for key, tensor in expected.items()}
    export_hf(tmp_path / "ck", tmp_path / "out")
    assert read_weights(tmp_path / "out") == read_weights(tmp_path / "hf")


def test_chunks_are_what_megatrons_ranks_own(tmp_path: Path) -> None:
    """Written down from megatron-core's saves (row-parallel: columns; gate and up each by itself)."""
    import_hf(write_folder(tmp_path / "hf", FOUR_GROUPS), tmp_path / "ck", chunks_for_tp=2)
    read = read_torch_dist(tmp_path / "ck").tensors
    boxes = {
        key: [(chunk.offsets, chunk.sizes) for chunk in read[key].chunks if chunk.offsets[0] == 1]
        for key in (QKV, PROJ, FC1, FC2)
    }
    assert boxes == {
        QKV: [((1, 0, 0), (1, 48, 32)), ((1, 48, 0), (1, 48, 32))],
        PROJ: [((1, 0, 0), (1, 32, 24)), ((1, 0, 24), (1, 32, 24))],
        FC1: [((1, row, 0), (1, 12, 32)) for row in (0, 12, 24, 36)],
        FC2: [((1, 0, 0), (1, 32, 12)), ((1, 0, 12), (1, 32, 12))],
    }
    embedding = read["embedding.word_embeddings.weight"]
    assert (embedding.shape, [chunk.offsets for chunk in embedding.chunks]) == ((256, 32), [(0, 0), (128, 0)])
    norm = read["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    assert [(chunk.offsets, chunk.sizes) for chunk in norm.chunks] == [((0, 0), (1, 32)), ((1, 0), (1, 32))]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tp=st.integers(1, 3),
    groups=st.integers(1, 2),
    queries=st.integers(1, 3),
    half_head=st.integers(1, 4),
    ffn=st.integers(1, 5),
    vocab=st.integers(1, 200),
    multiple=st.integers(1, 130),
    stacked=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_imports_of_any_sizes_are_megatrons_tensors_and_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    tp: int,
    groups: int,
    queries: int,
    half_head: int,
    ffn: int,
    vocab: int,
    multiple: int,
    stacked: bool,
    dtype: str,
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    config = llama_config(
        num_key_value_heads=groups * tp,
        num_attention_heads=groups * tp * queries,
        head_dim=2 * half_head,
        intermediate_size=ffn * tp,
        vocab_size=vocab,
        hidden_size=6,
    )
    weights = random_weights(config, dtype)
    write_folder(folder / "hf", config, weights)
    import_hf(folder / "hf", folder / "ck", chunks_for_tp=tp, stacked=stacked, vocab_multiple=multiple)
    vocab_rows = next(rows for rows in range(vocab, 10**6) if rows % (multiple * tp) == 0)
    expected = megatron_tensors(config, weights, vocab_rows)
    expected = expected if stacked else per_layer(expected)
    found = loaded_by_torch(folder / "ck", expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    export_hf(folder / "ck", folder / "out")
    assert read_weights(folder / "out") == read_weights(folder / "hf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_on_the_way_in_and_out(tmp_path: Path, dtype: str) -> None:
    weights = random_weights(FOUR_GROUPS)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.float16)
    write_folder(tmp_path / "hf", FOUR_GROUPS, weights)
    import_hf(tmp_path / "hf", tmp_path / "ck", dtype=dtype, chunks_for_tp=4)
    export_hf(tmp_path / "ck", tmp_path / "out")
    cast = {name: tensor.float().to(getattr(torch, dtype)) for name, tensor in weights.items()}
    write_folder(tmp_path / "expected", FOUR_GROUPS, cast)
    assert read_weights(tmp_path / "out") == read_weights(tmp_path / "expected")
    export_hf(tmp_path / "ck", tmp_path / "half", dtype="float16", shard_bytes=30_000)
    halves = {name: tensor.float().to(torch.float16) for name, tensor in cast.items()}
    write_folder(tmp_path / "halves", FOUR_GROUPS, halves)
    assert read_weights(tmp_path / "half") == read_weights(tmp_path / "halves")


# ------------------------------------------------------------------------------------- a plan and what is made of it
def sources(folder: Path) -> Path:
    write_folder(folder / "hf", FOUR_GROUPS, shards=3)
    import_hf(folder / "hf", folder / "ck", chunks_for_tp=2)
    return folder


def plans(folder: Path) -> list[Plan]:
    """One of each kind of fill: ranges, columns, casts, both formats, fp8."""
    return [
        plan_import(folder / "hf"),
        plan_import(folder / "hf", chunks_for_tp=4, stacked=False),
        plan_import(folder / "hf", dtype="bfloat16", chunks_for_tp=2),
        plan_export(folder / "ck"),
        plan_export(folder / "ck", dtype="float16", shard_bytes=9_000),
        plan_export(folder / "ck", dtype="bfloat16", quantize="fp8", shard_bytes=9_000),
    ]


def test_a_plan_writes_every_byte_once_but_the_padding(tmp_path: Path) -> None:
    for plan in plans(sources(tmp_path)):
        regions = [(file, offset, len(data)) for file, offset, data in plan.small()]
        regions += [(fill.file, fill.offset, fill.bytes) for fill in plan.fills]
        regions += [(fill.scales.file, fill.scales.offset, 4 * fill.rows) for fill in plan.fills if fill.scales]
        ends = dict.fromkeys(range(len(plan.files)), 0)
        holes = 0
        for file, offset, length in sorted(regions):
            assert offset >= ends[file]
            holes += offset - ends[file]
            ends[file] = offset + length
        assert [ends[number] for number in range(len(plan.files))] == [file.bytes for file in plan.files]
        itemsize = plan.fills[0].dtype.itemsize
        rows = {1: 125, 2: 125, 4: 381}.get(plan.settings.get("chunks-for-tp", 0), 0)  # 131 rows to 256 and 512
        assert holes == 2 * rows * 32 * itemsize
        assert [(fill.file, fill.offset) for fill in plan.fills] == sorted((fill.file, fill.offset) for fill in plan.fills)


def test_the_engine_writes_what_the_plainest_execution_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "hf", FOUR_GROUPS, shards=3)
    for engine in ("ours", "plain"):
        if engine == "plain":
            monkeypatch.setattr(hf_import, "execute", reference_execute)
            monkeypatch.setattr(hf_export, "execute", reference_execute)
        import_hf(tmp_path / "hf", tmp_path / engine / "a", chunks_for_tp=2)
        import_hf(tmp_path / "hf", tmp_path / engine / "b", chunks_for_tp=4, dtype="bfloat16", stacked=False)
        export_hf(tmp_path / engine / "a", tmp_path / engine / "c", shard_bytes=9_000)
        export_hf(tmp_path / engine / "b", tmp_path / engine / "d", dtype="float32")
    files = [path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*") if path.is_file()]
    assert len(files) > 40
    assert all((tmp_path / "ours" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes() for path in files)


def test_a_plan_is_a_function_of_headers_and_settings(tmp_path: Path) -> None:
    first, second = plans(sources(tmp_path)), plans(tmp_path)
    for one, two in zip(first, second, strict=True):
        assert (one.settings, one.sources, one.files, one.fills) == (two.settings, two.sources, two.files, two.fills)
        assert list(one.small()) == list(two.small())
    names = [[(file.name, file.bytes) for file in plan.files] for plan in first]
    assert len({str(name) for name in names}) == len(names)
    assert all(contents(plan) for plan in first)


@pytest.mark.parametrize("how", [Execution(workers=3), Execution(checksum=True), Execution(fsync=False)])
def test_how_a_plan_is_carried_out_changes_no_weight(tmp_path: Path, how: Execution) -> None:
    write_folder(tmp_path / "hf", FOUR_GROUPS, shards=2)
    for name, execution in (("one", Execution()), ("two", how)):
        import_hf(tmp_path / "hf", tmp_path / name, chunks_for_tp=2, how=execution)
        export_hf(tmp_path / name, tmp_path / f"{name}-hf", shard_bytes=20_000, how=execution)
    for first, second in (("one", "two"), ("one-hf", "two-hf")):
        names = sorted(path.relative_to(tmp_path / first) for path in (tmp_path / first).rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(tmp_path / second) for path in (tmp_path / second).rglob("*") if path.is_file())
        same = [name for name in names if (tmp_path / first / name).read_bytes() == (tmp_path / second / name).read_bytes()]
        assert set(names) - set(same) <= {Path("manifest.json")}


# ------------------------------------------------------------------------------------------------------------- scale
LLAMA_405B = llama_config(
    num_hidden_layers=126,
    hidden_size=16384,
    intermediate_size=53248,
    vocab_size=128256,
    num_attention_heads=128,
    num_key_value_heads=8,
    head_dim=128,
)


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per-layer"])
def test_a_405b_is_planned_in_no_time_and_little_memory(tp: int, stacked: bool) -> None:
    shape = read_shape(LLAMA_405B)
    bf16 = BY_TORCH["bfloat16"]
    sources = {
        name: TensorRows.stored(bf16, sizes, Path("model.safetensors"), 8)
        for name, sizes in hf_shapes(model_tensors(shape)).items()
    }
    rows = padded_vocab_size(shape, 128, tp)
    arguments: dict[str, Any] = {"dtype": None, "chunks_for_tp": tp, "stacked": stacked, "vocab_rows": rows, "where": "hf"}
    begun = time.process_time()
    layout = plan_torch_dist(shape, sources, **arguments)
    for _ in layout.small():
        pass
    assert time.process_time() - begun < 1.0
    weights = sum(tensor.nbytes for tensor in sources.values())
    assert weights == 2 * 405_853_388_800  # the parameters of Llama-3.1-405B
    padding = 2 * (rows - 128_256) * 16_384 * 2
    assert 0 < sum(file.bytes for file in layout.files) - weights - padding < 10 << 20
    assert all(4 << 30 <= file.bytes < 9 << 30 for file in layout.files[:-1])
    tracemalloc.start()
    try:
        kept = plan_torch_dist(shape, sources, **arguments)
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept.fills) == {1: 30, 8: 58}[tp] * 126 + {1: 3, 8: 17}[tp]
    assert peak < 8 << 20
    assert size < 8 << 20
