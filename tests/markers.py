"""Marks and parameters that say what hardware a test needs."""

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
GPU_MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA GPU"),
)
DEVICES = (
    pytest.param("cpu", marks=pytest.mark.ispc),
    pytest.param("cuda", marks=GPU_MARKS),
)
