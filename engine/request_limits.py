"""What a model allows a request to ask for; checked before a request is queued."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import RequestError
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The limits that depend on the model and on the engine's options.

    Args:
        vocab_size: Token ids are below it.
        max_model_len: Most tokens of a request, prompt and output together.
        has_tokenizer: Whether there is text at all.
    """

    vocab_size: int
    max_model_len: int
    has_tokenizer: bool

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Check a request.

        Raises:
            RequestError: The prompt is empty, too long or out of vocabulary, or stop strings or a
                logit bias do not go with the model.
        """
        self.check_tokens(token_ids)
        largest = max(params.logit_bias, default=0)
        if largest >= self.vocab_size:
            raise RequestError(
                f"logit_bias token ids must be from 0 to {self.vocab_size - 1}, got {largest}",
                field="logit_bias",
            )
        if params.stop and not self.has_tokenizer:
            raise RequestError(
                "stop strings need a tokenizer, and the model folder has none", field="stop"
            )

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Check a prompt alone.

        Raises:
            RequestError: It is empty, too long or out of vocabulary.
        """
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token", field="prompt")
        self.check_vocabulary(token_ids, "prompt")
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with a context of {self.max_model_len} "
                f"tokens it may have {self.max_model_len - 1}; shorten it or raise --max-model-len",
                field="prompt",
            )

    def check_vocabulary(self, token_ids: Sequence[int], field: str) -> None:
        """Check that the model knows some tokens.

        Args:
            token_ids: The tokens.
            field: Where they stand in the request.

        Raises:
            RequestError: It does not.
        """
        if max(token_ids, default=0) >= self.vocab_size or min(token_ids, default=0) < 0:
            raise RequestError(
                f"{field} token ids must be from 0 to {self.vocab_size - 1}", field=field
            )
