"""The recipe reader: every mistake in one line with file, line, dotted path and the nearest valid name."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe.load import dump_recipe, load_recipe, open_recipe, preset_names
from mcore_longctx.recipe.schema import TokenCount
from mcore_longctx.units import parse_count

GOOD = """\
name: small
model:
  path: somewhere
rope:
  type: llama3
  factor: 8
  original_max_position_embeddings: 512
data:
  long:
    sources:
      - {name: books, path: books}
stages:
  - name: extend
    kind: pretrain
    data: long
    seq_length: 4k
    train_iters: 2
    global_batch_size: 1
    parallel: {context_parallel_size: 2}
    optimizer:
      lr: 1e-4
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def refusal(path: Path, text: str, *overrides: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(path.parent) + "/", "")


def test_a_good_file_is_read_with_types(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    stage = recipe.stages[0]
    assert stage.seq_length == 4096
    assert stage.optimizer.lr == 1e-4  # YAML 1.1 reads 1e-4 as a text
    assert stage.parallel.world_size == 2
    assert recipe.data["long"].sources[0].path == Path("books")
    assert recipe.run_folder == Path("runs/small")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("factor: 8", "factr: 8", "run.yaml:6: rope.factr: unknown name; did you mean 'factor'?"),
        (
            "type: llama3",
            "type: lama3",
            "run.yaml:5: rope.type: 'lama3' is not one of none, linear, ntk, dynamic, abf, llama3, yarn, bands, longrope; did you mean 'llama3'?",
        ),
        ("factor: 8", "factor: eight", "run.yaml:6: rope.factor: 'eight' is not a number"),
        ("factor: 8", "bands: {pairs: 8}", "run.yaml:6: rope.bands: a section is not a list"),
        (
            "factor: 8",
            "bands: [{pairs: 8}]",
            "run.yaml:6: rope.bands.0.rule: missing; it has no default, give one of none, linear, ntk, mix",
        ),
        (
            "factor: 8",
            "bands:\n  - {pairs: 8, rule: none}\n  - {pairs: 8, rule: nkt}",
            "run.yaml:8: rope.bands.1.rule: 'nkt' is not one of none, linear, ntk, mix; did you mean 'ntk'?",
        ),
        (
            "factor: 8",
            "bands:\n  - {pairs: 8, rule: none}\n  - {pairs: 8, rule: mix}",
            "run.yaml:8: rope.bands.1: ntk_share is None, rule mix needs a number from 0 (linear) to 1 (ntk)",
        ),
        ("factor: 8", "long_factor: [1, two]", "run.yaml:6: rope.long_factor.1: 'two' is not a number"),
        ("factor: 8", "factor: .inf", "run.yaml:6: rope.factor: .inf is not a finite number"),
        ("train_iters: 2", "train_iters: 2.5", "run.yaml:17: stages.extend.train_iters: '2.5' is not a whole number"),
        ("train_iters: 2", "train_iters: yes", "run.yaml:17: stages.extend.train_iters: 'yes' is not a whole number"),
        (
            "seq_length: 4k",
            "seq_length: 4q",
            "run.yaml:16: stages.extend.seq_length: '4q' is not a token count; write 4096, 1_048_576, 128k or 4M",
        ),
        (
            "    seq_length: 4k\n",
            "",
            "run.yaml:13: stages.extend.seq_length: missing; it has no default, give a token count (4096, 128k, 4M)",
        ),
        ("model:\n  path: somewhere", "model: somewhere", "run.yaml:2: model: 'somewhere' is not a section (name: value)"),
        ("stages:\n", "stages: []\nstages_:\n", "run.yaml:13: stages_: unknown name; did you mean 'stages'?"),
        ("name: small\n", "name: small\nname: other\n", "run.yaml:2: name: given twice; keep one"),
        (
            "seq_length: 4k",
            "seq_length: 4098",
            "run.yaml:13: stages.extend: seq_length 4,098 is not a multiple of 2 x context_parallel_size (4); nearest: 4,096 or 4,100",
        ),
        ("data: long", "data: lon", "run.yaml:15: stages.extend.data: no data set 'lon'; did you mean 'long'?"),
        (
            "  - name: extend",
            "  - name: extend/../x",
            "run.yaml:13: stages.extend/../x: name 'extend/../x' names a folder; use letters, digits, '.', '_' and '-'",
        ),
        (
            "train_iters: 2",
            "train_iters: 2\n    train_tokens: 1M",
            "run.yaml:13: stages.extend: give either train_iters or train_tokens",
        ),
        (
            "lr: 1e-4",
            "{lr: 1e-4, lr_warmup_iters: 2}",
            "run.yaml:13: stages.extend: optimizer.lr_warmup_iters is 2, expected less than the 2 iterations",
        ),
        (
            "global_batch_size: 1",
            "global_batch_size: 2\n    micro_batch_size: 2\n    cross_document_mask: true",
            "run.yaml:13: stages.extend: cross_document_mask needs micro_batch_size 1, it is 2: a sample is a batch itself",
        ),
        (
            "global_batch_size: 1",
            "global_batch_size: 1\n    activations: {recompute: kept}",
            "run.yaml:19: stages.extend.activations.recompute: 'kept' is not one of none, full, attention_kept; valid: attention_kept,"
            " full, none",
        ),
        (
            "global_batch_size: 1",
            "global_batch_size: 1\n    activations: {recompute: none, offload_fraction: 0.5}",
            "run.yaml:19: stages.extend.activations: offload_fraction needs recompute attention_kept or full: with none there is"
            " nothing that is kept by us",
        ),
        (
            "global_batch_size: 1",
            "global_batch_size: 1\n    activations: {mlp_tile: 0}",
            "run.yaml:19: stages.extend.activations: mlp_tile is 0, expected 1 or more tokens",
        ),
        (
            "{context_parallel_size: 2}",
            "{context_parallel_size: 4, cp_comm_type: a2a+p2p}",
            "run.yaml:19: stages.extend.parallel: cp_comm_type a2a+p2p needs hierarchical_context_parallel_sizes: [ranks of the a2a,"
            " ranks of the ring]",
        ),
        (
            "{context_parallel_size: 2}",
            "{context_parallel_size: 4, cp_comm_type: a2a+p2p, hierarchical_context_parallel_sizes: [2, 4]}",
            "run.yaml:19: stages.extend.parallel: hierarchical_context_parallel_sizes are [2, 4], expected two sizes whose product is"
            " context_parallel_size 4",
        ),
        ("name: small", "name: [small", "run.yaml:2: not valid YAML: did not find expected ',' or ']'"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(recipe_file: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert refusal(recipe_file, GOOD.replace(old, new)) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rope.factr=2", "override 'rope.factr=2': rope.factr: unknown name; did you mean 'factor'?"),
        ("rope.factor=two", "override 'rope.factor=two': rope.factor: 'two' is not a number"),
        (
            "stages.extnd.seq_length=8k",
            "override 'stages.extnd.seq_length=8k': stages.extnd: unknown name; did you mean 'extend'?",
        ),
        ("rope.factor.x=2", "override 'rope.factor.x=2': rope.factor is a number, it has no 'x'"),
        ("rope", "override 'rope' is not of the form section.name=value"),
        ("data.shor.separator=x", "override 'data.shor.separator=x': data.shor: unknown name; valid: long"),
    ],
)
def test_a_wrong_override_is_named(recipe_file: Path, override: str, message: str) -> None:
    assert refusal(recipe_file, GOOD, override) == message


def test_overrides_win_and_the_last_one_most(recipe_file: Path) -> None:
    file = open_recipe(
        recipe_file,
        [
            "stages.extend.seq_length=8k",
            "stages.0.optimizer.lr=2e-5",
            "stages.extend.seq_length=16k",
            "rope={type: yarn, factor: 4, original_max_position_embeddings: 512}",
            "model.num_layers=null",
        ],
    )
    assert file.recipe.stages[0].seq_length == 16384
    assert file.recipe.stages[0].optimizer.lr == 2e-5
    assert (file.recipe.rope.type, file.recipe.rope.factor) == ("yarn", 4.0)
    assert file.where("stages.extend.seq_length") == "override 'stages.extend.seq_length=16k': stages.extend.seq_length"
    assert file.where("stages.extend.data") == f"{recipe_file}:15: stages.extend.data"


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such recipe file, and no preset of this name; did you mean 'tiny-cpu'"):
        load_recipe("tiny-cpus")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 6\)"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml: name: missing"):
        load_recipe(tmp_path / "empty.yaml")
    (tmp_path / "run.yaml").write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="name: a list is not a text"):
        load_recipe(tmp_path / "run.yaml")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_complete_and_survive_writing_and_reading(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_ultralong_presets_hold_the_published_figures() -> None:
    for name, factor, cp, length in (("1m", 128, 4, 1 << 20), ("2m", 256, 16, 1 << 21), ("4m", 512, 16, 1 << 22)):
        recipe = load_recipe(f"ultralong-8b-{name}")
        extend, instruct = recipe.stages
        assert (recipe.rope.type, recipe.rope.factor, recipe.rope.original_max_position_embeddings) == ("llama3", factor, 8192)
        assert (extend.seq_length, extend.parallel.context_parallel_size, extend.optimizer.lr) == (length, cp, 3e-5)
        assert extend.parallel.world_size == instruct.parallel.world_size == 256
        assert extend.iterations * extend.global_batch_size * extend.seq_length == 150 * 2 * (1 << 22)
        assert (instruct.optimizer.lr, instruct.global_batch_size) == (5e-6, 128)


@given(st.integers(1, 10**15))
def test_plain_counts_are_read_back(count: int) -> None:
    assert parse_count(str(count)) == parse_count(f"{count:,}") == parse_count(f"{count:_}") == count


def test_counts_with_units_are_powers_of_two() -> None:
    assert [parse_count(text) for text in ("128k", "128K", "1M", "4M", "0.5M", "1.26B")] == [
        131072,
        131072,
        1048576,
        4194304,
        524288,
        1260000000,
    ]
    for text in ("", "4Q", "-1", "1e5", "1.3k5", "0.3k"):
        with pytest.raises(ValueError, match=r"token count|whole number"):
            parse_count(text)


def test_dumped_numbers_are_plain(recipe_file: Path) -> None:
    text = dump_recipe(load_recipe(recipe_file))
    assert yaml.safe_load(text)["stages"][0]["seq_length"] == 4096
    assert isinstance(load_recipe(recipe_file).stages[0].seq_length, TokenCount)


def test_a_null_that_is_not_the_default_is_written_down(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GOOD)
    name = load_recipe(tmp_path / "run.yaml").stages[0].name
    recipe = load_recipe(tmp_path / "run.yaml", [f"stages.{name}.activations.mlp_tile=null"])
    assert recipe.stages[0].activations.mlp_tile is None
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
