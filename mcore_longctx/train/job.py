"""One training job: what to train, from where, on which data, and where everything goes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mcore_longctx.errors import CheckpointError, ConfigError
from mcore_longctx.manifest import MANIFEST, sha256_file, verify_manifest
from mcore_longctx.recipe import ModelShape, Stage
from mcore_longctx.rope import RopeScaling

__all__ = ["TrainJob", "data_fingerprint", "refuse_changed_settings"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything that `train_stage` needs to know.

    `start_rope` is the rope that the card of `start_checkpoint` must carry: the model's own for the first stage, which changes it
    on purpose, and the recipe's for every later one.
    """

    shape: ModelShape
    rope: RopeScaling
    start_rope: RopeScaling
    stage: Stage
    data_prefix: Path  # PREFIX.bin, .idx and .runs.npz, with manifest.json beside them
    start_checkpoint: Path  # a torch_dist folder: weights of the first step
    checkpoints: Path  # holds iter_0000012/, ...
    metrics_path: Path
    tensorboard: Path
    log_folder: Path  # rank0.log, STATUS
    phase_dtype: Literal["float32", "float64"] = "float32"
    backend: Literal["local", "te"] = "local"
    tokenizer_sha256: str | None = None
    seed: int = 1234
    sentence_ends: tuple[int, ...] = ()  # token ids, for positions of type segments; they follow from the tokenizer

    def __post_init__(self) -> None:
        if self.stage.global_batch_size * self.stage.seq_length >= 2**31:
            # finalize_model_grads adds the token counts of a step in int32
            raise ConfigError(
                f"global_batch_size x seq_length is {self.stage.global_batch_size * self.stage.seq_length:,} tokens a step",
                where=f"stages.{self.stage.name}.global_batch_size",
                fix="megatron-core counts them in int32: stay below 2^31",
            )

    def settings(self, *, data: str) -> dict[str, Any]:
        """What decides the losses of this stage, by the names of the recipe. Stored in every checkpoint, compared at resume.

        The parallel layout, the micro-batch size and how often is saved may change between two starts: they are not here.

        Args:
            data: what `data_fingerprint` gives for the data.
        """
        stage = self.stage
        return {
            "seed": self.seed,
            "seq_length": int(stage.seq_length),
            "global_batch_size": stage.global_batch_size,
            "train_iters": stage.iterations,
            "precision": stage.precision,
            **{f"optimizer.{name}": value for name, value in asdict(stage.optimizer).items()},
            "rope.phase_dtype": self.phase_dtype,
            # what checkpoints of before do not name, they were made without
            **({"cross_document_mask": True} if stage.cross_document_mask else {}),
            **({"optimizer_from": stage.optimizer_from} if stage.optimizer_from != "none" else {}),
            **({"balance": stage.balance} if stage.balance != "none" else {}),
            **_named("positions", stage.positions),
            **_named("sparsity", stage.sparsity),
            **({"loss_reduction": stage.loss_reduction} if stage.loss_reduction != "token_mean" else {}),
            "data": data,
            "start_checkpoint": _manifest_hash(self.start_checkpoint),
        }


def _named(name: str, section: Any) -> dict[str, Any]:
    """The values of an optional section by their names in the recipe; nothing where there is none."""
    return {} if section is None else {f"{name}.{key}": value for key, value in asdict(section).items()}


def _manifest_hash(folder: Path) -> str | None:
    """One hash for all that a checkpoint holds, without reading it. None when it is gone: a resumed run does not need it."""
    path = folder / MANIFEST
    return sha256_file(path) if path.is_file() else None


def data_fingerprint(prefix: Path, *, tokenizer_sha256: str | None = None) -> str:
    """Check the data folder against its manifest and return one hash over the files of `prefix`.

    Raises:
        CheckpointError: no manifest, a file missing or damaged, or data made with another tokenizer.
    """
    manifest = verify_manifest(prefix.parent, "data")
    rows = {name: row["sha256"] for name, row in manifest["files"].items() if name.startswith(f"{prefix.name}.")}
    if not rows:
        raise CheckpointError(f"no files of {prefix.name} in the manifest", where=prefix.parent, fix="build the data again")
    made_with = manifest.get("tokenizer", {}).get("sha256")
    if tokenizer_sha256 is not None and made_with is not None and made_with != tokenizer_sha256:
        raise CheckpointError(
            f"tokenized with another tokenizer ({made_with[:12]}, the recipe's is {tokenizer_sha256[:12]})",
            where=prefix.parent,
            fix="build the data again",
        )
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in sorted(rows.items())).encode()).hexdigest()


def refuse_changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """Raise CheckpointError, with names and values, when a run is resumed with settings that change its losses."""
    changed = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
    if now.get("start_checkpoint") is None and "start_checkpoint" in changed:
        changed.remove("start_checkpoint")
    if not changed:
        return
    words = [_change(name, saved.get(name), now.get(name)) for name in changed]
    raise CheckpointError(
        f"trained with other settings: {', '.join(words)}",
        where=where,
        fix="set them back to go on, or train into another output folder",
    )


def _change(name: str, old: Any, new: Any) -> str:
    if name in ("data", "start_checkpoint"):
        return f"{name.replace('_', ' ')} has changed since"
    return f"{name} was {old!r}, is {new!r} now"
