"""Times kernels on a GPU the way serving runs them: in a CUDA graph, on cold data."""

import statistics
from collections.abc import Callable, Sequence

import torch

Launch = Callable[[], object]


def median_us(launches: Sequence[Launch], *, rounds: int = 4, replays: int = 7) -> float:
    """Median time of one launch, measured in a CUDA graph that runs them all in turn.

    Args:
        launches: The same work on different buffers, together larger than the L2 cache, so that
            each launch finds its data in device memory.
        rounds: How often the graph runs through the list.
        replays: Timed replays of the graph; the median counts.

    Returns:
        Microseconds a launch.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: its garbage collection costs more than the measurement.
        graph.capture_begin()
        for _ in range(rounds):
            for launch in launches:
                launch()
        graph.capture_end()
        graph.replay()
        stream.synchronize()
        samples = [_replay_us(graph) / (rounds * len(launches)) for _ in range(replays)]
    return statistics.median(samples)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay on the current stream."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))
