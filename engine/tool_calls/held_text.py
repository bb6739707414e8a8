"""Content on its way out, held back where it may turn out to be something else."""


class HeldText:
    """Finds a marker in text that comes in pieces.

    The end of the text is held back while it may begin the marker, or be blanks before it.

    Args:
        marker: What to look for.
    """

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._held = ""
        self._skips_blanks = False
        self.blanks = ""
        """What stood between the content and the last marker."""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Return content that is certain, and what follows the marker; None: no marker yet."""
        self._held += text
        if self._skips_blanks:
            self._held = self._held.lstrip()
            self._skips_blanks = not self._held
        before, marker, after = self._held.partition(self._marker)
        if marker:
            content, self._held = before.rstrip(), ""
            self.blanks = before[len(content) :]
            return content, after
        content = self._held[: len(self._held) - self._num_of_marker()].rstrip()
        self._held = self._held[len(content) :]
        return content, None

    def skip_blanks(self) -> None:
        """Drop blanks that come next."""
        self._skips_blanks = True

    def finish(self) -> str:
        """Return what is held back: no marker came."""
        held, self._held = self._held, ""
        return held

    def _num_of_marker(self) -> int:
        """Return how many characters at the end begin the marker."""
        for length in range(min(len(self._marker) - 1, len(self._held)), 0, -1):
            if self._held.endswith(self._marker[:length]):
                return length
        return 0
