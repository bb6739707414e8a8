"""The engine: requests go in, tokens and text come out, one step at a time."""

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.chat_messages import ChatMessage
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.cost_tables import make_cost_model
from engine.detokenizer import IncrementalDetokenizer
from engine.errors import RequestError, StepError
from engine.output_stream import OutputStream
from engine.outputs import RequestOutput
from engine.prompt_encoder import load_prompt_encoder
from engine.request import FinishReason, Request
from engine.request_limits import RequestLimits
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.stats import EngineStats
from engine.step_in_flight import StepInFlight, StepResult
from engine.step_log import StepLog, StepObserver
from engine.step_plan import StepPlan
from engine.structured_output import StructuredOutput
from engine.structured_output.compiler import GrammarCompiler
from engine.structured_output.matcher import GrammarMatcher
from engine.token_logprobs import TokenLogprobs

_News = tuple[Request, TokenLogprobs | None]
"""A request that got a token, and the token's log-probabilities if they were asked for."""

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
        # First: a path that cannot be written is told before the model has been loaded.
        self._step_log = None if config.log_steps is None else StepLog(config.log_steps)
        checkpoint = open_checkpoint(
            config.model,
            load_format=config.load_format,
            revision=config.revision,
            progress=lambda done, total: on_progress(
                f"converting the default model, once: {done} of {total} tensors"
            ),
        )
        self.model_name = checkpoint.name
        self.prompt_encoder = load_prompt_encoder(checkpoint, config.load_format)
        self.tokenizer: Any = self.prompt_encoder.tokenizer
        self._runner = ModelRunner(config, checkpoint, on_progress)
        self.limits = RequestLimits(
            vocab_size=self._runner.model_config.vocab_size,
            max_model_len=self._runner.max_model_len,
            has_tokenizer=self.tokenizer is not None,
        )
        limits, host_pool = config.scheduler, self._runner.host_pool
        self._is_measured = host_pool is not None or limits.tpot_limit_ms is not None
        self._cost_model = make_cost_model(
            self._runner, on_progress, needed=self._is_measured, direct=config.pcie_attention
        )
        self._runner.capture_graphs(on_progress)
        self._scheduler = Scheduler(limits, self._runner.pool, host_pool, self._cost_model)
        self._grammars = self._make_grammar_compiler()
        self._step_observers: list[StepObserver] = []
        if self._step_log is not None:
            self._step_observers.append(self._step_log.write)
        self._streams: dict[str, OutputStream] = {}
        self._in_flight: StepInFlight | None = None
        # What `step` has to tell of; an error in between does not lose it.
        self._news: list[_News] = []
        self._failed: list[RequestOutput] = []
        ahead = config.async_scheduling
        self._goes_ahead = self._runner.runs_behind if ahead is None else ahead
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
        return self.limits.max_model_len

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
        self.limits.check(token_ids, params)
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
        """Return the tokens of a text; see `PromptEncoder.tokenize`."""
        return self.prompt_encoder.tokenize(text)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_prompt` works."""
        return self.prompt_encoder.has_chat_template

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
        /,
        **template_options: Any,
    ) -> list[int]:
        """Return the tokens of a conversation; see `PromptEncoder.chat_prompt`."""
        return self.prompt_encoder.chat_prompt(messages, tools, **template_options)

    def observe_steps(self, observer: StepObserver) -> None:
        """Have `observer` called with every step, right after it was measured or failed."""
        self._step_observers.append(observer)

    def has_unfinished_requests(self) -> bool:
        """Return whether there is anything left to do, if only to take in a step that runs."""
        return bool(self._streams or self._failed) or self._in_flight is not None

    def has_request(self, request_id: str) -> bool:
        """Return whether there is such an unfinished request."""
        return request_id in self._streams

    def step(self) -> list[RequestOutput]:
        """Launch a step, and finish the one before it, or the same where nothing is gained by that.

        Returns:
            One output for every request that got a token in the step that was finished; none where
            the first step was launched. If CPU attention fails, one for every request of the step,
            finished with `error` and the message as `stop_reason`. Any other error goes on after
            the step's requests were aborted.
        """
        before = self._in_flight
        if before is not None and not before.lets_next_go_ahead:
            self._in_flight = None
            self._collect(before)
            before = None
        self._in_flight = self._launch_next()
        if before is not None:
            self._collect(before)
        elif self._in_flight is not None and not self._goes_ahead:
            launched, self._in_flight = self._in_flight, None
            self._collect(launched)
        # Last, because the device works meanwhile. A stop string that is found now may come after
        # one more token was begun; that one is dropped.
        news, self._news = self._news, []
        outputs, self._failed = self._failed, []
        streams = [(self._streams.get(request.request_id), entry) for request, entry in news]
        return outputs + [self._advance(stream, entry) for stream, entry in streams if stream]

    def _launch_next(self) -> StepInFlight | None:
        """Plan a step and give it to the device; None if there is nothing to do or it failed."""
        plan = self._scheduler.plan_step()
        if plan.is_empty:
            self._runner.move(plan)  # somebody may have had to give way, with nothing else to do
            return None
        if not self._is_measured:
            plan.prediction = plan.gpu_only_prediction = None
        try:
            launched = self._runner.launch(plan)
        except StepError as error:
            self._fail_step(plan, str(error))
            return None
        except BaseException:
            self._abandon(plan)
            raise
        self._scheduler.begin_step(plan)
        return launched

    def _collect(self, step: StepInFlight) -> None:
        """Wait for a step and take its tokens, to be told of when `step` returns."""
        plan = step.plan
        try:
            result = self._runner.finish(step)
        except StepError as error:
            self._fail_step(plan, str(error))
            return
        except BaseException:
            self._abandon(plan)
            raise
        self._record(step, result)
        for scores in step.prompt_scores:
            stream = self._streams.get(scores.request_id)
            if stream is not None:
                stream.add_prompt_scores(scores)
        live = [not item.request.is_finished for item in plan.sampling]
        self._scheduler.complete_step(plan, result.sampled.token_ids)
        for item, logprobs, is_live in zip(
            plan.sampling, result.sampled.logprobs, live, strict=True
        ):
            if is_live:
                self._news.append((item.request, logprobs))

    def _abandon(self, plan: StepPlan) -> None:
        """Give up a step after an error that is nobody's fault but ours, or an interruption."""
        self._scheduler.abandon_step(plan)
        for request in plan.requests:
            self.abort_request(request.request_id)

    def _record(self, step: StepInFlight, result: StepResult) -> None:
        """Add a step to the statistics, the step log and the cost model's experience."""
        plan, runner = step.plan, self._runner
        host_pool = runner.host_pool
        self.stats.record(
            plan, result, runner.pool.num_used, host_pool.num_used if host_pool else 0
        )
        for observe in self._step_observers:
            observe(plan, result, runner, None)
        # There is no model of scoring's time, nor of a capture's, which also keeps us from seeing
        # that the step before is done.
        after = self._in_flight
        is_usual = not (step.prompt_scores or step.captured or (after and after.captured))
        if plan.prediction is not None and is_usual:
            self._cost_model.observe(plan.prediction, result.measurement)

    def _fail_step(self, plan: StepPlan, message: str) -> None:
        """End a failed step's requests with an error; the others and the engine go on."""
        self.stats.num_failed_steps += 1
        for observe in self._step_observers:
            observe(plan, None, self._runner, message)
        self._scheduler.abandon_step(plan)
        outputs = [
            self._end(request.request_id, FinishReason.ERROR, message) for request in plan.requests
        ]
        self._failed += [output for output in outputs if output is not None]

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
        if self._in_flight is not None:
            with contextlib.suppress(StepError):
                self._runner.finish(self._in_flight)
            self._in_flight = None
        self._runner.close()
        if self._step_log is not None:
            self._step_log.close()
