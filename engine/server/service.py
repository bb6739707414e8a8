"""What every handler needs: the model's names and tokenizer, the engine, and who may come in."""

import asyncio
import enum
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.prompt_encoder import PromptEncoder
from engine.sampling_params import SamplingParams
from engine.server.api_errors import ApiError, invalid_request, queue_is_full, unavailable
from engine.server.engine_client import EngineClient
from engine.server.generation import Generation
from engine.server.metrics import Metrics
from engine.server.server_config import ServerConfig
from engine.server.token_texts import TokenTexts
from engine.server.wire import Ready
from engine.tool_calls import ToolCallFormat, find_format

MAX_SILENCE_S = 120.0
"""An engine that has requests but reports no step for so long counts as hung."""

_T = TypeVar("_T")


class State(enum.Enum):
    """How far the server is."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Service:
    """The server's state, shared by all handlers of one event loop.

    Args:
        config: The server's options.
        engine: Where requests go.
        metrics: What is counted.
    """

    def __init__(self, config: ServerConfig, engine: EngineClient, metrics: Metrics) -> None:
        self.config = config
        self.engine = engine
        self.metrics = metrics
        self.started_s = time.time()
        self.is_draining = False
        self.model_names: tuple[str, ...] = config.served_model_names
        self.tool_format: ToolCallFormat | None = None
        """How the model writes calls of functions; None if it does not."""
        self._ready: Ready | None = None
        self._encoder: PromptEncoder | None = None
        self._texts: TokenTexts | None = None
        # One thread: tokenizers are not made for several, and a long prompt must not hold the loop.
        self._encoding = ThreadPoolExecutor(1, "neo-encode")

    def open(self, ready: Ready, model_name: str, encoder: PromptEncoder) -> None:
        """Let requests in.

        Args:
            ready: What the engine said.
            model_name: The model's own name, served if no other was given.
            encoder: The model's tokenizer.
        """
        self._ready = ready
        self._encoder = encoder
        template = getattr(encoder.tokenizer, "chat_template", None)
        self.tool_format = find_format(template, self.config.tool_call_parser)
        self._texts = None if encoder.tokenizer is None else TokenTexts(encoder.tokenizer)
        self.model_names = self.config.served_model_names or (model_name,)

    @property
    def state(self) -> State:
        """How far the server is."""
        if self.engine.gone.is_set():
            return State.FAILED
        if self.is_draining:
            return State.DRAINING
        return State.LOADING if self._ready is None else State.READY

    @property
    def problem(self) -> str | None:
        """Why the server is not to get requests; None if it may."""
        if self.state is not State.READY:
            return f"the server is {self.state.value}"
        if self.engine.silent_s > MAX_SILENCE_S:
            return f"the engine has not finished a step for {self.engine.silent_s:.0f} s"
        return None

    def check_serving(self) -> None:
        """Raise the answer for those who come too early or too late.

        Raises:
            ApiError: The server is loading, draining or broken.
        """
        if self.state is not State.READY:
            raise unavailable(f"the server is {self.state.value}; try again later")

    @property
    def is_open(self) -> bool:
        """Whether the engine was ready once."""
        return self._ready is not None

    @property
    def ready(self) -> Ready:
        """What the engine said when it was ready."""
        assert self._ready is not None
        return self._ready

    @property
    def encoder(self) -> PromptEncoder:
        """The model's tokenizer."""
        assert self._encoder is not None
        return self._encoder

    @property
    def texts(self) -> TokenTexts | None:
        """Texts of single tokens; None without a tokenizer."""
        return self._texts

    def check_model(self, name: str | None) -> str:
        """Return the name to answer with.

        Raises:
            ApiError: No such model is served.
        """
        self.check_serving()
        if name is None or name in self.model_names:
            return name or self.model_names[0]
        raise ApiError(
            404,
            f"the model {name!r} is not served here; there is {', '.join(self.model_names)}",
            "invalid_request_error",
            param="model",
            code="model_not_found",
        )

    def check_count(self, num_choices: int) -> None:
        """Check how many requests one call makes, before its prompts are encoded.

        Raises:
            ApiError: They could not even wait together.
        """
        most = self.config.max_queue + self.ready.max_num_seqs
        if num_choices > most:
            raise invalid_request(
                f"prompts times n is {num_choices}; no more than {most} may run and wait here", "n"
            )

    def check_request(
        self, token_ids: list[int], params: SamplingParams, max_tokens: int | None
    ) -> None:
        """Check one prompt with its parameters.

        Args:
            token_ids: The prompt.
            params: Of its choices.
            max_tokens: What the client asked for; None if nothing.

        Raises:
            RequestError: The model does not allow it.
            ApiError: Prompt and output together are longer than the context.
        """
        limits = self.ready.limits
        limits.check(token_ids, params)
        if max_tokens is not None and len(token_ids) + max_tokens > limits.max_model_len:
            raise invalid_request(
                f"max_tokens is {max_tokens}, but with a prompt of {len(token_ids)} tokens and a "
                f"context of {limits.max_model_len} it may be at most "
                f"{limits.max_model_len - len(token_ids)}",
                "max_tokens",
                "context_length_exceeded",
            )

    async def run_encoding(self, work: Callable[[], _T]) -> _T:
        """Run something that uses the tokenizer, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)

    def generate(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> Generation:
        """Start requests, if there is room in the queue.

        Raises:
            ApiError: The queue is full, or the server no longer serves.
        """
        self.check_serving()
        gauges = self.engine.gauges
        # While the engine leaves nobody waiting, whoever comes may run, up to its limit.
        room = gauges.num_running if gauges.num_waiting else self.ready.max_num_seqs
        over = self.engine.num_live + len(prompts) - room - self.config.max_queue
        if over > 0:
            rate = self.metrics.recent.finished_per_s()
            wait_s = math.ceil(over / rate) if rate > 0 else 1
            raise queue_is_full(self.config.max_queue, min(60, max(1, wait_s)))
        return self.engine.generate(prompts, params)
