"""One request on its way through the engine: its tokens, its progress and its state."""

import enum
import time
from dataclasses import dataclass, field

from engine.sampling_params import SamplingParams
from engine.structured_output.matcher import GrammarMatcher

PENDING_TOKEN = -1
"""Stands for a token that a step in flight samples."""


class RequestState(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Placement(enum.Enum):
    """Where a request's KV blocks are, all of them."""

    DEVICE = "device"
    HOST = "host"


class FinishReason(enum.Enum):
    """Why a request ended; the values are the ones OpenAI's API uses, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """A request and everything the scheduler needs to know of it.

    `num_computed_tokens` counts the tokens of `prompt + output` whose K and V are in the cache, or
    will be once the steps in flight are done. A preempted request goes back to 0 and keeps its
    output: nothing that was generated is lost. `num_pending_tokens` counts the tokens that steps in
    flight sample: they exist, but only the device knows them.
    `rotation_layer` is the layer whose attention the CPU computes, or has computed, for its newest
    token in overlap mode; None if it does not rotate. It may be forgotten at any time: the token
    then starts again at the first layer.
    `sequence` is its place in the order of arrival; `num_skipped_steps` counts the steps in a row
    that left it out while it was host-resident; `last_swap_step` is the step that last moved it.
    The scheduler keeps all four.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total_tokens: int
    """Prompt and output together never exceed this."""
    eos_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    grammar: GrammarMatcher | None = None
    """Follows the output where it must have a form; its state is the request's own."""
    arrival_time_s: float = field(default_factory=time.monotonic)
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_preemptions: int = 0
    num_swaps: int = 0
    placement: Placement = Placement.DEVICE
    sequence: int = 0
    num_skipped_steps: int = 0
    last_swap_step: int | None = None
    rotation_layer: int | None = None
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    finish_time_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output, pending ones included."""
        # Asked for hundreds of times a step, so written out.
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the output, pending ones included."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def awaits_last_token(self) -> bool:
        """Whether a step in flight samples the last token that the length allows."""
        return self.num_pending_tokens > 0 and self.num_output_tokens >= self.max_new_tokens

    @property
    def last_token_id(self) -> int:
        """The newest token that is known."""
        return (self.output_token_ids or self.prompt_token_ids)[-1]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that still have to go through the model before the next one can be sampled."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.state is RequestState.FINISHED

    @property
    def max_new_tokens(self) -> int:
        """Most tokens this request may generate, by its own limit and by the context's."""
        room = self.max_total_tokens - len(self.prompt_token_ids)
        return room if self.params.max_tokens is None else min(room, self.params.max_tokens)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end the output."""
        own = frozenset(self.params.stop_token_ids)
        return own if self.params.ignore_eos else own | self.eos_token_ids

    @property
    def ends_with_stop_token(self) -> bool:
        """Whether the last token only says that the output ends, and is no part of its text."""
        if self.finish_reason is not FinishReason.STOP or not self.output_token_ids:
            return False
        last = self.output_token_ids[-1]
        return last in self.eos_token_ids or last in self.params.stop_token_ids

    def token_ids(self, start: int, end: int) -> list[int]:
        """Return tokens `start` to `end` of prompt and output; pending ones are `PENDING_TOKEN`."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        tail = self.output_token_ids[max(0, start - num_prompt) : end - num_prompt]
        known = self.prompt_token_ids[start:num_prompt] + tail
        return known + [PENDING_TOKEN] * (end - start - len(known))

    def append_token(self, token_id: int) -> None:
        """Add a sampled token and finish the request if that token or the length ends it."""
        self.output_token_ids.append(token_id)
        if self.first_token_time_s is None:
            self.first_token_time_s = time.monotonic()
        if self.grammar is not None:
            self.grammar.accept(token_id)
        if len(self.output_token_ids) >= self.params.min_tokens and token_id in self.stop_ids:
            is_eos = token_id in self.eos_token_ids and token_id not in self.params.stop_token_ids
            self.finish(FinishReason.STOP, None if is_eos else token_id)
        elif self.grammar is not None and self.grammar.is_finished:
            error = self.grammar.error
            self.finish(FinishReason.STOP if error is None else FinishReason.ERROR, error)
        elif len(self.output_token_ids) >= self.max_new_tokens:
            self.finish(FinishReason.LENGTH)

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Mark the request as ended; its blocks are the scheduler's to free."""
        self.state = RequestState.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finish_time_s = time.monotonic()
