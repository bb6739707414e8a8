"""How a CPU that plays the device tells the service that rows are ready, and waits for its answer.

A doorbell is a 32-bit word in memory that both sides see. Tickets count up; a wait is over once the
word has reached its ticket. On a GPU, kernels ring and wait: `engine.backends.handover`.
"""

import time

from cpu_kernels.service import AttentionService


class HostDoorbells:
    """The device is the CPU: calls ring and wait at once.

    Args:
        service: Whose bells.
    """

    def __init__(self, service: AttentionService) -> None:
        self._service = service
        self._waiting_s = 0.0

    def ring(self, lane: int, ticket: int) -> None:
        """Announce a lane's rows."""
        self._service.ring(lane, ticket)

    def wait(self, lane: int, ticket: int) -> None:
        """Block the caller until the answer has come.

        Raises:
            ServiceError: The service gave up.
        """
        start = time.perf_counter()
        self._service.wait(lane, ticket)
        self._waiting_s += time.perf_counter() - start

    def take_waiting_s(self) -> float:
        """Return how long `wait` blocked since the last call."""
        waiting_s, self._waiting_s = self._waiting_s, 0.0
        return waiting_s
