"""What a step log says of a step's plan; the simulator writes the same, without a model."""

from dataclasses import asdict
from typing import Any

from engine.step_plan import StepPlan


def step_fields(plan: StepPlan) -> dict[str, Any]:
    """Return the fields of a line of the log that come from the plan."""
    return {
        "mode": plan.mode.value,
        "reason": plan.reason,
        "sub_batches": [
            {
                "gdec": len(s.gdec),
                "gprf": sum(item.num_tokens for item in s.gprf),
                "cprf": sum(item.num_tokens for item in s.cprf),
                "cdec": len(s.cdec),
                "rotating": len(s.rotating),
                "gdec_tokens": sum(item.end for item in s.gdec),
                "cdec_tokens": sum(item.end for item in s.cdec),
                "rotating_tokens": sum(row.share.end for row in s.rotating),
            }
            for s in plan.sub_batches
        ],
        "swapped_out": sum(len(swap.device_blocks) for swap in plan.swaps_out),
        "swapped_in": sum(len(swap.device_blocks) for swap in plan.swaps_in),
        "preempted": len(plan.preempted),
        "predicted": asdict(plan.prediction) if plan.prediction else None,
        "gpu_only": asdict(plan.gpu_only_prediction) if plan.gpu_only_prediction else None,
    }
