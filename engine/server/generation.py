"""What the engine has produced for one API call and nobody has taken yet."""

import asyncio
from dataclasses import dataclass

from engine.server.wire import Finish, TokenDelta
from engine.token_logprobs import TokenLogprobs


@dataclass(slots=True)
class ChoiceDelta:
    """What is new in one choice of an answer."""

    index: int
    texts: list[str]
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    prompt_logprobs: list[TokenLogprobs | None] | None

    @property
    def text(self) -> str:
        """The new text."""
        return "".join(self.texts)


class ClientGoneError(Exception):
    """The client has closed its connection; nobody waits for the answer."""


class Generation:
    """The running requests of one API call, as its handler sees them.

    Deltas that come faster than they are taken are merged, so a slow client gets larger pieces
    and holds up nobody.

    Args:
        request_ids: The engine's ids of the choices, in their order.
    """

    def __init__(self, request_ids: list[str]) -> None:
        self.request_ids = request_ids
        self.num_output_tokens = 0
        self._num_running = len(request_ids)
        self._pending: dict[int, ChoiceDelta] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False
        self._error: Exception | None = None

    def put(self, index: int, delta: TokenDelta) -> None:
        """Add what the engine has produced for a choice."""
        _, text, token_ids, logprobs, finish, prompt_logprobs = delta
        self.num_output_tokens += len(token_ids)
        known = self._pending.get(index)
        if known is None:
            self._pending[index] = ChoiceDelta(
                index, [text], token_ids, logprobs, finish, prompt_logprobs
            )
        else:
            known.texts.append(text)
            known.token_ids += token_ids
            if known.logprobs is not None and logprobs is not None:
                known.logprobs += logprobs
            known.finish = finish
            known.prompt_logprobs = known.prompt_logprobs or prompt_logprobs
        if finish is not None:
            self._num_running -= 1
        if not self._waits_for_end or not self._num_running:
            self._wake()

    def fail(self, error: Exception) -> None:
        """Have whoever takes get an error; the first one counts."""
        if self._error is None:
            self._error = error
        self._wake()

    async def take(self) -> list[ChoiceDelta]:
        """Wait for something new and return it, at most one delta a choice; [] after the end.

        Raises:
            ClientGoneError: Nobody waits for it.
            ApiError: The engine failed, or time is up.
        """
        while not self._pending and self._num_running:
            await self._wait()
        return self._take_pending()

    async def take_whole(self) -> list[ChoiceDelta]:
        """Wait for the end and return all choices in their order.

        Raises:
            ClientGoneError: Nobody waits for it.
            ApiError: The engine failed, or time is up.
        """
        self._waits_for_end = True
        while self._num_running:
            await self._wait()
        return sorted(self._take_pending(), key=lambda choice: choice.index)

    async def _wait(self) -> None:
        self._raise_error()
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
        self._raise_error()

    def _take_pending(self) -> list[ChoiceDelta]:
        self._raise_error()
        deltas = list(self._pending.values())
        self._pending.clear()
        return deltas

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
