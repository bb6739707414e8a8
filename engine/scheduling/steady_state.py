"""How many tokens a second a mixture of requests decodes if it goes on like that for ever.

Device-resident requests decode in each step, and each decode token comes with its share of a
prompt. With and without host-resident requests beside them, the work is the same mixture, so the
rates compare fairly. Which of them the engine aims at is the policy's business.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import TypeVar

from engine.cost_model import CostModel, SubBatchLoad, predict, rotation_steps
from engine.graph_limits import TILE_ROWS
from engine.scheduling.dealing import dealt_loads, hidden_windows, one_load, prefix_sums
from engine.scheduling.scheduler_config import SchedulerConfig

_Result = TypeVar("_Result")
_LIKE = 1 / 16
"""Loads that differ by less are treated alike: looking closer takes milliseconds."""
_LEAST_PROMPTS = 0.9
FEW_TILES = (2, 4, 8)
"""Of `TILE_ROWS` rows each, in steps whose prompt tokens may cost less than in longer ones."""
_CLOSER = (1 / 3, 1 / 6, 1 / 12, 1 / 24)
"""Shares of the best power of two that are tried above and below it, one after the other."""


@dataclass(frozen=True, slots=True)
class MeanLoad:
    """What the engine has to do, on average: requests, and tokens of prompt and output of each."""

    num_requests: int
    prompt_tokens: float
    output_tokens: float

    @property
    def resident_tokens(self) -> int:
        """Tokens in the cache half way through."""
        return max(1, round(self.prompt_tokens + self.output_tokens / 2))

    def prompt_tokens_beside(self, num_decodes: float) -> float:
        """Return the prompt tokens that a step needs so that new requests replace those that end.

        A tenth less is no harm: requests are seldom at an end all at once.
        """
        return _LEAST_PROMPTS * num_decodes * self.prompt_tokens / self.output_tokens

    def small_budget(self, num_decodes: int, capacity: int, budget: int) -> int:
        """Return the fewest tokens of prompts with which new requests replace those that end.

        Rows of prompts cost least where decodes alone leave the device's arithmetic idle: the first
        tiles of each step.

        Args:
            num_decodes: In the step.
            capacity: How many there may be.
            budget: Tokens of prompts, at most.
        """
        least = self.prompt_tokens_beside(capacity)
        rooms = (tiles * TILE_ROWS - num_decodes for tiles in FEW_TILES)
        return next((room for room in rooms if least <= room < budget), budget)

    def is_like(self, other: "MeanLoad") -> bool:
        """Return whether the same decision will do for both."""
        pairs = (
            (self.num_requests, other.num_requests),
            (self.prompt_tokens, other.prompt_tokens),
            (self.output_tokens, other.output_tokens),
        )
        return all(abs(a - b) <= _LIKE * max(a, b) for a, b in pairs)


class SteadyState:
    """Rates of mixtures.

    Args:
        config: Limits.
        model: Times of the parts.
    """

    def __init__(self, config: SchedulerConfig, model: CostModel) -> None:
        self._config = config
        self._model = model

    def rate(self, load: MeanLoad, num_device: int, num_host: int) -> float:
        """Return decode tokens a second; 0 if it breaks the TPOT limit.

        Args:
            load: What requests are like.
            num_device: Requests on the device.
            num_host: Requests on the host, computed in one go.
        """
        num_decodes = num_device + num_host
        if num_decodes == 0:
            return 0.0

        def time(base: SubBatchLoad) -> float:
            return self._asymmetric_s(load, base, num_host)

        most, share = self._config.max_num_batched_tokens, num_host / num_decodes
        small = load.small_budget(num_decodes, num_decodes, most)
        step_s = min(
            self._step_s(load, num_device, num_decodes, share, time, budget)
            for budget in ({small, most} if num_host else {small})
        )
        # The baseline has no choice: the limit rules out hosts' shares only.
        if num_host and step_s > self._config.tpot_limit_s:
            return 0.0
        return num_decodes / step_s

    def _asymmetric_s(self, load: MeanLoad, base: SubBatchLoad, num_host: int) -> float:
        """Return the time of a step in one or two sub-batches, whichever is shorter."""
        prefix = prefix_sums([load.resident_tokens] * num_host)
        candidates = [one_load(base, prefix, num_host)]
        if num_host:
            deal = hidden_windows(self._model, base, prefix).deal(num_host)
            candidates.append(dealt_loads(base, prefix, deal))
        return min(predict(self._model, loads).step_s for loads in candidates)

    def decodes_pay(self, load: MeanLoad, num_device: int, num_host: int) -> bool:
        """Return whether steps without prompts decode more tokens a second with the host."""
        plain = SubBatchLoad(num_gdec=num_device, gdec_tokens=num_device * load.resident_tokens)
        without_s = self._asymmetric_s(load, plain, 0)
        with_s = self._asymmetric_s(load, plain, num_host)
        return (num_device + num_host) * without_s > num_device * with_s

    def rotating_rate(self, load: MeanLoad, num_device: int, num_host: int) -> float:
        """Return the same as `rate` where the requests on the host rotate.

        All requests start there and move to the device when it is their turn.
        """
        num_decodes = num_device + num_host / rotation_steps(self._model)
        arriving_tokens = round(num_decodes / load.output_tokens * load.resident_tokens)

        def time(base: SubBatchLoad) -> float:
            tokens = num_host * load.resident_tokens
            rotating = replace(base, num_rotating=num_host, rotating_tokens=tokens)
            return predict(self._model, [rotating], arriving_tokens=arriving_tokens).step_s

        # Prompts come in whichever steps are the better ones.
        most, rows = self._config.max_num_batched_tokens, math.ceil(num_decodes)
        step_s = min(
            self._step_s(load, num_device, num_decodes, 1.0, time, budget)
            for budget in {most, load.small_budget(rows, rows, most)}
        )
        if step_s * rotation_steps(self._model) > self._config.tpot_limit_s:
            return 0.0
        return num_decodes / step_s

    def _step_s(
        self,
        load: MeanLoad,
        num_device: int,
        num_decodes: float,
        host_share: float,
        time: Callable[[SubBatchLoad], float],
        most: int,
    ) -> float:
        """Return the mean time of the steady state's steps, with and without prompts.

        Prompts come one after the other, each in as few steps as the budget allows, so that most
        steps have none and are launched as a whole. If one takes several, what the host has of it
        comes back for each: half of it on average, wherever steps cut it.

        Args:
            load: What requests are like.
            num_device: Requests on the device.
            num_decodes: Tokens that a step decodes; each comes with its share of a prompt.
            host_share: Of the prompts, those that go to the host.
            time: Times a step, given without its host-resident decodes.
            most: Tokens of prompts that a step computes, unless it needs more.
        """
        prompt = max(1, round(load.prompt_tokens))
        prompts_per_step = num_decodes / load.output_tokens
        tokens_per_step = prompts_per_step * prompt
        chunk = max(min(prompt, most), round(tokens_per_step))
        share = min(1.0, tokens_per_step / chunk)
        plain = SubBatchLoad(num_gdec=num_device, gdec_tokens=num_device * load.resident_tokens)
        attention_s = self._model.prefill_attention_s(prompt, prompt)
        with_prompts = replace(
            plain,
            num_prefill_tokens=chunk,
            prefill_attention_s=attention_s * chunk / prompt,
            num_sampled_prefills=round(prompts_per_step / share),
            copy_out_tokens=round(host_share * chunk),
            copy_in_tokens=round(host_share * prompt / 2) if prompt > most else 0,
        )
        plain_s = time(plain) if share < 1 else 0.0
        return share * time(with_prompts) + (1 - share) * plain_s


def highest(rate: Callable[[int], float], most: int) -> Generator[None, None, tuple[float, int]]:
    """Find the highest rate of 1 to `most` requests, and where it is, to within a 24th.

    Of several summits it may be the second highest.

    Yields:
        Nothing, after each rate: they take a while to compute.

    Returns:
        Rate and number.
    """
    steps = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    best = (-math.inf, 0)
    for number in steps:
        best = max(best, (rate(number), number))
        yield
    for part in _CLOSER:
        middle = best[1]
        apart = max(1, round(middle * part))
        for number in {middle - apart, min(most, middle + apart)} - {0, middle}:
            best = max(best, (rate(number), number))
            yield
    return best


def result_of(search: Generator[None, None, _Result]) -> _Result:
    """Run a search to its end and return what it finds."""
    while True:
        try:
            next(search)
        except StopIteration as found:
            result: _Result = found.value
            return result
