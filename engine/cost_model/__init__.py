"""How long steps take: from hardware figures or measured tables, corrected as they run."""

from engine.cost_model.analytic import AnalyticCostModel, HardwareSpec, ModelSpec
from engine.cost_model.base import CostModel
from engine.cost_model.corrected import CorrectedCostModel
from engine.cost_model.prediction import (
    StageTimes,
    SubBatchLoad,
    balanced_direct_share,
    load_of,
    pipeline_s,
    predict,
    prefix_cost_s,
    rotating_attention_s,
    rotation_steps,
)
from engine.cost_model.table import CostModelKey, StepTables, Table, TableCostModel

__all__ = [
    "AnalyticCostModel",
    "CorrectedCostModel",
    "CostModel",
    "CostModelKey",
    "HardwareSpec",
    "ModelSpec",
    "StageTimes",
    "StepTables",
    "SubBatchLoad",
    "Table",
    "TableCostModel",
    "balanced_direct_share",
    "load_of",
    "pipeline_s",
    "predict",
    "prefix_cost_s",
    "rotating_attention_s",
    "rotation_steps",
]
