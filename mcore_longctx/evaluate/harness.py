"""lm-evaluation-harness on a checkpoint of a run, as Megatron runs it: any tasks, on the ranks that the length needs.

    rank 0            loads the tasks, drives lm_eval.simple_evaluate with `LongctxLM`, writes the results
    all other ranks   wait in `HarnessRanks.serve` for the next step

Nothing here reaches for a network; a task may, if its data lies there.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from mcore_longctx.data.tokenizers import check_vocabulary, load_tokenizer
from mcore_longctx.errors import CheckpointError, ConfigError, StorageError
from mcore_longctx.evaluate.harness_ranks import HarnessRanks
from mcore_longctx.evaluate.rows import on_first_rank
from mcore_longctx.families import ModelShape
from mcore_longctx.manifest import MANIFEST, sha256_file, verify_manifest, write_atomic
from mcore_longctx.megatron_compat import device_context
from mcore_longctx.model import build_gpt_model, destroy_process_groups, init_process_groups
from mcore_longctx.model.weights import load_model_weights
from mcore_longctx.recipe.card import read_card
from mcore_longctx.recipe.schema import Parallel
from mcore_longctx.rope import RopeScaling

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["HarnessJob", "check_harness", "run_harness"]

_LEAST, _BELOW = (0, 4, 13), (0, 5)  # of lm-eval
_INSTALL = "pip install 'mcore-longctx[harness]'"


@dataclass(frozen=True, kw_only=True)
class HarnessJob:
    """Which tasks, on which checkpoint.

    Attributes:
        tasks: names of tasks or groups.
        checkpoint: torch_dist folder with manifest and card; it is measured with the rope of its card.
        shape: sizes that it must have.
        rope: rope that its card must state; its longest length is the limit of prompt and answer.
        hf: folder of the imported model: generation_config.json says what ends an answer.
        tokenizer: folder that transformers can load a tokenizer from.
        parallel: layout, in one pipeline stage.
        out: the .json file to write.
        include_path: folder with tasks (YAML), to be used in place of lm-eval's own.
        metadata: what makers of samples are given, beside `tokenizer`.
        limit: samples of each task; None: all.
        num_fewshot: solved examples before each question; None: as the task says.
        apply_chat_template: ask in a chat.
        log_samples: write every request and answer to `OUT.samples.jsonl`.
    """

    tasks: tuple[str, ...]
    checkpoint: Path
    shape: ModelShape
    rope: RopeScaling
    hf: Path
    tokenizer: Path
    parallel: Parallel
    out: Path
    include_path: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    log_samples: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    phase_dtype: Literal["float32", "float64"] = "float32"
    backend: Literal["local", "te"] = "local"
    seed: int = 1234


def check_harness(job: HarnessJob) -> int:
    """What can be wrong before anything is started. Longest length of prompt and answer, in tokens.

    Raises:
        ConfigError, CheckpointError, DataError: lm-eval, the tasks' folder, the checkpoint or the tokenizer is not what it must be.
    """
    _check_installed()
    if job.backend == "te":
        raise ConfigError(
            "options and decoding keep keys and values of a prompt, which layers of TransformerEngine do not do for us",
            where="model.backend: te",
            fix="set model.backend=local, which reads the same checkpoint",
        )
    if job.include_path is not None and not job.include_path.is_dir():
        raise ConfigError("no such folder", where=f"--include-path: {job.include_path}")
    if job.out.is_dir():
        raise ConfigError("is a folder, the name of a file is wanted", where=f"--out: {job.out}")
    card = read_card(job.checkpoint)
    card.check(shape=job.shape, rope=job.rope, where=job.checkpoint)
    tokenizer = load_tokenizer(job.tokenizer, fast=False)
    check_vocabulary(tokenizer, job.shape.vocab_size)
    if card.tokenizer_sha256 is not None and card.tokenizer_sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"was made with another tokenizer than {job.tokenizer}",
            where=job.checkpoint,
            fix="set tokenizer in the recipe to its own",
        )
    longest = job.rope.resolved_max_position_embeddings
    if longest is None:
        raise ConfigError("states no longest length", where="rope", fix="set rope.max_position_embeddings")
    return longest


def run_harness(job: HarnessJob, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
    """Run the tasks and write the results. Every rank of the layout calls it.

    Args:
        job: what to do.
        say: takes lines for people, on rank 0.

    Returns:
        lm-eval's results with the samples, on rank 0; None on the others.

    Raises:
        ConfigError, CheckpointError, DataError, LayoutError: what `check_harness` finds; an unknown task; a request that is too long or
            wants sampling; ranks that do not fit.
        StorageError: the results cannot be written.
    """
    longest = check_harness(job)
    init_process_groups(job.parallel, seed=job.seed)
    try:
        with device_context():
            tokenizer = _load_tokenizer(job)

            def decode(ids: Any) -> str:
                return str(tokenizer.decode(ids, skip_special_tokens=False))

            ranks = HarnessRanks(lambda: _build(job, longest), decode, _end_ids(job, tokenizer))
            if dist.get_rank() > 0:
                ranks.serve()
                return None
            with ranks.leading():
                return _lead(job, ranks, tokenizer, longest, say)
    finally:
        destroy_process_groups()


def _lead(job: HarnessJob, ranks: HarnessRanks, tokenizer: Any, longest: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Rank 0: the harness itself."""
    from lm_eval import simple_evaluate

    from mcore_longctx.evaluate.harness_lm import LongctxLM

    with _refused(job.out):  # before hours are spent on it
        job.out.parent.mkdir(parents=True, exist_ok=True)
    manager = _task_manager(job)
    tasks = _load_tasks(manager, job.tasks)
    ranks.build()
    info = {
        "checkpoint": str(job.checkpoint),
        "checkpoint_sha256": sha256_file(job.checkpoint / MANIFEST),
        "rope": job.rope.describe(),
        "layout": job.parallel.describe(),
        "precision": job.precision,
    }
    results: dict[str, Any] = simple_evaluate(
        model=LongctxLM(ranks, tokenizer, max_length=longest, info=info),
        tasks=tasks,
        task_manager=manager,
        limit=job.limit,
        num_fewshot=job.num_fewshot,
        apply_chat_template=job.apply_chat_template,
        fewshot_as_multiturn=job.apply_chat_template,
        log_samples=True,
        random_seed=job.seed,
        numpy_random_seed=job.seed,
        torch_random_seed=job.seed,
        fewshot_random_seed=job.seed,
    )
    samples = results["samples"]
    with _refused(job.out):
        if job.log_samples:
            lines = [{"task": task, **row} for task, rows in samples.items() for row in rows]
            write_atomic(job.out.with_suffix(".samples.jsonl"), "".join(_dumped(line) + "\n" for line in lines))
        write_atomic(job.out, _dumped({key: value for key, value in results.items() if key != "samples"}, indent=2) + "\n")
    for line in _table(results):
        say(line)
    say(f"results: {job.out}")
    return results


def _task_manager(job: HarnessJob) -> TaskManager:
    """Finds tasks: in the folder that is given, else lm-eval's own, whose index takes most of a minute.

    Raises:
        ConfigError: a name that is not there.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=job.include_path,
        include_defaults=job.include_path is None,
        metadata={"tokenizer": str(job.tokenizer), **job.metadata},
    )
    for name in job.tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
            raise ConfigError(
                f"unknown task {name!r}",
                where=f"--tasks ({job.include_path or 'lm-eval'})",
                fix=f"did you mean {near[0]!r}?" if near else "",
            )
    return manager


def _load_tasks(manager: TaskManager, names: tuple[str, ...]) -> list[Any]:
    """Tasks and groups with their samples, made once: groups bring their own tasks."""
    loaded = manager.load(list(dict.fromkeys(names)))
    inside = {child for children in loaded["group_map"].values() for child in children}
    return [item for name, item in {**loaded["groups"], **loaded["tasks"]}.items() if name not in inside]


def _build(job: HarnessJob, longest: int) -> Any:
    """The model with its weights, on every rank."""
    on_first_rank(lambda: verify_manifest(job.checkpoint, "checkpoint"))
    unit = 2 * job.parallel.context_parallel_size * job.parallel.tensor_model_parallel_size
    model = build_gpt_model(
        job.shape,
        job.rope,
        job.parallel,
        precision=job.precision,
        seq_length=-(-longest // unit) * unit,
        phase_dtype=job.phase_dtype,
        seed=None,
        backend=job.backend,
    )
    load_model_weights(model, job.checkpoint)
    return model.eval()


def _load_tokenizer(job: HarnessJob) -> Any:
    """As the Hugging Face backend loads it; nothing of the folder is run, nothing is fetched."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(job.tokenizer), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"transformers cannot load a tokenizer from it: {reason}", where=job.tokenizer) from None
    tokenizer.model_max_length = (
        job.rope.resolved_max_position_embeddings
    )  # it warns of longer texts: its own is the base model's
    return tokenizer


def _end_ids(job: HarnessJob, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer, as transformers' `generate` takes them: generation_config.json, else config.json."""
    found: Any = tokenizer.eos_token_id
    for name in ("generation_config.json", "config.json"):
        path = job.hf / name
        if path.is_file():
            try:
                stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise ConfigError(f"cannot be read as a JSON object: {error}", where=path) from None
            if stated is not None:
                found = stated
                break
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"eos_token_id is {found!r}, expected token ids", where=job.hf)
    return frozenset(ids)


def _table(results: Mapping[str, Any]) -> list[str]:
    """A line for each metric of each task; lm-eval's own table forks processes, which a rank must not do."""
    lines = []
    for task, found in {**results["results"], **results.get("groups", {})}.items():
        for key, value in found.items():
            metric, comma, _filter = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr,{_filter}")
                shown = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task:<32} {metric:<16} {value:.4f}{shown}  ({found.get('sample_len', '-')} samples)")
    return lines


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed", fix=_INSTALL)
    version = metadata.version("lm_eval")
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3])
    if not _LEAST <= numbers < _BELOW:
        raise ConfigError(f"lm-eval {version} is installed, 0.4.13 or a later 0.4 is wanted", fix=_INSTALL)
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("lm-evaluation-harness needs transformers, which is not installed", fix=_INSTALL)


def _dumped(value: Any, indent: int | None = None) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", where=path) from None
