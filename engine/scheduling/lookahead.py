"""For how long a request that starts now will find blocks, by what is known of the others.

A pool that is full of half-finished requests must evict some of them, and they are moved, or
computed again. So a request starts if, at every later moment, those that run then are expected to
fit: the fullest moments are just before one of them ends. Lengths are expected, not known.

It also starts if it will not fit to its end, but for long enough that its tokens until then are
worth an eviction. Requests that start together grow and end together, and their pool is full only
at the end; those that are evicted and come back later are out of step with the others, and so the
pool stays full.

Source: Gong et al., Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025.
"""

import copy
import math
from bisect import insort
from collections.abc import Iterable

from engine.request import Request

PRIOR_OUTPUT_TOKENS = 256
"""Expected before any request has finished."""
_LEAST_SHARE = 0.25
"""A request beyond the mean length is expected to go on for this share of it."""


class DeviceOutlook:
    """What the requests on the device will need.

    Args:
        requests: Those that hold blocks there.
        mean_output: Mean output length of finished requests, tokens; None before the first.
        num_blocks: Of the pool.
        block_size: Tokens of a block.
        least_steps: Steps that are worth an eviction.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        mean_output: float | None,
        num_blocks: int,
        block_size: int,
        least_steps: float = math.inf,
    ) -> None:
        self._mean_output = PRIOR_OUTPUT_TOKENS if mean_output is None else mean_output
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._least_steps = least_steps
        # (tokens to come, tokens now), those that end first first.
        self._loads = sorted(self._load(request) for request in requests)

    def copy(self) -> "DeviceOutlook":
        """Return another one that counts the same requests."""
        return copy.copy(self)  # lists of loads are replaced, never changed

    def admit(self, request: Request) -> bool:
        """Return whether a further request should start, and count it if so."""
        loads = list(self._loads)
        insort(loads, self._load(request))
        if len(loads) > 1 and self._steps_until_full(loads) < self._least_steps:
            return False
        self._loads = loads
        return True

    def _load(self, request: Request) -> tuple[int, int]:
        left = request.max_new_tokens - request.num_output_tokens
        if not request.params.ignore_eos:
            expected = self._mean_output - request.num_output_tokens
            left = min(left, math.ceil(max(expected, _LEAST_SHARE * self._mean_output)))
        return max(0, left), request.num_tokens

    def _steps_until_full(self, loads: list[tuple[int, int]]) -> float:
        """Return after how many steps the pool is too small; infinity if it never is."""
        count, tokens, steps = len(loads), sum(now for _, now in loads), 0
        for to_come, now in loads:
            # The last block of each is half full on average.
            capacity = (self._num_blocks - (count + 1) // 2) * self._block_size
            if tokens + count * (to_come - steps) > capacity:
                return steps + max(0, capacity - tokens) // count
            tokens += count * (to_come - steps) - (now + to_come)
            count, steps = count - 1, to_come
        return math.inf
