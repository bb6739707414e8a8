"""How long steps take: from hardware figures or measured tables, corrected as they run."""

from engine.cost_model.analytic import AnalyticCostModel, HardwareSpec, ModelSpec
from engine.cost_model.base import CostModel
from engine.cost_model.prediction import SubBatchLoad, load_of, pipeline_s, predict

__all__ = [
    "AnalyticCostModel",
    "CostModel",
    "HardwareSpec",
    "ModelSpec",
    "SubBatchLoad",
    "load_of",
    "pipeline_s",
    "predict",
]
