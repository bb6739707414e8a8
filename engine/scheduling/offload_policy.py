"""Whether the present load gains from the host, and how many requests should live there.

A step's rate says nothing about a queue: a GPU-only engine is as busy with two requests as with
two hundred waiting. So the policy compares steady states: as many device-resident requests as fit,
each decode token accompanied by its share of prompts, with and without H host-resident requests
beside them. Both sides do the same mixture of work, so decode tokens a second compare fairly, and H
itself is what the host's bandwidth can hide. Moving to the host happens only above a margin,
because lengths are guessed and predictions err. So does changing the way in which the host is used:
it takes different numbers of requests there, and a rotation is worth something only once it is
full, so steps that take whatever is best at the moment end up with the worst of both.

A rotation that no longer pays is not given up at once: prompts that are on the host already are
paid for, and the gain was less because of prompts. It only gets no more of them, as long as its
decodes alone are worth their hand-over.

A look at the load computes some thirty rates, which takes longer than a step of a fast GPU may be
planned for. So it goes on for several steps, unless the load is new.
"""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from engine.cost_model import CostModel, SubBatchLoad, predict, rotation_steps
from engine.request import Placement, Request
from engine.scheduling.scheduler_config import FORCED_MODES, SchedulerConfig
from engine.scheduling.steady_state import MeanLoad, SteadyState, highest, result_of

_NUM_SAMPLED_WAITING = 64
_MOST_REUSED = 8
"""Looks at a load after which the gain is computed again, because predictions are corrected."""
_CHANGE_GAIN = 1.1
"""What the other way of using the host must promise over the present one."""
_WHOLE_QUEUE_LOSS = 0.35
"""What a queue may lose of the steady state's gain if all of its requests go to the host and only
prompts beside them make that pay, less in proportion if fewer go: it is too short for a steady
state. Its prompts come first, which hide the host's work, then its decodes, which do not."""
_FILLING_LOSS = 5.0
"""What a queue loses of a rotation's gain, in what it does in the steps that fill one: it drains
again, too, and requests are moved. 1 to 5 in simulated queues of 100 to 400 requests, up to 6 where
the gain is many times as much."""
_RATES_A_STEP = 2
_MEMORY = 0.05
"""Weight of the newest finished request in the mean output length."""


@dataclass(frozen=True, slots=True)
class OffloadTarget:
    """Best number of host-resident requests, and throughput with them over that without.

    `rotates` says whether that takes overlap mode. `loss` is how much of the throughput may be lost
    again at the beginning and the end, because there are not more requests.
    """

    num_host: int
    gain: float
    rotates: bool = False
    loss: float = 0.0


class OffloadPolicy:
    """Follows the load and says whether new requests may go to the host.

    Args:
        config: Margins, limits and mode.
        model: Times of the parts.
        device_tokens: Capacity of the device pool.
        host_tokens: Capacity of the host pool, 0 without one.
    """

    def __init__(
        self, config: SchedulerConfig, model: CostModel, device_tokens: int, host_tokens: int
    ) -> None:
        self._config = config
        self._model = model
        self._steady = SteadyState(config, model)
        self._device_tokens = device_tokens
        self._host_tokens = host_tokens
        self._mean_output: float | None = None
        self._countdown = 0
        self._last_load: MeanLoad | None = None
        self._num_reused = 0
        self._look: Generator[None, None, OffloadTarget] | None = None
        self.offloads = config.mode in FORCED_MODES
        most = config.max_num_seqs if self.offloads else 0
        self.target = OffloadTarget(most, 1.0, rotates=config.mode == "overlap")

    def observe_finished(self, request: Request) -> None:
        """Learn how long outputs are."""
        length = float(len(request.output_token_ids))
        mean = self._mean_output
        self._mean_output = length if mean is None else mean + _MEMORY * (length - mean)

    @property
    def mean_output(self) -> float | None:
        """Mean output length of finished requests, in tokens; None before the first."""
        return self._mean_output

    def update(self, running: Sequence[Request], waiting: Sequence[Request]) -> None:
        """Look at the load now and then."""
        if self._config.mode != "auto" or self._host_tokens == 0:
            return
        self._countdown -= 1
        has_grown = self._has_grown(len(running) + len(waiting))
        if self._look is not None and not has_grown:
            self._go_on(running, _RATES_A_STEP)
            return
        if self._countdown >= 0 and not has_grown:
            return
        self._countdown = self._config.policy_interval_steps - 1
        if not running and not waiting:
            return
        load = self.mean_load(running, waiting)
        self._num_reused += 1
        if self._num_reused < _MOST_REUSED and self._last_load and load.is_like(self._last_load):
            return
        before = self._last_load
        self._num_reused, self._last_load = 0, load
        self._look = self._looks_for_target(load)
        is_new = before is None or has_grown or 2 * load.num_requests < before.num_requests
        self._go_on(running, math.inf if is_new else _RATES_A_STEP)

    def _go_on(self, running: Sequence[Request], most_rates: float) -> None:
        """Go on with a look at the load, and take what it finds."""
        look, num_rates = self._look, 0
        assert look is not None
        try:
            while num_rates < most_rates:
                next(look)
                num_rates += 1
        except StopIteration as found:
            self._look = None
            self._take(found.value, running)

    def _take(self, target: OffloadTarget, running: Sequence[Request]) -> None:
        rotates = self.offloads and self.target.rotates
        fills = self.offloads and self.target.num_host > 0
        self.target = target
        margin = max(self._config.min_offload_gain - 1, self.target.loss)
        self.offloads = self.target.gain >= 1 + (margin / 2 if fills else margin)
        if rotates and not self.offloads:
            self.target = self._emptying(running)
            self.offloads = self.target.gain > 1

    def _has_grown(self, num_requests: int) -> bool:
        """Return whether there are so many more requests that the next look should not wait."""
        return self._last_load is not None and num_requests > 2 * self._last_load.num_requests

    def mean_load(self, running: Sequence[Request], waiting: Sequence[Request]) -> MeanLoad:
        """Return what all requests, of which there must be some, are like."""
        known = [*running, *islice(waiting, _NUM_SAMPLED_WAITING)]
        output = _mean(self._expected_output(request) for request in known)
        prompt = _mean(len(request.prompt_token_ids) for request in known)
        return MeanLoad(len(running) + len(waiting), prompt, max(1.0, output))

    def _expected_output(self, request: Request) -> float:
        """Return how many tokens a request is expected to get; the first to end were short ones."""
        most, mean = request.max_new_tokens, self._mean_output
        return most if mean is None or request.params.ignore_eos else min(most, mean)

    def best_target(self, load: MeanLoad) -> OffloadTarget:
        """Return the number of host-resident requests with the highest steady-state throughput."""
        return result_of(self._looks_for_target(load))

    def _looks_for_target(self, load: MeanLoad) -> Generator[None, None, OffloadTarget]:
        """Do the same, rate by rate."""
        resident = load.resident_tokens
        demand = min(load.num_requests, self._config.max_num_seqs)
        num_device = min(demand, self._device_tokens // resident)
        most = min(demand - num_device, self._host_tokens // resident)
        if most < 1:
            return OffloadTarget(0, 1.0)
        baseline = self._steady.rate(load, num_device, 0)
        in_one_go = yield from highest(lambda n: self._steady.rate(load, num_device, n), most)
        rotating = yield from highest(
            lambda n: self._steady.rotating_rate(load, num_device, n), most
        )
        rotates = self._prefers_rotating(in_one_go[0], rotating[0])
        rate, num_host = rotating if rotates else in_one_go
        loss = self._loss(load, num_device, num_host, rotates)
        if num_host == demand - num_device:
            # All of them, also those that the device holds fewer of than their mean length says.
            num_host = self._config.max_num_seqs
        if baseline == 0.0:
            return OffloadTarget(num_host if rate else 1, float("inf"), rotates)
        return OffloadTarget(num_host, rate / baseline, rotates, loss)

    def _emptying(self, running: Sequence[Request]) -> OffloadTarget:
        """Return what a rotation is still worth that no more prompts are computed for.

        Those that it has are paid for, and would only be in the device's way.
        """
        on_host = [request for request in running if request.placement is Placement.HOST]
        host_tokens = sum(request.num_tokens for request in on_host)
        all_tokens = sum(request.num_tokens for request in running)
        num_device = max(1, len(running) - len(on_host))
        alone = SubBatchLoad(num_gdec=num_device, gdec_tokens=all_tokens - host_tokens)
        rotating = replace(alone, num_rotating=len(on_host), rotating_tokens=host_tokens)
        ratio = predict(self._model, [alone]).step_s / predict(self._model, [rotating]).step_s
        num_decodes = num_device + len(on_host) / rotation_steps(self._model)
        return OffloadTarget(0, num_decodes / num_device * ratio, rotates=True)

    def _loss(self, load: MeanLoad, num_device: int, num_host: int, rotates: bool) -> float:
        """Return what a queue of this length may lose of the steady state's gain."""
        if rotates:
            filling = rotation_steps(self._model)
            per_step = num_device + num_host / filling
            share = filling * per_step / (load.num_requests * load.output_tokens)
            return _FILLING_LOSS * share
        if self._steady.decodes_pay(load, num_device, num_host):
            return 0.0
        return _WHOLE_QUEUE_LOSS * min(num_host, load.num_requests) / load.num_requests

    def _prefers_rotating(self, in_one_go: float, rotating: float) -> bool:
        """Return which way of using the host to take, by what each promises."""
        if not self.offloads:
            return rotating > in_one_go
        if self.target.rotates:
            return rotating * _CHANGE_GAIN >= in_one_go
        return rotating > in_one_go * _CHANGE_GAIN


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return sum(items) / len(items)
