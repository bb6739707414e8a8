"""Compiles every launch of `run_all_variants` for a GPU that is not there and prints what it costs.

The launchers run as they are, on CPU tensors, with a driver that only names a target and with
launches stopped after compilation: `python -m tests.gpu_kernels.compile_offline [capability]`, with
--all for all head_dims and dtypes, --large for the largest tiles, --serving to add the launches
that must compile nothing new.
Prints a JSON line a kernel: registers, spilled bytes, shared memory, matrix instructions.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gpu_kernels import (
    activation,
    decode_attention,
    embedding,
    few_rows,
    greedy,
    handover,
    linear,
    merge_splits,
    norm,
    rope_store,
    rotating_rows,
)
from gpu_kernels.warmup import (
    ModelShape,
    count_compiled_variants,
    run_all_variants,
    run_linear_variants,
)
from tests.gpu_kernels.serving_shapes import launch_serving_shapes

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

PDL_MODULES = (
    activation, decode_attention, linear, merge_splits, norm, rope_store, rotating_rows, few_rows,
    embedding, greedy,
)  # fmt: skip

LLAMA_8B = {
    "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 4096,
    "intermediate_size": 14336, "vocab_size": 128256, "block_size": 16,
}  # fmt: skip


class OfflineDriver:
    """The part of a Triton driver that compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def hopper_options(device: torch.device) -> dict[str, Any]:
    """What `pdl_options` says of a Hopper GPU."""
    return {"USE_PDL": True, "launch_pdl": True}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (spills) and static shared memory as the driver would see them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"] + found["LOCAL"]}


def matrix_instruction(ptx: str) -> str:
    for name in ("wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name
    return "none"


def compile_all(shape: ModelShape, capability: int, serving: bool) -> list[dict[str, Any]]:
    """Runs all launches of a model shape without launching; returns a row a compiled kernel."""
    rows: list[dict[str, Any]] = []
    original = JITFunction.run
    phase = "warm-up"

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start, before = time.perf_counter(), count_compiled_variants()
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if count_compiled_variants() == before:
            return kernel
        rows.append(
            {
                "phase": phase,
                "kernel": kernel.metadata.name,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "head_dim": shape.head_dim,
                "constants": {k: v for k, v in kwargs.items() if k.isupper() or k[:4] == "num_"},
                "shared_bytes": kernel.metadata.shared,
                **resources(kernel.asm["cubin"]),
                "mma": matrix_instruction(kernel.asm["ptx"]),
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
        return kernel

    driver.set_active(OfflineDriver(capability))
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        patches.enter_context(mock.patch.object(handover, "on_gpu", return_value=True))
        if capability >= 90:
            for module in PDL_MODULES:
                patches.enter_context(mock.patch.object(module, "pdl_options", hopper_options))
        run_all_variants(shape, torch.device("cpu"))
        run_linear_variants(shape, torch.device("cpu"))
        if serving:
            phase = "serving"
            launch_serving_shapes(shape, "cpu")
    return rows


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    shapes = [ModelShape(**LLAMA_8B, dtype=torch.bfloat16)]
    if "--large" in sys.argv:
        sizes = {**LLAMA_8B, "head_dim": 256, "block_size": 64}
        shapes = [ModelShape(**sizes, dtype=torch.float32)]
    if "--all" in sys.argv:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for head_dim in (64, 80, 96, 128, 256):
                sizes = {**LLAMA_8B, "head_dim": head_dim, "has_qk_norm": head_dim == 128}
                shapes.append(ModelShape(**sizes, dtype=dtype))
    for shape in shapes:
        for row in compile_all(shape, capability, "--serving" in sys.argv):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
