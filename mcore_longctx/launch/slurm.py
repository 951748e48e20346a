"""Job scripts: text from templates, every word of the recipe quoted. Nothing here writes a file or asks SLURM."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
import yaml

from mcore_longctx.errors import ConfigError
from mcore_longctx.launch.environment import environment_lines
from mcore_longctx.launch.local import CONTAINER, ERROR_NOTE, SRUN_OPTIONS
from mcore_longctx.recipe import ClusterSection, Parallel, Recipe, Stage, TokenCount

__all__ = ["Job", "Times", "render_steps", "render_submit", "render_training", "shape_of_job"]

_PAD = "  "
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of the chain. `stage` is set where the job trains; the others do `steps` of `mcore-longctx run`."""

    name: str  # 20-extend: also the name of its script
    steps: tuple[str, ...]
    stage: str | None = None
    nodes: int = 1
    ranks_per_node: int = 1
    needs_gpus: bool = True

    @property
    def evaluates(self) -> bool:
        """Whether it measures models: one a step."""
        return all(step.startswith("evaluate-") for step in self.steps)

    @property
    def starts_ranks(self) -> bool:
        """Whether `run` itself starts ranks on several nodes: then it cannot be in a container of one of them."""
        return self.stage is None and self.nodes > 1


@dataclass(frozen=True, kw_only=True)
class Times:
    """What follows from the planned step time, each with a word on where it comes from."""

    lead: int  # seconds
    lead_note: str
    timeout_note: str
    limit_note: str


def shape_of_job(parallel: Parallel, nproc_per_node: int, *, where: str) -> tuple[int, int]:
    """Nodes and ranks of a node for a layout.

    Raises:
        ConfigError: it fills no whole number of nodes.
    """
    world = parallel.world_size
    if world <= nproc_per_node:
        return 1, world
    if world % nproc_per_node:
        below = world - world % nproc_per_node
        raise ConfigError(
            f"{parallel.describe()}: {world:,} ranks fill no whole number of nodes with {nproc_per_node} ranks each",
            where=where,
            fix=f"nearest are {below:,} and {below + nproc_per_node:,} ranks; or change cluster.nproc_per_node",
        )
    return world // nproc_per_node, nproc_per_node


def render_training(recipe: Recipe, job: Job, stage: Stage, times: Times) -> str:
    """The script of a training job."""
    at = f"stages.{stage.name}"
    kept = {"save_interval": stage.save_interval, "keep_checkpoints": stage.keep_checkpoints, "async_save": stage.async_save}
    timeout = {"distributed_timeout_minutes": stage.distributed_timeout_minutes}
    return _render(
        "train.sbatch.j2",
        recipe,
        job,
        time_note=times.limit_note,
        layout=stage.parallel.describe(),
        lead=times.lead,
        lead_note=times.lead_note,
        timeout_note=times.timeout_note,
        error_note=ERROR_NOTE,
        training_args=list(_overrides(f"{at}.activations", asdict(stage.activations))),
        model_parallel_args=list(_overrides(f"{at}.parallel", asdict(stage.parallel))),
        logging_args=[*_overrides(at, kept), *_overrides(at, timeout)],
    )


def render_steps(recipe: Recipe, job: Job, planned: str = "") -> str:
    """The script of a job that does steps of `mcore-longctx run`; `planned`: how long they take, where that is known."""
    kept = "what is finished is kept: a job that ran out of time can be submitted again"
    return _render("steps.sbatch.j2", recipe, job, time_note=f"{planned}; {kept}" if planned else kept)


def render_submit(recipe: Recipe, jobs: list[Job]) -> str:
    """`submit.sh`: the chain."""
    names = [job.name for job in jobs]
    return _templates().get_template("submit.sh.j2").render(
        recipe_name=recipe.name, run=str(recipe.run_folder), cluster=recipe.cluster, names=names
    )  # fmt: skip


def _render(template: str, recipe: Recipe, job: Job, **more: Any) -> str:
    cluster, folder = recipe.cluster, recipe.run_folder
    if any(character in str(folder) for character in '\n\r"#%\\'):
        raise ConfigError(
            "cannot stand in an #SBATCH line, where the log goes", where=f"run folder {folder}", fix="use another name"
        )
    if str(folder).startswith("-"):
        raise ConfigError(
            "a name that starts with a dash is an option to programs", where=f"run folder {folder}", fix="use another"
        )
    job_facts = {
        **asdict(job),
        "starts_ranks": job.starts_ranks,
        "job_name": _UNSAFE.sub("-", f"{recipe.name}.{job.name}"),
        "gpus_per_node": cluster.nproc_per_node if job.needs_gpus and cluster.gpu != "none" else 0,
    }
    return _templates().get_template(template).render(
        job=job_facts,
        cluster=cluster,
        container_options=_words(_container_options(cluster)),
        container_command=_words(_container_command(cluster, on_gpu=bool(job_facts["gpus_per_node"]))),
        srun_options_name=SRUN_OPTIONS,
        container_name=CONTAINER,
        environment=list(environment_lines(cluster)),
        given=sorted(cluster.environment.items()),
        recipe_name=recipe.name,
        run=str(folder),
        log_pattern=f"{_option_value(f'{folder}/slurm')}/%x-%j.out",
        site_options=_site_values(cluster, job),
        pad=_PAD,
        **more,
    )  # fmt: skip


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mcore_longctx.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # {# is shell: ${#array}
        comment_end_string="#>",
        autoescape=False,  # shell text: `quote` is the escape
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment


def _overrides(at: str, values: Mapping[str, Any]) -> Iterator[str]:
    """`section.name=value` for the command line, values as YAML in one line."""
    for name, value in values.items():
        if value is not None:
            plain = [*value] if isinstance(value, tuple) else int(value) if isinstance(value, TokenCount) else value
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
            yield f"{at}.{name}={text}"


def _site_values(cluster: ClusterSection, job: Job) -> list[tuple[str, str | None]]:
    partition = cluster.partition if job.needs_gpus else cluster.cpu_partition or cluster.partition
    return [
        ("account", cluster.account),
        ("partition", partition),
        ("qos", cluster.qos),
        ("reservation", cluster.reservation),
        ("constraint", cluster.constraint),
    ]


def _option_value(value: str) -> str:
    """A value for an #SBATCH line: sbatch takes double quotes and no shell; a single quote would open a string."""
    return f'"{value}"' if any(character.isspace() or character == "'" for character in value) else value


def _words(words: list[str]) -> str:
    """For a bash array. A comma is quoted too: shellcheck takes a bare one for a mistake."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def _container_options(cluster: ClusterSection) -> list[str]:
    container = cluster.container
    if container.runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, "--container-mount-home"]


def _container_command(cluster: ClusterSection, *, on_gpu: bool) -> list[str]:
    container = cluster.container
    if container.runtime != "apptainer":
        return []
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if on_gpu else []), *binds, str(container.image)]
