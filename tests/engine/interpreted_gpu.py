"""The CUDA backend without a GPU: kernels in Triton's interpreter, streams that do all at once.

What it shows is that backend, kernels and engine fit together: shapes, rows, blocks, orders and
answers. What only a GPU has it cannot show: concurrency, and graphs. A process of its own, because
TRITON_INTERPRET counts only before triton is imported:
`TRITON_INTERPRET=1 python -m tests.engine.interpreted_gpu FOLDER OTHER` serves a few requests in
every mode and prints a JSON line a case: tokens by the CUDA backend and by the CPU backend. OTHER's
sizes are such that linear layers have kernels of their own.
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from engine.backends import cuda
from engine.backends.cuda import CudaBackend
from engine.batch_builder import BatchBuilder
from engine.cost_model import TableCostModel
from engine.llm import LLM
from engine.models.weights import ModelWeights
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from gpu_kernels import linear
from tests.engine.cost_tables import make_cost_model
from tests.engine.played_gpu import let_device_attend, use_static_buffers

LENGTHS = (5, 18, 1, 9, 2, 3)
PROMPTS = [[(7 * i + j) % 190 + 2 for j in range(length)] for i, length in enumerate(LENGTHS)]
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
OFFLOADED = {"host_kv_gb": 0.01, "device_kv_blocks": 2}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "gpu-only": (False, {"mode": "gpu-only", "device_kv_blocks": 2}),
    "gpu-only, static": (True, {"mode": "gpu-only"}),
    "asymmetric": (False, {"mode": "asymmetric", **OFFLOADED}),
    "asymmetric, static": (True, {"mode": "asymmetric", **OFFLOADED}),
    "overlap": (False, {"mode": "overlap", "max_num_batched_tokens": 16, **OFFLOADED}),
    "overlap, static": (True, {"mode": "overlap", **OFFLOADED}),
    "pcie attention": (False, {"mode": "overlap", "pcie_attention": True, **OFFLOADED}),
    "pcie attention, static": (True, {"mode": "overlap", "pcie_attention": True, **OFFLOADED}),
}
"""Whether steps run from the buffers that graphs read, and the engine's options."""
OWN_LINEAR = {"dtype": "float16"}
OWN_LINEAR_CASES: dict[str, dict[str, Any]] = {
    "own linear layers": {"mode": "gpu-only", **OWN_LINEAR},
    "own linear layers, overlap": {"mode": "overlap", **OFFLOADED, **OWN_LINEAR},
}
"""Those whose linear layers of few rows, and the norms between them, are NEO's kernels, too."""


class PlayedStream:
    """A stream whose work is done when it is given."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


class PlayedEvent:
    """A point in the work of such a stream."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._time_s = 0.0

    def record(self, stream: object = None) -> None:
        self._time_s = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "PlayedEvent") -> float:
        return (later._time_s - self._time_s) * 1e3


@contextlib.contextmanager
def cuda_backend_on_cpu(*, captures: bool) -> Iterator[None]:
    """Let engines made within use the CUDA backend on CPU tensors.

    Args:
        captures: Steps are launched as while a graph is captured.
    """
    with contextlib.ExitStack() as patches:
        for name, played in {
            "Stream": PlayedStream,
            "Event": PlayedEvent,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": PlayedStream,
            "synchronize": lambda device=None: None,
            "is_current_stream_capturing": lambda: captures,
            "get_device_name": lambda device: "Triton's interpreter",
        }.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, played))
        patches.enter_context(mock.patch.object(BatchBuilder, "uses_staging", True))
        patches.enter_context(mock.patch.object(CudaBackend, "prepare", return_value=0))
        patches.enter_context(mock.patch("engine.runner.make_backend", CudaBackend))
        yield


def telling_weights(weights: ModelWeights, seed: int) -> None:
    """Fill the parameters so that it shows which matrix, norm or bias was taken."""
    generator = torch.Generator().manual_seed(seed)
    for name, target in weights.targets.items():
        is_norm = name.endswith("norm.weight")
        target.normal_(float(is_norm), 0.3 if is_norm else 0.1, generator=generator)


def serve(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Serve all prompts and return their tokens, and what was done for them."""

    def measured(runner: ModelRunner, *args: object) -> TableCostModel:
        return make_cost_model(num_layers=runner.model_config.num_layers)

    with mock.patch("engine.cost_tables.load_or_profile", measured), mock.patch(
        "engine.runner.make_dummy_weights", telling_weights
    ), mock.patch.object(
        cuda, "host_pool_attention", side_effect=cuda.host_pool_attention
    ) as attend, LLM(
        str(folder), device="cpu", max_model_len=32, max_num_seqs=8, threads=1,
        load_format="dummy", **{"dtype": "float32", "max_num_batched_tokens": 32, **options},
    ) as llm:  # fmt: skip
        outputs = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, PARAMS)]
        assert llm.engine.runner.pool.num_used == 0
        stats = llm.engine.stats
        return {
            "got": outputs,
            "modes": dict(stats.steps_by_mode),
            "swapped_blocks": stats.swapped_in_blocks + stats.swapped_out_blocks,
            "direct_launches": attend.call_count,
        }


@contextlib.contextmanager
def own_linear_layers() -> Iterator[mock.Mock]:
    """Let few rows be computed as on a large GPU, in float16; provides the fused kernel's calls."""
    patch = functools.partial(mock.patch.object, linear)
    fused = patch("skinny_linear_add_norm", side_effect=linear.skinny_linear_add_norm)
    large_gpu = patch("pdl_options", return_value={"USE_PDL": True})
    with large_gpu, patch("OPEN_DTYPES", (torch.float16,)), fused as calls:
        yield calls


def main() -> None:
    """Serves by the CPU backend once, then every case by the CUDA backend."""
    folder, other = Path(sys.argv[1]), Path(sys.argv[2])
    expected = serve(other, {"mode": "gpu-only", **OWN_LINEAR})["got"]
    for name, options in OWN_LINEAR_CASES.items():
        with cuda_backend_on_cpu(captures=True), pytest.MonkeyPatch.context() as patch:
            use_static_buffers(patch)
            with own_linear_layers() as fused:
                result = {"case": name, "expected": expected} | serve(other, options)
        print(json.dumps(result | {"fused_launches": fused.call_count}), flush=True)
    expected = serve(folder, {"mode": "gpu-only"})["got"]
    for name, (is_static, options) in CASES.items():
        start = time.perf_counter()
        with cuda_backend_on_cpu(captures=is_static), pytest.MonkeyPatch.context() as patch:
            let_device_attend(patch)
            if is_static:
                use_static_buffers(patch)
            result = {"case": name, "expected": expected} | serve(folder, options)
        result["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
