"""The engine: requests go in, tokens and text come out, one step at a time."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.chat_messages import ChatMessage, check_template_options, template_messages
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.cost_tables import make_cost_model
from engine.detokenizer import IncrementalDetokenizer
from engine.errors import CheckpointError, RequestError, StepError
from engine.output_stream import OutputStream
from engine.outputs import RequestOutput
from engine.request import FinishReason, Request
from engine.runner import ModelRunner, StepResult
from engine.sampler import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.stats import EngineStats
from engine.step_log import StepLog
from engine.step_plan import StepPlan
from engine.structured_output import StructuredOutput
from engine.structured_output.compiler import GrammarCompiler
from engine.structured_output.matcher import GrammarMatcher

Prompt = str | Sequence[int]


class LLMEngine:
    """Serves requests by continuous batching, one `step` after the other. Not thread-safe.

    Args:
        config: The options.
        on_progress: Told what is going on while the engine starts, one line at a time.

    Raises:
        NeoError: The model, the options or the machine do not allow it; see `ModelRunner`.
    """

    def __init__(
        self, config: EngineConfig, on_progress: Callable[[str], None] = lambda line: None
    ) -> None:
        start = time.monotonic()
        self.config = config
        checkpoint = open_checkpoint(
            config.model,
            load_format=config.load_format,
            revision=config.revision,
            progress=lambda done, total: on_progress(
                f"converting the default model, once: {done} of {total} tensors"
            ),
        )
        self.model_name = checkpoint.name
        try:
            self.tokenizer: Any = checkpoint.load_tokenizer()
        except CheckpointError:
            if config.load_format != "dummy":
                raise
            self.tokenizer = None  # dummy weights say nothing; tokens in, tokens out
        self._runner = ModelRunner(config, checkpoint, on_progress)
        limits, host_pool = config.scheduler, self._runner.host_pool
        self._is_measured = host_pool is not None or limits.tpot_limit_ms is not None
        self._cost_model = make_cost_model(self._runner, on_progress, needed=self._is_measured)
        self._scheduler = Scheduler(limits, self._runner.pool, host_pool, self._cost_model)
        self._grammars = self._make_grammar_compiler()
        self._step_log = None if config.log_steps is None else StepLog(config.log_steps)
        self._streams: dict[str, OutputStream] = {}
        self._rng = random.Random(config.seed)
        self.stats = EngineStats(load_time_s=time.monotonic() - start)

    @property
    def runner(self) -> ModelRunner:
        """The model on its device."""
        return self._runner

    @property
    def scheduler(self) -> Scheduler:
        """The queue of requests."""
        return self._scheduler

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and output together."""
        return self._runner.max_model_len

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None
    ) -> None:
        """Queue a request.

        Args:
            request_id: Unique among unfinished requests.
            prompt: Text, or token ids.
            params: Sampling options; the default is `SamplingParams()`.

        Raises:
            RequestError: The id is taken, or the prompt is empty, too long or out of vocabulary,
                stop strings or a logit bias do not go with the model, or the structured output
                that is asked for is invalid.
        """
        if request_id in self._streams:
            raise RequestError(f"request id {request_id!r} is already in use")
        params = params or SamplingParams()
        token_ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        self._check_tokens(token_ids)
        self._check_bias(params)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the model folder has none")
        wanted = params.structured_output
        grammar = None if wanted is None else self.compile_grammar(wanted)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=params,
            max_total_tokens=self.max_model_len,
            eos_token_ids=self._runner.model_config.eos_token_ids,
            seed=self._rng.getrandbits(64) if params.seed is None else params.seed,
            grammar=grammar,
        )
        self._streams[request_id] = OutputStream(
            request=request,
            prompt=prompt if isinstance(prompt, str) else None,
            detokenizer=self._detokenizer(params),
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None else [None] * len(token_ids),
        )
        self._scheduler.add(request)

    def compile_grammar(self, wanted: StructuredOutput) -> GrammarMatcher:
        """Check a grammar and keep it compiled, so that requests for it start at once.

        Any thread may call it, also while a step runs: a large grammar takes a while.

        Raises:
            RequestError: The grammar is invalid, or there is no tokenizer.
        """
        if self._grammars is None:
            raise RequestError("structured output needs a tokenizer, and the model folder has none")
        return self._grammars.matcher(wanted)

    def _make_grammar_compiler(self) -> GrammarCompiler | None:
        if self.tokenizer is None:
            return None
        model = self._runner.model_config
        return GrammarCompiler(self.tokenizer, model.vocab_size, model.eos_token_ids)

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with the special tokens that the model puts around it.

        Raises:
            RequestError: The text is empty, or there is no tokenizer.
        """
        if self.tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer, and the model folder has none")
        if not text:
            raise RequestError("the prompt is empty; give at least one character")
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt is not valid text: a lone surrogate at character {error.start}"
            ) from error
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_prompt` works."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        vocab_size = self._runner.model_config.vocab_size
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        if max(token_ids) >= vocab_size or min(token_ids) < 0:
            raise RequestError(f"prompt token ids must be from 0 to {vocab_size - 1}")
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with a context of {self.max_model_len} "
                f"tokens it may have {self.max_model_len - 1}; shorten it or raise --max-model-len"
            )

    def _check_bias(self, params: SamplingParams) -> None:
        vocab_size = self._runner.model_config.vocab_size
        largest = max(params.logit_bias, default=0)
        if largest >= vocab_size:
            raise RequestError(
                f"logit_bias token ids must be from 0 to {vocab_size - 1}, got {largest}"
            )

    def _detokenizer(self, params: SamplingParams) -> IncrementalDetokenizer | None:
        if self.tokenizer is None:
            return None
        return IncrementalDetokenizer(
            self.tokenizer,
            stop=params.stop,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
            include_stop_str=params.include_stop_str_in_output,
        )

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] | None = None,
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
            raise RequestError("the model has no chat template; use --raw")
        check_template_options(template_options)
        options = {"add_generation_prompt": True, **template_options}
        conversation = template_messages(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tools=list(tools) if tools else None, tokenize=False, **options
            )
        except Exception as error:  # whatever the model's own template raises
            raise RequestError(f"the chat template refuses the messages: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def has_unfinished_requests(self) -> bool:
        """Return whether there is anything left to do."""
        return bool(self._streams)

    def step(self) -> list[RequestOutput]:
        """Run one step.

        Returns:
            One output for every request that got a token. If CPU attention fails, one for every
            request of the step, finished with `error` and the message as `stop_reason`. Any other
            error goes on after the step's requests were aborted.
        """
        plan = self._scheduler.plan_step()
        if plan.is_empty:
            return []
        if not self._is_measured:
            plan.prediction = plan.gpu_only_prediction = None
        try:
            result = self._runner.execute(plan)
        except StepError as error:
            return self._fail_step(plan, str(error))
        except BaseException:
            self._scheduler.abandon_step(plan)
            for request in plan.requests:
                self.abort_request(request.request_id)
            raise
        self._record(plan, result)
        for scores in result.prompt_scores:
            self._streams[scores.request_id].add_prompt_scores(scores)
        sampling = plan.sampling
        self._scheduler.complete_step(plan, result.sampled.token_ids)
        return [
            self._advance(self._streams[item.request.request_id], logprobs)
            for item, logprobs in zip(sampling, result.sampled.logprobs, strict=True)
        ]

    def _record(self, plan: StepPlan, result: StepResult) -> None:
        """Add a step to the statistics, the step log and the cost model's experience."""
        runner = self._runner
        host_pool = runner.host_pool
        self.stats.record(
            plan, result, runner.pool.num_used, host_pool.num_used if host_pool else 0
        )
        if self._step_log is not None:
            self._step_log.write(plan, result, runner, None)
        if plan.prediction is not None and not result.prompt_scores:  # no model of scoring's time
            self._cost_model.observe(plan.prediction, result.measurement)

    def _fail_step(self, plan: StepPlan, message: str) -> list[RequestOutput]:
        """End a failed step's requests with an error; the others and the engine go on."""
        self.stats.num_failed_steps += 1
        if self._step_log is not None:
            self._step_log.write(plan, None, self._runner, message)
        self._scheduler.abandon_step(plan)
        outputs = [
            self._end(request.request_id, FinishReason.ERROR, message) for request in plan.requests
        ]
        return [output for output in outputs if output is not None]

    def _advance(self, stream: OutputStream, logprobs: TokenLogprobs | None) -> RequestOutput:
        """Turn a request's newest token into text, and end the request at a stop string."""
        request, detokenizer = stream.request, stream.detokenizer
        if stream.logprobs is not None and logprobs is not None:
            stream.logprobs.append(logprobs)
        if detokenizer is not None:
            is_shown = not request.ends_with_stop_token or request.params.include_stop_str_in_output
            last = request.output_token_ids[-1]
            stream.new_text = detokenizer.append(last) if is_shown else ""
            if detokenizer.stop_string is not None:
                # Also when the length ended it in the same step: the text is cut at the string.
                request.finish(FinishReason.STOP, detokenizer.stop_string)
                self._scheduler.release(request)
            elif request.is_finished:
                stream.new_text += detokenizer.finish()
        output = stream.output()
        if request.is_finished:
            del self._streams[request.request_id]
        return output

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks.

        Returns:
            What it had produced; None if there is no such unfinished request.
        """
        return self._end(request_id, FinishReason.ABORT)

    def _end(
        self, request_id: str, reason: FinishReason, message: str | None = None
    ) -> RequestOutput | None:
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return None
        stream.request.finish(reason, message)
        self._scheduler.release(stream.request)
        if stream.detokenizer is not None:
            stream.new_text = stream.detokenizer.finish()
        return stream.output()

    def close(self) -> None:
        """Abort what is left and release threads and memory."""
        for request_id in list(self._streams):
            self.abort_request(request_id)
        self._runner.close()
        if self._step_log is not None:
            self._step_log.close()
