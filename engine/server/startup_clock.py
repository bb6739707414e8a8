"""Where the time of a start goes."""

import time


class StartupClock:
    """Adds up the seconds of named phases, one after the other.

    Args:
        start_s: When the first phase began, on the monotonic clock.
        phase: Its name.
    """

    def __init__(self, start_s: float, phase: str) -> None:
        self._begun_s = start_s
        self._phase = phase
        self._seconds: dict[str, float] = {}

    def begin(self, phase: str) -> None:
        """End the current phase and begin another; a name may come again."""
        now = time.monotonic()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._begun_s
        self._phase, self._begun_s = phase, now

    def stop(self) -> dict[str, float]:
        """End the last phase and return the seconds of all."""
        self.begin("")
        return self._seconds
