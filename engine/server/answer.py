"""What a generation looks like to the client; completions and chats each have their own form."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from engine.server.generation import ChoiceDelta, Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What is the same in every part of an answer.

    Args:
        answer_id: Its `id`.
        model: The model's name as the client wrote it.
        num_prompt_tokens: Of all prompts.
        stream: Whether it goes out as events.
        include_usage: Whether the stream ends with the usage.
        continuous_usage: Whether every event of the stream holds the usage so far.
        return_token_ids: Whether token ids come with the text.
        prompt_logprobs: Whether log-probabilities of the prompt are an answer's own field.
        form_field: The request's field that asks for a form of the answer.
        prompt_only: Whether the answer is the prompt alone, and the token behind it left out.
    """

    answer_id: str
    model: str
    num_prompt_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    prompt_logprobs: bool
    form_field: str | None
    prompt_only: bool = False

    def usage(self, generation: Generation) -> dict[str, Any]:
        """Return the tokens used so far."""
        num_output = 0 if self.prompt_only else generation.num_output_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_output,
            "total_tokens": self.num_prompt_tokens + num_output,
        }


class Answer(ABC):
    """Turns the deltas of a generation into JSON.

    Args:
        head: What every part has.
    """

    chunk_object: str
    """The `object` of an event."""
    whole_object: str
    """The `object` of an answer that is sent at once."""

    def __init__(self, head: AnswerHead) -> None:
        self.head = head
        self._created = int(time.time())

    @abstractmethod
    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Return the choices of the events that tell of a delta, one event each."""

    @abstractmethod
    def whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        """Return a finished choice."""

    def extra_fields(self, choices: list[ChoiceDelta]) -> dict[str, Any]:
        """Return what an answer sent at once has beside its choices."""
        return {}

    def chunks(self, delta: ChoiceDelta, generation: Generation) -> list[dict[str, Any]]:
        """Return the events that tell of a delta."""
        chunks = []
        for choice in self.chunk_choices(delta):
            chunk = self._envelope(self.chunk_object, [choice])
            if self.head.continuous_usage:
                chunk["usage"] = self.head.usage(generation)
            elif self.head.include_usage:
                chunk["usage"] = None
            chunks.append(chunk)
        return chunks

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        """Return the event that ends a stream with its usage."""
        chunk = self._envelope(self.chunk_object, [])
        chunk["usage"] = self.head.usage(generation)
        return chunk

    def whole(self, choices: list[ChoiceDelta], generation: Generation) -> dict[str, Any]:
        """Return the answer at once."""
        body = self._envelope(self.whole_object, [self.whole_choice(choice) for choice in choices])
        body["usage"] = self.head.usage(generation)
        return body | self.extra_fields(choices)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.head.answer_id,
            "object": kind,
            "created": self._created,
            "model": self.head.model,
            "choices": choices,
        }


def finish_fields(delta: ChoiceDelta) -> dict[str, Any]:
    """Return why a choice ended, None while it goes on."""
    finish = delta.finish
    return {
        "finish_reason": None if finish is None else finish.reason,
        "stop_reason": None if finish is None else finish.stop_reason,
    }
