"""The effective rope: of the recipe, of the model as it is built here, of what stock Megatron-LM would build, of checkpoints at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mcore_longctx.checkpoint_folder import latest_checkpoint
from mcore_longctx.errors import LongctxError
from mcore_longctx.launch.doctor.findings import Finding, note, ok, wrong
from mcore_longctx.recipe import Recipe
from mcore_longctx.recipe.card import read_card
from mcore_longctx.recipe.resolve import Resolved
from mcore_longctx.rope import RopeScaling
from mcore_longctx.rope.frequencies import FloatArray, plain_frequencies

__all__ = ["as_built", "of_checkpoints", "question", "stages_to_build"]

_FLOAT32_STEPS = 8 * 2.0**-24  # of a handful of float32 operations, each rounded by at most 2^-24
_REINSTALL = "reinstall mcore-longctx and megatron-core in one environment, with nothing that patches them"


def stages_to_build(recipe: Recipe, resolved: Resolved) -> list[str]:
    """One stage of each rope that the recipe trains with, the last of those that share it, in order."""
    found = {(rope.fingerprint(), recipe.rope_section(name).phase_dtype): name for name, rope in resolved.stage_ropes.items()}
    return [stage.name for stage in recipe.stages if stage.name in found.values()]


def question(recipe: Recipe, resolved: Resolved, stage: str | None = None) -> dict[str, Any]:
    """What `python -m mcore_longctx.model.as_built` is asked about the rope of a stage (None: the last one)."""
    return {
        "shape": resolved.shape.as_dict(),
        "rope": (resolved.rope if stage is None else resolved.rope_of(stage)).as_dict(),
        "phase_dtype": recipe.rope_section(stage).phase_dtype,
        "backend": recipe.model.backend,
    }


def as_built(found: Mapping[str, Any], recipe: Recipe, rope: RopeScaling, stage: str | None = None) -> Iterator[Finding]:
    """The built module's frequencies, softmax scale and angles against those of a stage (None: the last one).

    float64 phases: the same fingerprint. float32 phases: within the rounding of float32, and where transformers is installed its bits.
    """
    phase_dtype = recipe.rope_section(stage).phase_dtype
    if "error" in found:
        yield wrong("rope as built", f"the model cannot be built: {found['error']}", "see megatron-core above, or model.backend")
        return
    wanted, temperature = rope.frequencies()
    built = np.array(found["inv_freq"], dtype=np.float64)
    yield from _frequencies(built, wanted, found, phase_dtype, rope)
    scale = temperature**2 * rope.head_dim**-0.5
    context = rope.resolved_max_position_embeddings
    text = (
        f"temperature {temperature:.6g} (softmax scale {found['softmax_scale']:.8g}), effective context {context or 0:,} tokens"
    )
    if abs(found["softmax_scale"] / scale - 1) > 1e-6:
        yield wrong("rope as built", f"{text}: the recipe's scale is {scale:.8g}", _REINSTALL)
    else:
        yield ok("rope as built", text)
    bound = 1e-5 if phase_dtype == "float64" else 1e-5 + (context or 0) * 4 * 2.0**-24
    text = f"{phase_dtype} angles at the end of the context are right to {found['angle_error']:.1e} rad"
    if found["angle_error"] > bound:
        yield wrong("rope as built", text, _REINSTALL)
    else:
        yield ok("rope as built", text)
    if found["stock"] is not None:
        yield _stock(np.array(found["stock"]), wanted, found["megatron"], rope)


def _frequencies(
    built: FloatArray, wanted: FloatArray, found: Mapping[str, Any], phase_dtype: str, rope: RopeScaling
) -> Iterator[Finding]:
    like = {True: "; the same bits as transformers", False: "", None: ""}[found["transformers"]]
    text = f"{len(built)} inverse frequencies of {found['module']} on {found['device']}"
    if built.shape != wanted.shape:
        yield wrong("rope as built", f"{text}, the recipe has {len(wanted)}", _REINSTALL)
        return
    allowed = np.full(len(wanted), 1e-12) if phase_dtype == "float64" else _rounding_of_float32(wanted, rope)
    difference = np.abs(built / wanted - 1)
    # hashes compare tables, not roundings: what is the wanted value but for rounding counts as the wanted value
    digest, expected = _digest(np.where(difference <= allowed, wanted, built)), _digest(wanted)
    text += f": hash {digest[:12]}, the recipe's {expected[:12]}"
    if digest != expected:
        worst = int((difference / allowed).argmax())
        yield wrong("rope as built", f"{text}; pair {worst} turns {built[worst] / wanted[worst]:.6g} times as fast", _REINSTALL)
        return
    yield ok("rope as built", f"{text} [rope {rope.fingerprint()[:12]}], apart by at most {difference.max():.1e}{like}")
    if found["transformers"] is False:
        yield note("rope as built", "transformers computes other bits from the config.json that is exported")


def _rounding_of_float32(wanted: FloatArray, rope: RopeScaling) -> FloatArray:
    """Relative error that float32 arithmetic may leave in each frequency, [d/2].

    In the mixed pairs of a ramp the share that is kept is a difference, so its error is relative to the unscaled frequency.
    """
    allowed = np.full(len(wanted), _FLOAT32_STEPS)
    if rope.type in ("llama3", "yarn"):
        share = rope.share_kept()
        plain = plain_frequencies(rope.head_dim, rope.rope_theta)
        allowed = np.where((share > 0) & (share < 1), _FLOAT32_STEPS * plain / wanted, allowed)
    return allowed


def _digest(frequencies: FloatArray) -> str:
    return hashlib.sha256(frequencies.astype("<f8").tobytes()).hexdigest()


def _stock(stock: FloatArray, wanted: FloatArray, version: str, rope: RopeScaling) -> Finding:
    """Its builder passes no factor on, and the other three numbers of the type are constants there."""
    apart = np.maximum(stock / wanted, wanted / stock)
    differ = int((apart > 1 + _rounding_of_float32(wanted, rope)).sum())
    if not differ:
        return ok("stock Megatron-LM", f"--use-rope-scaling builds the same frequencies in megatron-core {version}")
    return note(
        "stock Megatron-LM",
        f"its flags would not build this rope: --use-rope-scaling --rope-scaling-factor {rope.factor:g} makes another one in megatron-core "
        f"{version}, {differ} of {len(stock)} frequencies up to {apart.max():.4g} times apart",
        "train with this package, or give --longctx-rope (docs/megatron_lm.md)",
    )


def of_checkpoints(recipe: Recipe, resolved: Resolved) -> Iterator[Finding]:
    """Checkpoints that are in the run folder already carry the rope that they were made with: it must be that of their stage."""
    checkpoints = recipe.run_folder / "checkpoints"
    merged = {f"{name}-merged": rope for name, rope in resolved.stage_ropes.items()}
    wanted = {**resolved.stage_ropes, **merged, "base": resolved.own_rope}
    if not resolved.model_found:
        wanted.pop("base")
    for stage, rope in wanted.items():
        folder = checkpoints / stage
        newest = folder if (folder / "mcore_longctx.json").is_file() else latest_checkpoint(folder)
        if newest is None:
            continue
        try:
            card = read_card(newest)
            card.check(shape=resolved.shape, rope=rope, where=newest)
        except LongctxError as error:
            yield wrong("checkpoint", f"{error.where}: {error.what}", error.fix or "use another output")
        else:
            yield ok("checkpoint", f"{newest}: {card.stage}, iteration {card.iteration:,}, the rope that is wanted")
