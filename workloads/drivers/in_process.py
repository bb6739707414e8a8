"""The engine in this process, without a server: offline throughput, and machines without one."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.cost_tables import load_or_profile
from engine.errors import RequestError
from engine.llm_engine import LLMEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.stats import EngineStats
from workloads.bench.system import Job, OnFinished, OnProgress
from workloads.datasets import PromptMaker
from workloads.drivers.versions import package_versions
from workloads.records import RequestRecord, RunRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class InProcessSystem:
    """NEO's engine, called directly.

    Args:
        name: The system's.
        config: The engine's options.
        ignore_eos: Generate as many tokens as asked for.
        temperature: Of sampling; 0 is greedy.
        tables: Write the measured cost tables to this file, for the simulator.
    """

    name: str
    config: EngineConfig
    ignore_eos: bool = True
    temperature: float = 0.0
    tables: Path | None = None

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def is_simulated(self) -> bool:
        """Never."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        """All of the engine's options."""
        options = asdict(self.config)
        del options["log_steps"]
        if self.config.model is not None and Path(self.config.model).is_dir():
            options["model"] = Path(self.config.model).name  # the same wherever it lies
        return {"kind": "in-process", "ignore_eos": self.ignore_eos, "engine": options}

    @contextlib.contextmanager
    def session(self, on_progress: OnProgress) -> Iterator["InProcessSession"]:
        """Load the model; release everything at the end."""
        on_progress(f"loading {self.name}")
        session = InProcessSession(self, LLMEngine(self.config, on_progress))
        try:
            if self.tables is not None:
                session.write_tables(self.tables, on_progress)
            yield session
        finally:
            session.close()


class InProcessSession:
    """A loaded engine.

    Args:
        system: Its options.
        engine: Idle.
    """

    def __init__(self, system: InProcessSystem, engine: LLMEngine) -> None:
        self._system = system
        self._engine = engine
        self._num_runs = 0
        # What there is by now stays: looking through all of it takes 100 ms, in which no step runs.
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Give all memory back: the next engine may need it while somebody still holds this."""
        gc.unfreeze()
        self._engine.close()
        del self._engine

    def write_tables(self, path: Path, on_progress: OnProgress) -> None:
        """Write the engine's measured cost tables."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(load_or_profile(self._engine.runner, on_progress).to_json())

    @property
    def maker(self) -> PromptMaker | None:
        """Prompts are token ids of the model's vocabulary."""
        engine = self._engine
        size = engine.runner.model_config.vocab_size
        return PromptMaker(as_text=False, tokenizer=engine.tokenizer, vocab_size=size)

    @property
    def facts(self) -> dict[str, Any]:
        """What the engine made of its options."""
        runner = self._engine.runner
        host = runner.host_pool
        return {
            "model_id": self._engine.model_name,
            "tokenizer_id": None,
            "endpoint_type": "in-process",
            "versions": package_versions(),
            "device": str(runner.device),
            "dtype": str(runner.dtype).removeprefix("torch."),
            "computed_by": runner.description,
            "device_kv_blocks": runner.pool.num_blocks,
            "host_kv_blocks": host.num_blocks if host is not None else 0,
            "block_size": runner.pool.block_size,
        }

    def run(self, job: Job, on_finished: OnFinished) -> RunRecord:
        """Serve a workload, adding requests between steps when their time has come."""
        self._num_runs += 1
        before = _counters(self._engine.stats)
        loop = _Loop(self._system, self._engine, job, f"{self._num_runs}-")
        duration_s = loop.run(on_finished)
        after = _counters(self._engine.stats)
        details = {name: after[name] - before.get(name, 0.0) for name in after}
        modes = {k.removeprefix("steps_"): v for k, v in details.items() if k.startswith("steps_")}
        step_s, matched_s = details["step_time_s"], details["matched_step_time_s"]
        lateness = [r.start_s - r.scheduled_s for r in loop.records]
        return RunRecord(
            requests=loop.records,
            duration_s=duration_s,
            details={
                "num_steps": int(details["num_steps"]),
                "steps_by_mode": {mode: int(count) for mode, count in modes.items()},
                "num_preemptions": int(details["num_preemptions"]),
                "swapped_blocks": int(details["swapped_blocks"]),
                "step_time_s": step_s,
                "cpu_busy_share": details["cpu_attention_time_s"] / step_s if step_s else 0.0,
                "predicted_over_measured": (
                    details["predicted_step_time_s"] / matched_s if matched_s else None
                ),
                "max_lateness_s": max(lateness, default=0.0),
            },
        )


class _Loop:
    """One run: requests in, steps, tokens out."""

    def __init__(self, system: InProcessSystem, engine: LLMEngine, job: Job, prefix: str) -> None:
        self._system = system
        self._engine = engine
        self._job = job
        self._prefix = prefix
        self._next = 0
        self._num_active = 0
        self.records = [
            RequestRecord(
                num_prompt_tokens=request.num_prompt_tokens,
                wanted_output_tokens=request.num_output_tokens,
                scheduled_s=arrival,
            )
            for request, arrival in zip(job.requests, job.arrivals, strict=True)
        ]

    def run(self, on_finished: Callable[[int], None]) -> float:
        """Serve all requests and return the seconds until the last one ended."""
        start = time.perf_counter()
        most = self._job.max_concurrency or len(self.records)
        while self._next < len(self.records) or self._num_active:
            self._add_due(time.perf_counter() - start, most)
            if not self._num_active:
                if self._next < len(self.records):
                    due = self.records[self._next].scheduled_s
                    time.sleep(max(0.0, start + due - time.perf_counter()))
                continue
            outputs = self._engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                self._record(output, now)
            on_finished(self._next - self._num_active)
        return time.perf_counter() - start

    def _add_due(self, now: float, most: int) -> None:
        while (
            self._next < len(self.records)
            and self.records[self._next].scheduled_s <= now
            and self._num_active < most
        ):
            request, record = self._job.requests[self._next], self.records[self._next]
            # While a step runs it waits as it would in a server's queue, unless its sender waits
            # for others to end first.
            record.start_s = now if self._job.max_concurrency else record.scheduled_s
            params = SamplingParams(
                temperature=self._system.temperature,
                max_tokens=request.num_output_tokens,
                ignore_eos=self._system.ignore_eos,
            )
            assert request.prompt is not None
            name = f"{self._prefix}{self._next}"
            self._next += 1
            try:
                self._engine.add_request(name, request.prompt, params)
            except RequestError as error:
                record.error = str(error)
            else:
                self._num_active += 1

    def _record(self, output: RequestOutput, now: float) -> None:
        record = self.records[int(output.request_id.removeprefix(self._prefix))]
        completion = output.outputs[0]
        if len(completion.token_ids) > record.num_output_tokens:
            record.token_times_s.append(now)
            record.num_output_tokens = len(completion.token_ids)
        if output.finished:
            self._num_active -= 1
            record.end_s = now
            record.num_prompt_tokens = len(output.prompt_token_ids)
            record.text = completion.text
            if completion.finish_reason == "error":
                record.error = str(completion.stop_reason)


def _counters(stats: EngineStats) -> dict[str, float]:
    """Return the statistics that only grow."""
    modes = {f"steps_{mode}": float(count) for mode, count in stats.steps_by_mode.items()}
    return {
        **modes,
        "num_steps": stats.num_steps,
        "num_preemptions": stats.num_preemptions,
        "swapped_blocks": stats.swapped_out_blocks + stats.swapped_in_blocks,
        "step_time_s": stats.step_time_s,
        "cpu_attention_time_s": stats.cpu_attention_time_s,
        "predicted_step_time_s": stats.predicted_step_time_s,
        "matched_step_time_s": stats.matched_step_time_s,
    }
