"""What a caller may ask of the sampling of one request; names and ranges follow vLLM's."""

from dataclasses import dataclass, field

from engine.errors import RequestError
from engine.structured_output.spec import StructuredOutput

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request.

    Args:
        temperature: 0 is greedy; otherwise logits are divided by it. In [0, inf).
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches this. In (0, 1].
        min_p: Drop tokens less likely than this times the most likely one. In [0, 1].
        repetition_penalty: Divides (positive) or multiplies (negative) the logits of tokens seen in
            the prompt or the output. In (0, inf); 1 is off.
        presence_penalty: Subtracted once from the logit of each token seen in the output. [-2, 2].
        frequency_penalty: Subtracted once per occurrence in the output. [-2, 2].
        seed: Makes this request's draws reproducible, whatever runs beside it.
        logit_bias: Token id to a number added to its logit, in [-100, 100].
        stop: Strings, or one, that end the output; not part of its text unless
            `include_stop_str_in_output`.
        stop_token_ids: Tokens that end the output; not part of its text either.
        ignore_eos: Go on after the model's end-of-sequence token.
        max_tokens: Most tokens to generate, at least 1; None is up to the context limit.
        min_tokens: No stop condition holds before this many tokens.
        logprobs: Return the log-probabilities of the sampled token and of this many likeliest ones.
        prompt_logprobs: The same for every prompt token but the first, which nothing comes before.
        structured_output: The form that the output must have. It may end only where its grammar
            may end; where nothing but the end is possible the request stops.
        skip_special_tokens: Leave special tokens out of the text.
        include_stop_str_in_output: Keep the stop string or token at the end of the text.

    Raises:
        RequestError: A value is out of range; the message names the field.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_output: StructuredOutput | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_range("temperature", self.temperature, 0.0, float("inf"))
        self._check_range("min_p", self.min_p, 0.0, 1.0)
        self._check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check(self.top_k >= -1, "top_k", "0 or -1 (off) or a positive count", self.top_k)
        self._check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1", self.top_p)
        self._check(
            0.0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            "a finite number above 0",
            self.repetition_penalty,
        )
        self._check_counts()
        for token_id, bias in self.logit_bias.items():
            self._check(token_id >= 0, "logit_bias", "token ids of at least 0", token_id)
            self._check_range("logit_bias", bias, -100.0, 100.0)

    def _check_counts(self) -> None:
        if self.max_tokens is not None:
            self._check(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
            self._check(
                0 <= self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"between 0 and max_tokens ({self.max_tokens})",
                self.min_tokens,
            )
        self._check(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._check_range(name, value, 0, MAX_LOGPROBS)
        if self.seed is not None:
            self._check(
                -(2**63) <= self.seed < 2**64, "seed", "an integer of at most 64 bits", self.seed
            )
        self._check(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"at most {MAX_STOP_STRINGS} strings",
            len(self.stop),
        )
        self._check(all(self.stop), "stop", "strings that are not empty", "an empty string")
        for token_id in self.stop_token_ids:
            self._check(token_id >= 0, "stop_token_ids", "token ids of at least 0", token_id)

    def _check_range(self, name: str, value: float, low: float, high: float) -> None:
        expected = f"between {low} and {high}"
        if high == float("inf"):
            expected = f"a finite number of at least {low}"
        self._check(low <= value <= high and value != float("inf"), name, expected, value)

    @staticmethod
    def _check(ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise RequestError(f"{name} must be {expected}, got {got}", field=name)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def needs_host_tokens(self) -> bool:
        """Whether sampling a token takes the values of all tokens before it, on the host."""
        return self.has_penalties or self.structured_output is not None

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens seen so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
