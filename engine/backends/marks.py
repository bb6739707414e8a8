"""Points in a device's work, to measure the time between them."""

import time

import torch


class ClockMark:
    """A moment."""

    def __init__(self) -> None:
        self._time_s = time.perf_counter()

    def seconds_since(self, earlier: "ClockMark") -> float:
        """Return the time between two moments."""
        return self._time_s - earlier._time_s


class StreamMark:
    """A point in the work of a GPU's current stream.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: "StreamMark") -> float:
        """Return the time between two points, the later of which is about to be passed."""
        # The tokens before it may have come to the host already, and it not be passed yet.
        self._event.synchronize()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000
