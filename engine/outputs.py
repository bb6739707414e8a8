"""What the engine gives back; names follow vLLM's."""

from dataclasses import dataclass, field

from engine.request import Request
from engine.token_logprobs import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times of one request in seconds on a monotonic clock; None where it has not come so far."""

    arrival_time_s: float
    first_scheduled_time_s: float | None
    first_token_time_s: float | None
    finish_time_s: float | None
    num_preemptions: int

    @property
    def ttft_s(self) -> float | None:
        """Time from arrival to the first token."""
        if self.first_token_time_s is None:
            return None
        return self.first_token_time_s - self.arrival_time_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """The generated part of a request, so far.

    Args:
        index: 0; a request has one completion.
        text: All text so far.
        new_text: The part of it that this step added.
        token_ids: All tokens so far, including one that ended the output.
        logprobs: One entry a token, if asked for.
        cumulative_logprob: Their sum, if asked for.
        finish_reason: `stop`, `length`, `abort`, or None while it goes on.
        stop_reason: The stop string or stop token that was met; None for the end-of-sequence token.
    """

    index: int = 0
    text: str
    new_text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The state of a request after a step.

    Args:
        request_id: As given to `add_request`.
        prompt: Its text; None if it was given as tokens.
        prompt_token_ids: Its tokens.
        prompt_logprobs: One entry a prompt token, if asked for; the first is None.
        outputs: One completion.
        finished: Whether this is the request's last output.
        metrics: Its times.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool
    metrics: RequestMetrics


def request_metrics(request: Request) -> RequestMetrics:
    """Return the times of a request."""
    return RequestMetrics(
        arrival_time_s=request.arrival_time_s,
        first_scheduled_time_s=request.first_scheduled_time_s,
        first_token_time_s=request.first_token_time_s,
        finish_time_s=request.finish_time_s,
        num_preemptions=request.num_preemptions,
    )
