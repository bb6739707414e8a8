"""Data sets: what requests look like. Seeded and reproducible, as token ids, text or lengths."""

from workloads.datasets.config import DATASETS, DatasetConfig
from workloads.datasets.load import Workload, load_workload
from workloads.datasets.prompts import PromptMaker

__all__ = ["DATASETS", "DatasetConfig", "PromptMaker", "Workload", "load_workload"]
