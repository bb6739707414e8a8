"""Work of a device beside the step's: on a second stream of a GPU, at once on a CPU."""

from collections.abc import Callable

import torch

Mark = torch.cuda.Event | None
"""A point behind some of the work; None if it is done already."""


class SideStream:
    """Runs work behind what the current stream was given so far; later work of that may wait.

    All work must be joined before the step ends: then steps can be captured with it.

    Args:
        device: A GPU, or the CPU, which does everything when it is told to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._has_work = False

    def run(self, work: Callable[[], None]) -> Mark:
        """Run work and return the point behind it."""
        if self._stream is None:
            work()
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        self._has_work = True
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        """Let later work of the current stream wait for a point."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def forget(self) -> None:
        """Forget work that was given up; the device must have left it."""
        self._has_work = False

    def join(self) -> None:
        """Let later work of the current stream wait for all work."""
        if self._stream is not None and self._has_work:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._has_work = False
