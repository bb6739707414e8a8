"""Whether a request that starts now will find blocks to the end, by what is known of the others.

A pool that is full of half-finished requests must evict some of them, and what they computed is
computed again. So a request starts only if, at every later moment, those that run then are expected
to fit: the fullest moments are just before one of them ends. Lengths are expected, not known;
preemption remains for when they were wrong.

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
    """

    def __init__(
        self,
        requests: Iterable[Request],
        mean_output: float | None,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self._mean_output = PRIOR_OUTPUT_TOKENS if mean_output is None else mean_output
        self._num_blocks = num_blocks
        self._block_size = block_size
        # (tokens to come, tokens now), those that end last first.
        self._loads = sorted((self._load(request) for request in requests), reverse=True)

    def copy(self) -> "DeviceOutlook":
        """Return another one that counts the same requests."""
        return copy.copy(self)  # lists of loads are replaced, never changed

    def admit(self, request: Request) -> bool:
        """Return whether a further request is expected to fit to its end, and count it if so."""
        loads = list(self._loads)
        insort(loads, self._load(request), key=lambda load: (-load[0], -load[1]))
        if len(loads) > 1 and self._peak_blocks(loads) > self._num_blocks:
            return False
        self._loads = loads
        return True

    def _load(self, request: Request) -> tuple[int, int]:
        left = request.max_new_tokens - request.num_output_tokens
        if not request.params.ignore_eos:
            expected = self._mean_output - request.num_output_tokens
            left = min(left, math.ceil(max(expected, _LEAST_SHARE * self._mean_output)))
        return max(0, left), request.num_tokens

    def _peak_blocks(self, loads: list[tuple[int, int]]) -> int:
        peak, tokens = 0, 0
        for count, (to_come, now) in enumerate(loads, start=1):
            tokens += now
            # Those that end later are all there and have grown as much as this one.
            at_its_end = tokens + count * to_come
            # The last block of each is half full on average.
            peak = max(peak, at_its_end // self._block_size + (count + 1) // 2)
        return peak
