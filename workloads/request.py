"""One request of a workload: how long its prompt and its output are, and what the prompt says."""

from dataclasses import dataclass

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequest:
    """A request, before anybody has decided when to send it.

    Args:
        num_prompt_tokens: Length of the prompt, as far as it is known before a server counted it.
        num_output_tokens: Tokens to generate.
        prompt: Text or token ids; None where only lengths matter (simulation).
        arrival_s: When the trace that it comes from has it arrive, in seconds after the first.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    prompt: Prompt | None = None
    arrival_s: float | None = None

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt, which must be token ids."""
        assert isinstance(self.prompt, list), "this workload was made as text"
        return self.prompt
