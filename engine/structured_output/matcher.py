"""Follows one request's output through its grammar, token by token, on the host."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the configuration, and must not load a grammar engine
    from llguidance import LLMatcher


class GrammarMatcher:
    """Where one request stands in its grammar.

    It is advanced with every sampled token and never goes back, so it stays right when its request
    is preempted: the output is kept then, only its KV is computed again.

    Args:
        matcher: llguidance's state at the beginning of the grammar.
        num_mask_bytes: Size of a mask: a bit for each token of the vocabulary, in whole words.
    """

    def __init__(self, matcher: "LLMatcher", num_mask_bytes: int) -> None:
        self._matcher = matcher
        self.num_mask_bytes = num_mask_bytes

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow but the end, or the grammar failed; see `error`."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str | None:
        """Why the output cannot be continued by the grammar; None if all is well."""
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error().partition("\n")[0]
        return f"structured output failed: {reason}"

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token."""
        self._matcher.consume_token(token_id)

    def write_mask(self, address: int) -> None:
        """Write which tokens may come next, one bit each, lowest bit first.

        The end-of-sequence tokens are among them where the grammar may end here.

        Args:
            address: Of `num_mask_bytes` bytes, aligned to 4.
        """
        self._matcher.unsafe_compute_mask_ptr(address, self.num_mask_bytes)
