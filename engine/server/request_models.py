"""The fields of requests, with OpenAI's and vLLM's names; what `/docs` shows and checks.

Strict: a number in quotes is an error. Unknown fields are tolerated, and null is the same as
leaving a field out.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from engine.sampling_params import MAX_LOGPROBS, MAX_STOP_STRINGS

MAX_CHOICES = 128
_INT32 = 2**31 - 1

TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Count = Annotated[int, Field(ge=0, le=_INT32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
NonEmpty = Annotated[str, Field(min_length=1)]
Choice = Annotated[list[NonEmpty], Field(min_length=1)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Model(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )


class StreamOptions(_Model):
    """What a stream brings beside the text."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="Put the usage so far into every chunk."
    )


class JsonSchemaFormat(_Model):
    """What `response_format` says of a schema."""

    json_schema: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(_Model):
    """OpenAI's words for the form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, description="For type json_schema.")


class StructuredOutputs(_Model):
    """vLLM's words for the form of an answer; one of them."""

    json_schema: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: NonEmpty | None = None
    choice: Choice | None = None
    grammar: NonEmpty | None = None


class GenerationRequest(_Model):
    """What completions and chats have in common."""

    model: str | None = Field(None, description="A served model's name; may be left out.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Answers to the same prompt; 1 if left out."
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Not supported unless equal to n."
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = Field(None, description="Most tokens to generate.")
    min_tokens: Count | None = Field(
        None, description="No stop condition holds before this many tokens."
    )
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="0 is greedy; 1 if left out."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = Field(
        None, description="0 or -1 is all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Makes sampling the same each time; choice i of n uses seed + i."
    )
    logit_bias: dict[BiasKey, Bias] | None = Field(
        None, description="Token id to a number that is added to its logit."
    )
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOP_STRINGS)] | None = Field(
        None, description="Strings that end the text."
    )
    stop_token_ids: list[TokenId] | None = Field(None, description="Tokens that end the text.")
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = Field(None, description="Go on after the end-of-sequence token.")
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = Field(
        None, description="Return the token ids of prompt and answer beside the text."
    )
    prompt_logprobs: NumLogprobs | None = Field(
        None, description="Log-probabilities of the prompt's tokens; not with stream."
    )
    response_format: ResponseFormat | None = Field(
        None, description="The form that the answer must have."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The same in vLLM's words: a schema, an expression, a choice, a grammar."
    )
    guided_json: str | dict[str, Any] | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: Choice | None = None
    guided_grammar: NonEmpty | None = None
    use_beam_search: bool | None = Field(None, description="Not supported: only false.")
    user: str | None = Field(None, description="Not used.")


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="A text, token ids, or a list of either.")
    echo: bool | None = Field(None, description="Put the prompt before the text.")
    logprobs: NumLogprobs | None = Field(
        None, description="Log-probabilities of this many likeliest tokens at each place."
    )
    suffix: str | None = Field(None, description="Not supported.")
    add_special_tokens: bool | None = Field(
        None, description="Put the model's special tokens around a text prompt; true if left out."
    )


class TextPart(_Model):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        """Say of images and the like what is wrong with them, not that they are no strings."""
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise PydanticCustomError(
                    "text_only",
                    "content of type {kind} is not supported; the model reads text only",
                    {"kind": kind},
                )
        return content


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(
        None, description="Most tokens to generate; goes before max_tokens."
    )
    logprobs: bool | None = Field(None, description="Return log-probabilities.")
    top_logprobs: NumLogprobs | None = Field(
        None, description="How many likeliest tokens at each place; needs logprobs."
    )
    tools: list[dict[str, Any]] | None = Field(None, description="Functions it may call.")
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="More variables for the chat template."
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeRequest(_Model):
    """`POST /tokenize`: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(None, description="For a prompt; true if left out.")
    add_generation_prompt: bool | None = Field(
        None, description="For a conversation; true if left out."
    )
    tools: list[dict[str, Any]] | None = Field(None, description="For a conversation.")
    return_token_strs: bool | None = None


class DetokenizeRequest(_Model):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
