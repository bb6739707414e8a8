"""From options to requests."""

import random
from dataclasses import dataclass

from engine.errors import ConfigError, RequestError
from workloads.datasets.azure import read_azure_trace
from workloads.datasets.config import DatasetConfig
from workloads.datasets.lengths import (
    SUMMARIZE_SOURCE,
    read_lengths,
    summarize_lengths,
    synthetic_lengths,
)
from workloads.datasets.prompts import PromptMaker
from workloads.datasets.sample import Sample
from workloads.datasets.summarize import read_summarize
from workloads.datasets.texts import read_custom, read_sharegpt
from workloads.request import WorkloadRequest

DEFAULT_CUSTOM_OUTPUT_LEN = 256
# What `vllm bench serve` leaves out of ShareGPT, so that results compare.
_SHAREGPT_LEAST, _SHAREGPT_MOST_PROMPT, _SHAREGPT_MOST_TOTAL = 4, 1024, 2048


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and where they come from in a sentence."""

    requests: list[WorkloadRequest]
    source: str


def load_workload(config: DatasetConfig, maker: PromptMaker | None) -> Workload:
    """Return a reproducible workload.

    Args:
        config: Which one.
        maker: Makes prompts; None gives lengths alone, for simulation.

    Raises:
        RequestError: A file is broken, or texts cannot be counted for want of a tokenizer.
        ConfigError: The trace has too few requests to be used with its arrivals.
    """
    rng = random.Random(config.seed)
    samples, source = _samples(config, rng)
    has_texts = samples[0].prompt_text is not None
    if has_texts and not (maker and maker.can_count):
        raise RequestError(
            f"the data set {config.name} holds texts, whose tokens must be counted: give "
            "--tokenizer with a model's folder or hub id"
        )
    requests: list[WorkloadRequest] = []
    for sample in samples:
        request = _request(sample, config, maker, rng)
        if request is not None:
            requests.append(request)
        if len(requests) == config.num_prompts:
            break
    if not requests:
        raise RequestError(f"no request of the data set {config.name} has a usable length")
    if len(requests) < config.num_prompts and not config.no_oversample:
        requests += rng.choices(requests, k=config.num_prompts - len(requests))
    return Workload(requests, source)


def check_trace_arrivals(requests: list[WorkloadRequest]) -> list[float]:
    """Return the arrivals of a trace, from its first request on.

    Raises:
        ConfigError: The data set has none, or was repeated to have enough requests.
    """
    arrivals = [request.arrival_s for request in requests]
    if any(arrival is None for arrival in arrivals):
        raise ConfigError("--use-trace-arrivals needs azure-code or azure-conv")
    times = [arrival for arrival in arrivals if arrival is not None]
    if times != sorted(times):
        raise ConfigError(
            "the trace has fewer requests than --num-prompts, so it cannot be used with its "
            "arrivals; lower --num-prompts or add --no-oversample"
        )
    return [time - times[0] for time in times]


def _samples(config: DatasetConfig, rng: random.Random) -> tuple[list[Sample], str]:
    name, count = config.name, config.num_prompts
    if name == "synthetic":
        lengths = synthetic_lengths(
            count, config.input_len, config.output_len, config.range_ratio, rng
        )
        return lengths, "synthetic: random tokens, lengths uniform around their means"
    if name == "summarize" and config.dataset_path is None:
        return summarize_lengths(count, rng), SUMMARIZE_SOURCE
    if name == "summarize":
        assert config.dataset_path is not None
        found = read_summarize(config.dataset_path)
    else:
        readers = {
            "azure-code": read_azure_trace,
            "azure-conv": read_azure_trace,
            "sharegpt": read_sharegpt,
            "custom": read_custom,
            "lengths": read_lengths,
        }
        found = readers[name](config.path)
    # Traces and lists of lengths keep their order: it is part of what they say.
    if found[0].prompt_text is not None and not config.disable_shuffle:
        rng.shuffle(found)
    return found, f"{name}: {config.dataset_path}"


def _request(
    sample: Sample, config: DatasetConfig, maker: PromptMaker | None, rng: random.Random
) -> WorkloadRequest | None:
    """Turn a sample into a request; None if it is one that is left out."""
    if sample.prompt_text is None:
        assert sample.num_prompt_tokens is not None
        # Synthetic lengths vary around the wanted one; elsewhere a wanted length is exact.
        own = sample.num_output_tokens
        output = own if config.name == "synthetic" else config.output_len or own
        assert output is not None
        if maker is None:
            prompt, num_prompt = None, sample.num_prompt_tokens
        else:
            prompt, num_prompt = maker.random_prompt(sample.num_prompt_tokens, rng)
        return WorkloadRequest(
            num_prompt_tokens=num_prompt,
            num_output_tokens=output,
            prompt=prompt,
            arrival_s=sample.arrival_s,
        )
    assert maker is not None
    text = sample.prompt_text
    if config.name == "custom" and not config.skip_chat_template:
        text = maker.chat(text)
    num_prompt = maker.count(text)
    output = config.output_len or sample.num_output_tokens
    if output is None and sample.output_text is not None:
        output = maker.count(sample.output_text)
    output = output or DEFAULT_CUSTOM_OUTPUT_LEN
    if config.name == "sharegpt" and not _fits_sharegpt(num_prompt, output, config):
        return None
    return WorkloadRequest(
        num_prompt_tokens=num_prompt, num_output_tokens=output, prompt=maker.given(text)
    )


def _fits_sharegpt(num_prompt: int, output: int, config: DatasetConfig) -> bool:
    long_enough = num_prompt >= _SHAREGPT_LEAST and (
        output >= _SHAREGPT_LEAST or config.output_len is not None
    )
    return (
        long_enough
        and num_prompt <= _SHAREGPT_MOST_PROMPT
        and num_prompt + output <= _SHAREGPT_MOST_TOTAL
    )
