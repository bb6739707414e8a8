"""What a request has produced so far: its text and log-probabilities beside its tokens."""

from dataclasses import dataclass

from engine.detokenizer import IncrementalDetokenizer
from engine.outputs import CompletionOutput, RequestOutput, request_metrics
from engine.prompt_scoring import PromptScores
from engine.request import Request
from engine.token_logprobs import TokenLogprobs


@dataclass(slots=True)
class OutputStream:
    """What a request has produced beyond its tokens."""

    request: Request
    prompt: str | None
    detokenizer: IncrementalDetokenizer | None
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    new_text: str = ""

    def add_prompt_scores(self, scores: PromptScores) -> None:
        """Note log-probabilities of some prompt tokens."""
        assert self.prompt_logprobs is not None, "only requests that want scores get them"
        end = scores.start + len(scores.logprobs)
        self.prompt_logprobs[scores.start : end] = scores.logprobs

    def output(self) -> RequestOutput:
        """Return the state of the request as it is now."""
        request = self.request
        reason = request.finish_reason
        logprobs = self.logprobs
        completion = CompletionOutput(
            text=self.detokenizer.text if self.detokenizer else "",
            new_text=self.new_text,
            token_ids=list(request.output_token_ids),
            logprobs=None if logprobs is None else list(logprobs),
            cumulative_logprob=None if logprobs is None else sum(p.logprob for p in logprobs),
            finish_reason=reason.value if reason else None,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[completion],
            finished=request.is_finished,
            metrics=request_metrics(request),
        )
