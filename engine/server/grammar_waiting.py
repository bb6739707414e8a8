"""Requests whose grammar is compiled beside the steps, before the engine gets them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from engine.server.wire import Add
from engine.structured_output import StructuredOutput


class GrammarWaiting:
    """Keeps requests until their grammars are ready, so that no step waits for a compiler.

    Args:
        compile_grammar: Compiles and keeps a grammar; called in another thread.
    """

    def __init__(self, compile_grammar: Callable[[StructuredOutput], object]) -> None:
        self._compile = compile_grammar
        self._thread = ThreadPoolExecutor(1, "neo-grammar")
        self._waiting: dict[str, tuple[Add, Future[object]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, command: Add) -> None:
        """Take a request whose parameters have a grammar."""
        wanted = command.params.structured_output
        assert wanted is not None
        future = self._thread.submit(self._compile, wanted)
        self._waiting[command.request_id] = (command, future)

    def drop(self, request_id: str) -> bool:
        """Forget a request, and return whether it was here."""
        _, future = self._waiting.pop(request_id, (None, None))
        if future is None:
            return False
        future.cancel()
        return True

    def take_ready(self) -> list[tuple[Add, BaseException | None]]:
        """Return the requests whose grammars have been compiled, or cannot be, and why not."""
        ready = [
            (command, future.exception())
            for command, future in self._waiting.values()
            if future.done()
        ]
        for command, _ in ready:
            del self._waiting[command.request_id]
        return ready
