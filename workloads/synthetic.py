"""Synthetic workloads as token ids, for the benchmarks that drive the engine by hand."""

from workloads.datasets import DatasetConfig, PromptMaker, load_workload
from workloads.request import WorkloadRequest

__all__ = ["WorkloadRequest", "synthetic_workload"]


def synthetic_workload(
    num_requests: int, input_len: int, output_len: int, vocab_size: int, seed: int
) -> list[WorkloadRequest]:
    """Return reproducible requests with random prompts.

    Args:
        num_requests: How many.
        input_len: Mean prompt length in tokens.
        output_len: Mean output length in tokens.
        vocab_size: Prompt tokens are drawn from all but the first few, which are often special.
        seed: The same seed gives the same requests.
    """
    config = DatasetConfig(
        num_prompts=num_requests, input_len=input_len, output_len=output_len, seed=seed
    )
    return load_workload(config, PromptMaker(as_text=False, vocab_size=vocab_size)).requests
