"""Random arrivals and cancellations for minutes: `python -m tests.engine.soak --minutes 8`.

Every token is compared with what the same requests give eagerly, alone with the device and step by
step. At each pause all blocks must be free, and memory must not have grown since the first ones.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from rich.table import Table

from engine.llm import LLM
from engine.llm_engine import LLMEngine
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler_config import MODES
from tests.engine.played_gpu import let_device_attend
from tests.engine.tiny_models import make_tiny_model

NUM_LAYERS = 7
PCIE = "overlap, PCIe"
SOAKED: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in MODES},
    PCIE: {"mode": "overlap", "pcie_attention": True},
}
NUM_PROMPTS = 48
NUM_OUTPUT = 40
OPTIONS = {"load_format": "dummy", "dtype": "float32", "max_model_len": 128, "threads": 1}
SMALL_POOLS = {"device_kv_blocks": 24, "max_num_seqs": 24, "max_num_batched_tokens": 96}
MOST_AT_ONCE = 40
CANCEL_CHANCE = 0.03
PAUSES = 8
"""Times that the engine is let run dry."""
FLAT_BYTES = 64 * 2**20


@dataclass(slots=True)
class Soak:
    """What happened in one mode; memory in bytes, at each pause."""

    mode: str
    num_requests: int = 0
    num_cancelled: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    num_graph_steps: int = 0
    num_captures: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)
    device_bytes: list[int] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """What should not have happened."""
        faults = self.wrong[:3]
        for name, sizes in (("host", self.resident_bytes), ("device", self.device_bytes)):
            settled = sizes[len(sizes) // 4 :]
            if settled and settled[-1] - settled[0] > FLAT_BYTES:
                faults.append(f"{name} memory grew by {(settled[-1] - settled[0]) / 2**20:.0f} MiB")
        return faults


def make_model(folder: Path) -> Path:
    """Save a random model that is deep enough for rotations to be under way at many layers."""
    make_tiny_model("llama-bias", folder, num_hidden_layers=NUM_LAYERS, initializer_range=0.1)
    return folder


def expected_tokens(folder: Path, device: str, prompts: list[list[int]]) -> list[list[int]]:
    """Return what eager steps on the device give, one after the other."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    options = {"mode": "gpu-only", "enforce_eager": True, "async_scheduling": False}
    with LLM(str(folder), device=device, **OPTIONS, **options) as llm:
        return [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]


def make_prompts(seed: int) -> list[list[int]]:
    """Return prompts of 1 to 60 tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(2, 190) for _ in range(rng.randint(1, 60))] for _ in range(NUM_PROMPTS)]


def soak(
    folder: Path,
    device: str,
    mode: str,
    seconds: float,
    prompts: list[list[int]],
    expected: list[list[int]],
    *,
    seed: int = 0,
    least_steps: int = 0,
) -> Soak:
    """Serve random requests for a while and check all that comes back.

    Args:
        folder: The model.
        device: Where it runs.
        mode: One of `SOAKED`.
        seconds: How long.
        prompts: What requests ask.
        expected: The answer to each.
        seed: Of arrivals, lengths and cancellations.
        least_steps: Steps that it takes at least, however long they take.
    """
    found = Soak(mode)
    host = {} if mode == "gpu-only" else {"host_kv_gb": 0.02}
    options = {**SOAKED[mode], "async_scheduling": True, **SMALL_POOLS, **host}
    with (
        pytest.MonkeyPatch.context() as patch,
        LLM(str(folder), device=device, **OPTIONS, **options) as llm,
    ):
        let_device_attend(patch)
        driver = _Driver(llm.engine, prompts, expected, found, seed)
        start = time.monotonic()
        for pause in range(1, PAUSES + 1):
            until, steps = start + pause * seconds / PAUSES, pause * least_steps / PAUSES
            driver.run(until, steps)
            _note_pause(llm.engine, found)
        stats = llm.engine.stats
        found.num_steps, found.num_graph_steps = stats.num_steps, stats.graph_steps
        found.num_captures, found.rows = stats.graph_captures, dict(stats.rows)
    return found


class _Driver:
    """Adds requests, cancels some, and compares tokens.

    Args:
        engine: What is tried.
        prompts: What requests ask.
        expected: The answer to each.
        found: Where to write what happened.
        seed: Of all that is random.
    """

    def __init__(
        self,
        engine: LLMEngine,
        prompts: list[list[int]],
        expected: list[list[int]],
        found: Soak,
        seed: int,
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._expected = expected
        self._found = found
        self._rng = random.Random(seed)
        self._live: dict[str, tuple[int, int]] = {}

    def run(self, until: float, steps: float) -> None:
        """Keep the engine busy for a while, then until it has run dry.

        Args:
            until: When it may end, by `time.monotonic`.
            steps: And after how many steps of the engine.
        """
        stats, goes_on = self._engine.stats, True
        while goes_on or self._live:
            goes_on = time.monotonic() < until or stats.num_steps < steps
            if goes_on and len(self._live) < MOST_AT_ONCE:
                for _ in range(self._rng.choice([0, 0, 0, 1, 2])):
                    self._add()
            if self._live and self._rng.random() < CANCEL_CHANCE:
                name = self._rng.choice(list(self._live))
                del self._live[name]
                self._engine.abort_request(name)
                self._found.num_cancelled += 1
            self._step()

    def _add(self) -> None:
        number, length = self._rng.randrange(len(self._prompts)), self._rng.randint(1, NUM_OUTPUT)
        name = str(self._found.num_requests)
        self._found.num_requests += 1
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        self._engine.add_request(name, self._prompts[number], params)
        self._live[name] = number, length

    def _step(self) -> None:
        for output in self._engine.step():
            name, tokens = output.request_id, list(output.outputs[0].token_ids)
            if name not in self._live:
                self._found.wrong.append(f"request {name} got tokens after it had ended")
                continue
            number, length = self._live[name]
            if tokens != self._expected[number][: len(tokens)]:
                self._found.wrong.append(f"request {name} got {tokens} for prompt {number}")
            if output.finished:
                del self._live[name]
                self._found.num_tokens += len(tokens)
                if len(tokens) != length:
                    reason = output.outputs[0].finish_reason
                    self._found.wrong.append(f"request {name} ended early: {reason}")


def _note_pause(engine: LLMEngine, found: Soak) -> None:
    engine.step()  # a step that was launched ahead for a request that was cancelled
    runner = engine.runner
    for name, pool in (("device", runner.pool), ("host", runner.host_pool)):
        if pool is not None and pool.num_used:
            found.wrong.append(f"{pool.num_used} {name} blocks are not free at a pause")
    found.resident_bytes.append(psutil.Process().memory_info().rss)
    is_cuda = runner.device.type == "cuda"
    found.device_bytes.append(torch.cuda.memory_reserved(runner.device) if is_cuda else 0)


def print_soaks(soaks: list[Soak]) -> None:
    """Print a line a mode."""
    table = Table(title="soak", title_justify="left")
    columns = ("mode", "requests", "cancelled", "tokens", "steps", "graphs", "captures")
    for column in (*columns, "host rows", "rotating", "host MiB", "device MiB", "faults"):
        table.add_column(column, justify="right" if column != "mode" else "left")
    for found in soaks:
        counts = (found.num_requests, found.num_cancelled, found.num_tokens, found.num_steps)
        graphs = (found.num_graph_steps, found.num_captures)
        rows = (found.rows.get("cdec", 0), found.rows.get("rotating", 0))
        sizes = (found.resident_bytes, found.device_bytes)
        memory = [f"{kind[0] / 2**20:.0f} … {kind[-1] / 2**20:.0f}" for kind in sizes]
        cells = [f"{number:,}" for number in (*counts, *graphs, *rows)]
        table.add_row(found.mode, *cells, *memory, "; ".join(found.faults) or "none")
    Console(width=150).print(table)


def main() -> int:
    """Soak every mode for a share of the time; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="*", choices=SOAKED, default=list(SOAKED))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name))
        expected = expected_tokens(folder, arguments.device, prompts)
        seconds = 60 * arguments.minutes / len(arguments.modes)
        soaks = [
            soak(folder, arguments.device, mode, seconds, prompts, expected, seed=arguments.seed)
            for mode in arguments.modes
        ]
    print_soaks(soaks)
    return int(any(found.faults for found in soaks))


if __name__ == "__main__":
    sys.exit(main())
