"""Options that several commands share. Defaults come from the engine's own configuration."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

MODEL_PANEL = "Model and machine"
SAMPLING_PANEL = "Sampling"
STRUCTURE_PANEL = "Form of the output"
OUTPUT_PANEL = "Input and output"


def default(config_class: type, name: str) -> Any:
    """Return the default of a field of a configuration class."""
    for item in fields(config_class):
        if item.name == name:
            return item.default if item.default_factory is MISSING else item.default_factory()
    raise KeyError(name)


def option(text: str, panel: str, *names: str) -> Any:
    """Return a Typer option with help text in a help panel."""
    return typer.Option(*names, help=text, rich_help_panel=panel)


Model = Annotated[
    str | None,
    option(
        "Folder, .gguf file or Hub id; the embedded SmolLM2-135M-Instruct if left out.",
        MODEL_PANEL,
        "--model",
        "-m",
    ),
]
Revision = Annotated[str | None, option("Branch, tag or commit of a Hub id.", MODEL_PANEL)]
LoadFormat = Annotated[
    str, option("auto, safetensors, gguf, or dummy (random weights).", MODEL_PANEL)
]
Dtype = Annotated[
    str,
    option("auto (the model's own), bfloat16, float16 or float32.", MODEL_PANEL),
]
Device = Annotated[str, option("auto (CUDA where there is one), cuda, cuda:N or cpu.", MODEL_PANEL)]
MaxModelLen = Annotated[
    int | None, option("Most tokens of a request, prompt and output together.", MODEL_PANEL)
]
BlockSize = Annotated[int, option("Tokens of a KV block: 16, 32 or 64.", MODEL_PANEL)]
DeviceKvBlocks = Annotated[
    int | None, option("KV blocks of the device; from free memory if left out.", MODEL_PANEL)
]
HostKvGb = Annotated[
    float | None,
    option("GiB of host memory for offloaded KV; up to 4 if left out.", MODEL_PANEL),
]
GpuMemoryUtilization = Annotated[float, option("Share of the GPU's memory to use.", MODEL_PANEL)]
Threads = Annotated[
    int | None, option("CPU attention threads; all cores but one if left out.", MODEL_PANEL)
]
MaxNumSeqs = Annotated[int, option("Most requests that run at once.", MODEL_PANEL)]
MaxNumBatchedTokens = Annotated[
    int, option("Most tokens of a step; longer prompts are prefilled in chunks.", MODEL_PANEL)
]
Mode = Annotated[
    str,
    option(
        "auto, gpu-only, asymmetric or overlap: whether CPU attention is used, and how.",
        MODEL_PANEL,
    ),
]
TpotLimitMs = Annotated[
    float | None,
    option("A decode token should not take longer than this.", MODEL_PANEL),
]
EnforceEager = Annotated[
    bool, option("Launch every GPU kernel by itself, without CUDA graphs.", MODEL_PANEL)
]
PcieAttention = Annotated[
    bool,
    option(
        "Let the GPU compute part of the offloaded attention itself, from host memory over PCIe.",
        MODEL_PANEL,
    ),
]
AsyncScheduling = Annotated[
    bool | None,
    option(
        "Plan the next step while the device runs this one; on for a GPU if left out.",
        MODEL_PANEL,
        "--async-scheduling/--no-async-scheduling",
    ),
]
LogSteps = Annotated[Path | None, option("Write one JSON line a step to this file.", OUTPUT_PANEL)]
