"""From the messages and tools of a request to the tokens of a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.prompt_encoder import PromptEncoder
from engine.server.request_models import ChatMessage, ChatRequest, TokenizeRequest
from engine.tool_calls import ToolUse

_ROLES = {"developer": "system"}
"""Roles that OpenAI has added since, by the one that templates know."""


def chat_prompt(
    encoder: PromptEncoder, request: ChatRequest, tool_use: ToolUse | None
) -> list[int]:
    """Return a chat's prompt.

    Raises:
        RequestError: The chat template refuses it.
    """
    options = dict(request.chat_template_kwargs or {})
    for name in ("add_generation_prompt", "continue_final_message"):
        value = getattr(request, name)
        if value is not None:
            options[name] = value
    tools = None if tool_use is None else tool_use.template_tools
    return encoder.chat_prompt(_messages(request.messages), tools, **options)


def tokenized_conversation(encoder: PromptEncoder, request: TokenizeRequest) -> list[int]:
    """Return the tokens of a conversation that is only to be counted.

    Raises:
        RequestError: The chat template refuses it.
    """
    assert request.messages is not None
    generates = request.add_generation_prompt is not False
    return encoder.chat_prompt(
        _messages(request.messages), request.tools, add_generation_prompt=generates
    )


def _messages(messages: Sequence[ChatMessage]) -> list[Mapping[str, Any]]:
    plain: list[Mapping[str, Any]] = []
    for message in messages:
        role = _ROLES.get(message.role, message.role)
        given = message.model_dump(exclude_unset=True)
        plain.append({"content": None, **given, "role": role})
    return plain
