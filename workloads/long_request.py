"""One request that the device's pool cannot hold, beside what the CPU's attention alone takes."""

import time
from dataclasses import dataclass

from engine.llm_engine import LLMEngine
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRequest:
    """How a long request went.

    Args:
        num_prompt_tokens: Of its prompt.
        num_output_tokens: That it got.
        first_token_s: Until its first token.
        token_ms: Mean wall time of its other tokens.
        cpu_attention_ms: The CPU's attention in each of them.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    first_token_s: float
    token_ms: float
    cpu_attention_ms: float

    @property
    def attention_share(self) -> float:
        """Of a token's time, what the CPU's attention takes: 1 is as fast as that allows."""
        return self.cpu_attention_ms / self.token_ms


def measure_long_request(
    engine: LLMEngine, num_prompt_tokens: int, num_output_tokens: int
) -> LongRequest:
    """Serve one request alone.

    Args:
        engine: Idle.
        num_prompt_tokens: Of its prompt; the tokens say nothing.
        num_output_tokens: At least 2.

    Raises:
        RequestError: The request is too long for the engine.
        RuntimeError: It failed.
    """
    vocab_size, stats = engine.runner.model_config.vocab_size, engine.stats
    prompt = [(31 * i) % (vocab_size - 8) + 4 for i in range(num_prompt_tokens)]
    params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
    start_s = first_s = time.perf_counter()
    before_s, num_tokens = stats.cpu_attention_time_s, 0
    engine.add_request("long", prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            [answer] = output.outputs
            num_tokens = len(answer.token_ids)
            if answer.finish_reason == "error":
                raise RuntimeError(f"the long request failed: {answer.stop_reason}")
            if num_tokens == 1:
                first_s, before_s = time.perf_counter(), stats.cpu_attention_time_s
    num_others = num_tokens - 1
    return LongRequest(
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_tokens,
        first_token_s=first_s - start_s,
        token_ms=(time.perf_counter() - first_s) / num_others * 1e3,
        cpu_attention_ms=(stats.cpu_attention_time_s - before_s) / num_others * 1e3,
    )
