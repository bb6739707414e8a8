"""What happened to each request of a run, as whoever sent it saw it."""

import itertools
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request's times, in seconds since the run began.

    Args:
        num_prompt_tokens: As the server counted them, else as the workload did.
        wanted_output_tokens: How many were asked for.
        scheduled_s: When it should have been sent.
        start_s: When it was sent.
        token_times_s: When each token, or each piece of text, arrived.
        num_output_tokens: As the server counted them, else the number of pieces.
        end_s: When the answer was complete; None while it is not.
        text: What was generated.
        error: Why it failed; None if it did not.
    """

    num_prompt_tokens: int
    wanted_output_tokens: int
    scheduled_s: float = 0.0
    start_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    end_s: float | None = None
    text: str = ""
    error: str | None = None

    @property
    def completed(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and self.end_s is not None and bool(self.token_times_s)

    @property
    def ttft_s(self) -> float:
        """Time to the first token; the request must have one."""
        return self.token_times_s[0] - self.start_s

    @property
    def e2el_s(self) -> float:
        """Time to the last token; the request must have one."""
        return self.token_times_s[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def itls_s(self) -> list[float]:
        """Times between one piece of the answer and the next."""
        times = self.token_times_s
        return [b - a for a, b in itertools.pairwise(times)]


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """One run of a workload on one system.

    Args:
        requests: In the order of their arrival; failed ones too.
        duration_s: From the first arrival to the end of the last answer.
        details: What the driver knows beside: steps by mode, blocks, how the client kept up.
        warnings: What a reader of the figures has to know.
    """

    requests: list[RequestRecord]
    duration_s: float
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
