"""What the HTTP process and the engine process say to each other, and how it is framed.

Each message is a pickle behind its length, through a socket pair between a process and its own
child; nobody else can write to it. Outputs travel as deltas: what a step added, never a text or a
list of tokens again from its start.
"""

import pickle
import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.config import EngineConfig
from engine.outputs import RequestMetrics
from engine.request_limits import RequestLimits
from engine.sampling_params import SamplingParams
from engine.server.step_record import StepRecord
from engine.token_logprobs import TokenLogprobs

HEADER = struct.Struct("<I")
"""The length of the pickle that follows."""


@dataclass(frozen=True, slots=True)
class Start:
    """To the engine: load the model. Sent once, first."""

    config: EngineConfig


class Add(NamedTuple):
    """To the engine: queue a request."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams


class Abort(NamedTuple):
    """To the engine: end requests and free their blocks before the next step."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Stop:
    """To the engine: abort everything and leave."""


class Progress(NamedTuple):
    """From the engine: what it is doing while it starts."""

    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """From the engine: it serves.

    Args:
        limits: What requests may ask for.
        max_num_seqs: Most requests that run at once.
        num_device_blocks: KV blocks of the device.
        num_host_blocks: KV blocks of the host, 0 without offloading.
        block_size: Tokens of a block.
        block_bytes: Bytes of a block, K and V of all layers.
        device: Where the model is.
        dtype: Of its weights.
        description: What computes what, for people.
        phases: What start-up did, and the seconds each part took.
    """

    limits: RequestLimits
    max_num_seqs: int
    num_device_blocks: int
    num_host_blocks: int
    block_size: int
    block_bytes: int
    device: str
    dtype: str
    description: str
    phases: dict[str, float]


@dataclass(frozen=True, slots=True)
class Failed:
    """From the engine: it cannot go on, and leaves.

    Args:
        message: Why, in one line.
        is_bug: Whether it is an error nobody foresaw; its traceback is in the log then.
    """

    message: str
    is_bug: bool


class Finish(NamedTuple):
    """How and when a request ended.

    `reason` is one of the values of `FinishReason`; with `error` the message is in `stop_reason`.
    `metrics` is None if the engine has lost the request.
    """

    reason: str
    stop_reason: int | str | None
    metrics: RequestMetrics | None


class Refusal(NamedTuple):
    """A request that the engine did not take; `field` is to blame, if it is known."""

    request_id: str
    message: str
    field: str | None


class TokenDelta(NamedTuple):
    """What a step added to a request; `prompt_logprobs` comes with the first tokens, if at all."""

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Gauges(NamedTuple):
    """How things stand after a step."""

    num_running: int
    num_running_host: int
    num_waiting: int
    num_device_used: int
    num_host_used: int


@dataclass(slots=True)
class Report:
    """From the engine: what one turn of its loop did, all of it in one message."""

    time_s: float
    gauges: Gauges
    deltas: list[TokenDelta] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def encode(message: Any) -> bytes:
    """Return a message as it goes through the socket."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


class FrameReader:
    """Puts messages together from the pieces in which they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Add what was received and return the messages that are complete."""
        self._buffer += data
        messages = []
        at = 0
        while len(self._buffer) - at >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, at)
            start = at + HEADER.size
            if len(self._buffer) - start < length:
                break
            messages.append(pickle.loads(self._buffer[start : start + length]))
            at = start + length
        del self._buffer[:at]
        return messages
