"""From the fields of a request to the engine's sampling parameters."""

from dataclasses import replace
from typing import Any

from engine.sampling_params import SamplingParams
from engine.server.api_errors import invalid_request
from engine.server.request_models import ChatRequest, CompletionRequest, GenerationRequest
from engine.server.response_form import response_form

DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's completions generate where nothing is said; chats go on to the context's end."""

_SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "min_tokens",
)


def completion_params(request: CompletionRequest) -> SamplingParams:
    """Return the parameters of a completion's first choice.

    Raises:
        ApiError: Fields contradict each other, or ask for what there is not.
    """
    if request.suffix:
        raise invalid_request("suffix is not supported", "suffix")
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = max(DEFAULT_COMPLETION_TOKENS, request.min_tokens or 0)
    if max_tokens == 0 and request.echo:
        max_tokens = 1  # only the prompt is wanted; the caller leaves the token out
    prompt_logprobs = request.prompt_logprobs
    if request.echo and prompt_logprobs is None:
        prompt_logprobs = request.logprobs
    return _params(
        request, max_tokens=max_tokens, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs
    )


def chat_params(request: ChatRequest) -> SamplingParams:
    """Return the parameters of a chat's first choice.

    Raises:
        ApiError: Fields contradict each other, or ask for what there is not.
    """
    if request.top_logprobs and not request.logprobs:
        raise invalid_request("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(
        request,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )


def each_choice(params: SamplingParams, n: int) -> list[SamplingParams]:
    """Return the parameters of `n` choices: the same, but for their seeds."""
    if params.seed is None:
        return [params] * n
    first = params.seed
    return [replace(params, seed=first + index) for index in range(n)]


def _params(
    request: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Return the parameters; a `RequestError` of theirs is answered by its handler."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid_request("best_of is not supported unless it equals n", "best_of")
    if request.use_beam_search:
        raise invalid_request("beam search is not supported", "use_beam_search")
    if request.stream_options is not None and not request.stream:
        raise invalid_request("stream_options needs stream to be true", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise invalid_request("prompt_logprobs cannot be streamed", "prompt_logprobs")
    form, _ = response_form(request)
    given: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None
    }
    if request.logit_bias:
        given["logit_bias"] = {int(key): bias for key, bias in request.logit_bias.items()}
    if request.stop is not None:
        given["stop"] = request.stop
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured_output=form,
    )
