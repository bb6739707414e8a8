"""The offline API: prompts in, completions out, with vLLM's conventions."""

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from engine.chat_messages import ChatMessage
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.llm_engine import LLMEngine, Prompt
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import SchedulerConfig

_SCHEDULER_OPTIONS = tuple(SchedulerConfig.__dataclass_fields__)


class LLM:
    """A model to generate text with.

    Example:
        >>> with LLM("path/to/model", dtype="float32") as llm:
        ...     [output] = llm.generate("The capital of France is", SamplingParams(temperature=0))

    Args:
        model: Folder, `.gguf` file or Hub id; None is the embedded default model.
        on_progress: Told what is going on while the model loads.
        **options: Any option of `EngineConfig` or `SchedulerConfig`.

    Raises:
        NeoError: The model, the options or the machine do not allow it.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        on_progress: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> None:
        limits = {name: options.pop(name) for name in _SCHEDULER_OPTIONS if name in options}
        config = EngineConfig(model=model, scheduler=SchedulerConfig(**limits), **options)
        self._start(config, on_progress)

    @classmethod
    def from_config(
        cls, config: EngineConfig, on_progress: Callable[[str], None] = lambda line: None
    ) -> "LLM":
        """Make one from a ready configuration."""
        llm = cls.__new__(cls)
        llm._start(config, on_progress)
        return llm

    def _start(self, config: EngineConfig, on_progress: Callable[[str], None]) -> None:
        self.engine = LLMEngine(config, on_progress)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
            prompts: One or several texts or lists of token ids.
            sampling_params: One for all, or one each.

        Returns:
            One finished output a prompt, in their order.

        Raises:
            RequestError: A prompt or its parameters are invalid; nothing has been generated then.
        """
        finished = {}
        for output in self.stream(prompts, sampling_params):
            if output.finished:
                finished[int(output.request_id)] = output
        return [finished[request_id] for request_id in sorted(finished)]

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one or several conversations, through the model's chat template.

        Args:
            messages: One conversation, or a list of them.
            sampling_params: One for all, or one each.
            tools: Functions that the model is told of; `engine.tool_calls` reads its calls.
            **template_options: As for `LLMEngine.chat_prompt`.

        Raises:
            RequestError: The model has no chat template, or a conversation is invalid.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [
            self.engine.chat_prompt(conversation, tools, **template_options)
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Complete prompts and yield an output for every new token of any of them.

        Leaving the iterator early aborts what is unfinished.

        Args:
            prompts: As for `generate`.
            sampling_params: As for `generate`.
        """
        listed = _as_list(prompts)
        params = _params_each(sampling_params, len(listed))
        request_ids: list[str] = []
        try:
            for prompt, own in zip(listed, params, strict=True):
                request_id = str(next(self._ids))
                self.engine.add_request(request_id, prompt, own)
                request_ids.append(request_id)
            unfinished = set(request_ids)
            while unfinished and self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    if output.request_id not in unfinished:
                        continue  # of a request that the caller added to the engine itself
                    if output.finished:
                        unfinished.remove(output.request_id)
                    yield output
        finally:
            for request_id in request_ids:
                self.engine.abort_request(request_id)

    def close(self) -> None:
        """Release threads and memory."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"give one SamplingParams, or one a prompt: {num_prompts} prompts, {len(params)} given"
        )
    return list(params)
