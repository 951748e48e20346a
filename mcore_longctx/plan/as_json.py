"""The plan of a stage for programs: bytes, seconds, shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mcore_longctx.plan.advice import breaks_nearby, why_best
from mcore_longctx.plan.candidates import Candidate
from mcore_longctx.plan.evaluation import EvaluationPrice
from mcore_longctx.plan.memory import Memory
from mcore_longctx.plan.page import StagePage, interval_terms, kernel_name, written_candidate
from mcore_longctx.plan.serving import ServingPlan
from mcore_longctx.plan.setup import Setup
from mcore_longctx.plan.stages import StagePlan
from mcore_longctx.plan.step_time import StepTime
from mcore_longctx.plan.terms import Term
from mcore_longctx.plan.validate import ValidationReport

__all__ = ["evaluation_json", "page_json", "serving_json", "validation_json"]


def validation_json(report: ValidationReport) -> dict[str, Any]:
    """Seconds and bytes, predicted and measured, row by row; errors are fractions."""
    return asdict(report)


def page_json(it: StagePage) -> dict[str, Any]:
    """The same for programs: bytes, seconds, shares."""
    return {
        "model": it.model,
        "stage": it.stage.name,
        "seq_length": int(it.stage.seq_length),
        "global_batch_size": it.stage.global_batch_size,
        "tokens_per_step": it.stage.global_batch_size * int(it.stage.seq_length),
        "iterations": it.stage.iterations,
        "gpus": it.gpus,
        "gpu": it.search.candidates[0].setup.gpu.name,
        "kernel": kernel_name(it.search.candidates[0].setup),
        "written": _plan_json(it.written) if it.written is not None else None,
        "best": _plan_json(it.best) if it.best is not None else None,
        "why_best": why_best(it.search, written_candidate(it)),
        "breaks_nearby": breaks_nearby(it.search),
        "layouts": [_candidate_json(c, it.stage.iterations) for c in it.search.fitting],
        "impossible": [_candidate_json(c, it.stage.iterations) for c in it.search.candidates if c.problem is not None],
        "refused_sizes": dict(it.search.refused),
        "smallest_gpus_that_fit": it.smallest.gpus if it.smallest is not None else None,
    }


def evaluation_json(price: EvaluationPrice | None) -> dict[str, Any] | None:
    """Seconds of each task on each length; None where nothing is measured."""
    if price is None:
        return None
    rows = [
        {
            "task": row.task,
            "length": row.length,
            "sequences": row.sequences,
            "forward_seconds": row.forward.value,
            "passes": row.passes,
            "pass_seconds": row.one_pass.value if row.one_pass is not None else None,
            "seconds": row.seconds,
        }
        for row in price.rows
    ]
    return {
        "gpus": price.gpus,
        "models": price.columns,
        "seconds_per_model": price.seconds,
        "gpu_hours": price.gpu_hours,
        "level": price.level,
        "gpu_hours_of_other_levels": dict(price.other_levels),
        "rows": rows,
        "advice": list(price.advice),
    }


def serving_json(plan: ServingPlan) -> dict[str, Any]:
    """GPUs, bytes and seconds of one request, and the commands. `gpus` is None where more than 64 would be needed."""
    rows = [
        {
            "gpu": row.gpu.name,
            "weights": row.precision.weights,
            "kv": row.precision.kv,
            "gpus": row.layout.tp if row.layout is not None else None,
            "decode_context_parallel": row.layout.dcp if row.layout is not None else None,
            "bytes_per_gpu": row.gpu_bytes if row.layout is not None else None,
            "first_token_seconds": [term.value for term in row.first_token] if row.first_token is not None else None,
            "next_token_seconds": row.next_token.value if row.next_token is not None else None,
        }
        for row in plan.rows
    ]
    return {"length": plan.length, "prefill_flops": plan.prefill_flops, "rows": rows, "commands": list(plan.commands)}


def _terms_json(terms: Sequence[Term]) -> list[dict[str, Any]]:
    return [{"name": t.name, "value": t.value, "formula": t.formula, "numbers": t.numbers, "note": t.note} for t in terms]


def _setup_json(setup: Setup) -> dict[str, Any]:
    p = setup.parallel
    sizes = p.hierarchical_context_parallel_sizes
    return {
        "tensor_model_parallel_size": p.tensor_model_parallel_size,
        "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
        "context_parallel_size": p.context_parallel_size,
        "data_parallel_size": p.data_parallel_size,
        "cp_comm_type": list(p.cp_comm_types) if len(p.cp_comm_types) > 1 else p.cp_comm_types[0],
        "hierarchical_context_parallel_sizes": list(sizes) if sizes is not None else None,
        "recompute": setup.recompute,
        "offload_fraction": setup.offload_fraction,
        "mlp_tile": setup.mlp_tile,
    }


def _priced_json(memory: Memory, time: StepTime, iterations: int) -> dict[str, Any]:
    return {
        "step_seconds": time.total,
        "micro_batch_seconds": time.micro_batch,
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "mfu": time.mfu,
        "hours": time.total * iterations / 3600,
        "memory_bytes": memory.total,
        "host_bytes_per_node": memory.host_total,
        "exchange_hidden": time.exchange_hidden,
        "exchange_bytes": time.exchange_bytes,
        "offload_bytes": time.offload_bytes,
    }


def _candidate_json(c: Candidate, iterations: int) -> dict[str, Any]:
    priced = _priced_json(c.memory, c.time, iterations) if c.memory is not None and c.time is not None else {}
    needed = {"memory_bytes": c.memory.total, "host_bytes_per_node": c.memory.host_total} if c.memory is not None else {}
    problem = {"problem": c.problem.what, "kind": c.problem.kind} if c.problem is not None else {}
    return {**_setup_json(c.setup), **needed, **priced, **problem}


def _plan_json(plan: StagePlan) -> dict[str, Any]:
    return {
        **_setup_json(plan.setup),
        **_priced_json(plan.memory, plan.time, plan.iterations),
        "fits": plan.fits,
        "problem": plan.problem or None,
        "memory_terms": _terms_json(plan.memory.terms),
        "host_terms": _terms_json(plan.memory.host),
        "time_terms": _terms_json(plan.time.terms),
        "intervals": {
            "distributed_timeout_seconds": plan.intervals.distributed_timeout.value,
            "signal_lead_seconds": plan.intervals.signal_lead.value,
            "save_interval_steps": plan.intervals.save_interval.value,
            "save_seconds": plan.intervals.save_seconds.value,
            "start_up_seconds": plan.intervals.start_up.value,
            "checkpoint_bytes": plan.intervals.checkpoint_bytes.value,
        },
        "interval_terms": _terms_json(interval_terms(plan.intervals)),
        "notes": list(plan.notes),
    }
