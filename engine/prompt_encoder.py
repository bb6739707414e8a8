"""From prompts to tokens: all of a request's way in that needs the tokenizer but no weights.

The engine has one, and so has the server's HTTP process, which holds no model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.chat_messages import ChatMessage, check_template_options, template_messages
from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError, RequestError


class PromptEncoder:
    """Turns texts and conversations into tokens.

    Args:
        tokenizer: transformers' fast tokenizer; None serves token ids alone.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_prompt` works."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: The text.
            add_special_tokens: Put the special tokens around it that the model expects.

        Raises:
            RequestError: The text is empty, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError(
                "a text prompt needs a tokenizer, and the model folder has none", field="prompt"
            )
        if not text:
            raise RequestError("the prompt is empty; give at least one character", field="prompt")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt is not valid text: a lone surrogate at character {error.start}",
                field="prompt",
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of some tokens.

        Raises:
            RequestError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError("text needs a tokenizer, and the model folder has none")
        return str(
            self.tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
        /,
        **template_options: Any,
    ) -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's answer.

        Args:
            messages: `{"role": ..., "content": ...}` each; content is text or a list of text parts.
            tools: Functions that the model may call, as in OpenAI's API.
            **template_options: What the template knows beside them, such as `documents` or
                `enable_thinking`; also `add_generation_prompt` and `continue_final_message`.

        Raises:
            RequestError: The model has no chat template, or it refuses the messages.
        """
        if not self.has_chat_template:
            raise RequestError(
                "the model has no chat template; give it a plain prompt (neo generate --raw)",
                field="messages",
            )
        check_template_options(template_options)
        continues = bool(template_options.get("continue_final_message"))
        options = {"add_generation_prompt": not continues, **template_options}
        conversation = template_messages(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tools=list(tools) if tools else None, tokenize=False, **options
            )
        except Exception as error:  # whatever the model's own template raises
            raise RequestError(
                f"the chat template refuses the messages: {error}", field="messages"
            ) from error
        return self.tokenize(text, add_special_tokens=False)


def load_prompt_encoder(checkpoint: Checkpoint, load_format: str) -> PromptEncoder:
    """Load a checkpoint's tokenizer.

    With dummy weights a missing tokenizer is no error: they say nothing, so tokens go in and out.

    Raises:
        CheckpointError: It is missing or broken.
    """
    try:
        return PromptEncoder(checkpoint.load_tokenizer())
    except CheckpointError:
        if load_format != "dummy":
            raise
        return PromptEncoder(None)
