"""What `make bench-gpu` measures of the whole engine, each as one function on a running engine."""

import statistics
import time
from dataclasses import dataclass

from engine.llm_engine import LLMEngine
from engine.sampling_params import SamplingParams
from workloads.synthetic import WorkloadRequest, synthetic_workload


def run_to_end(engine: LLMEngine, requests: list[WorkloadRequest]) -> float:
    """Run requests that all arrive at once and return the seconds until the last has finished."""
    start = time.perf_counter()
    for number, request in enumerate(requests):
        params = SamplingParams(
            temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True
        )
        engine.add_request(str(number), request.prompt_token_ids, params)
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """Steady decode steps.

    Args:
        median_ms: Wall time of a step, everything included.
        idle_share: Of the time of all of them, what the GPU had nothing to do.
    """

    median_ms: float
    idle_share: float


def decode_steps(engine: LLMEngine, num_seqs: int, context_len: int, num_steps: int) -> DecodeSteps:
    """Measure steps that only decode.

    Args:
        engine: Idle.
        num_seqs: Requests in each step.
        context_len: Mean tokens of a request over the measured steps.
        num_steps: Steps measured.
    """
    prompt_len = context_len - num_steps // 2
    requests = synthetic_workload(num_seqs, prompt_len, 1, _vocab_size(engine), seed=1)
    for number, request in enumerate(requests):
        prompt = (request.prompt_token_ids * 2)[:prompt_len]
        params = SamplingParams(temperature=0, max_tokens=num_steps + 8, ignore_eos=True)
        engine.add_request(str(number), prompt, params)
    times, busy = [], []
    while engine.has_unfinished_requests():
        stats = engine.stats
        prefilled, busy_s = stats.prefill_tokens, stats.device_busy_time_s
        start = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - start
        if stats.prefill_tokens == prefilled and len(outputs) == num_seqs:
            times.append(seconds)
            busy.append(stats.device_busy_time_s - busy_s)
    steady = slice(2, num_steps + 2)
    return DecodeSteps(
        median_ms=statistics.median(times[steady]) * 1e3,
        idle_share=max(0.0, 1 - sum(busy[steady]) / sum(times[steady])),
    )


def prefill_tokens_per_s(engine: LLMEngine, num_seqs: int, prompt_len: int, repeats: int) -> float:
    """Return the median rate at which prompts are processed, one token generated for each."""
    rates = []
    for repeat in range(repeats):
        requests = [
            WorkloadRequest(
                num_prompt_tokens=prompt_len,
                num_output_tokens=1,
                prompt=(r.prompt_token_ids * 2)[:prompt_len],
            )
            for r in synthetic_workload(num_seqs, prompt_len, 1, _vocab_size(engine), seed=repeat)
        ]
        rates.append(num_seqs * prompt_len / run_to_end(engine, requests))
    return statistics.median(rates)


def throughput_requests_per_s(engine: LLMEngine, num_requests: int, output_len: int) -> float:
    """Return the rate of requests of about 1,000 tokens in and `output_len` out, all at once."""
    requests = synthetic_workload(num_requests, 1000, output_len, _vocab_size(engine), seed=0)
    return num_requests / run_to_end(engine, requests)


def _vocab_size(engine: LLMEngine) -> int:
    return engine.runner.model_config.vocab_size
