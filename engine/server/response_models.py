"""What answers look like, for `/docs` and `/openapi.json`.

Answers are written as plain dicts, which is cheaper; the tests check that they are as said here.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities, one entry a token."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


FinishReasonName = Literal["stop", "length", "abort", "tool_calls"]


class PromptLogprob(BaseModel):
    """A token that the prompt has, or could have had, at a place."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = dict[str, PromptLogprob]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReasonName | None
    stop_reason: int | str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PromptLogprobs | None] | None = None


class Completion(BaseModel):
    """An answer of `/v1/completions`; events of a stream have the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was taken, and likely ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities, one entry a token."""

    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    """Which function, with which arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReasonName
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """An answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[PromptLogprobs | None] | None = None


class Model(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """All names under which the model is served."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Whether the server takes requests."""

    status: Literal["ready", "loading", "draining", "failed"]
    problem: str | None = Field(description="Why it does not, in words.")


class Version(BaseModel):
    """NEO's version."""

    version: str


class Tokens(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """The text of tokens."""

    prompt: str


_ERRORS = {
    400: "The request is not valid; `param` names the field.",
    401: "An API key is needed.",
    404: "No such model.",
    413: "The body is too large.",
    429: "Too many requests are waiting.",
    500: "The engine failed.",
    503: "The server is loading, draining or broken.",
    504: "The request took too long.",
}


def documented(model: type[BaseModel], tag: str, *, streams: bool = False) -> dict[str, Any]:
    """Return the arguments of a route that tell of its answers.

    Args:
        model: A good answer.
        tag: The heading in `/docs`.
        streams: Whether it may be a stream of events instead.
    """
    good: dict[str, Any] = {"model": model, "description": "The answer."}
    if streams:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    errors = {status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()}
    return {"response_model": None, "responses": {200: good, **errors}, "tags": [tag]}
