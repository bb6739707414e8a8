"""When a request moves between the pools, and how long one on the host may be left out.

Requests are on the host for one of three reasons: offloading pays; they can never fit the device;
or they are parked: the device ran out of blocks, and moving was cheaper than computing again.
"""

import math
from collections.abc import Callable, Sequence

from engine.cost_model import CostModel, SubBatchLoad, predict
from engine.request import Request
from engine.scheduling.lookahead import DeviceOutlook
from engine.scheduling.offload_policy import OffloadPolicy
from engine.scheduling.residency import Residency
from engine.scheduling.scheduler_config import SchedulerConfig


class SwapRules:
    """Decides; changes nothing.

    Args:
        config: Headroom, cool-down and patience.
        model: Times of the parts.
        residency: The pools.
        policy: Whether offloading pays.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        model: CostModel,
        residency: Residency,
        policy: OffloadPolicy,
    ) -> None:
        self._config = config
        self._model = model
        self._residency = residency
        self._policy = policy

    def should_swap_out(self, victim: Request) -> bool:
        """Return whether the host has room, and moving costs less than computing again."""
        num_tokens = victim.num_computed_tokens
        if num_tokens == 0 or not self._residency.host_can_take(victim):
            return False
        if self._policy.offloads or not self.fits_device(victim, headroom=0):
            return True
        return 2 * self._model.swap_s(num_tokens) < self._prefill_s(num_tokens)

    def steps_worth_eviction(self, on_device: Sequence[Request]) -> float:
        """Return how many tokens of one request are worth an eviction, of which a step has one.

        All requests there would decode so many together in the time that the eviction takes.

        Args:
            on_device: Those that decode there.
        """
        if not on_device:
            return math.inf
        num_tokens = sum(request.num_tokens for request in on_device)
        mean = num_tokens // len(on_device)
        eviction_s = self._prefill_s(mean)
        if self._residency.host_has_room(mean):
            eviction_s = min(eviction_s, 2 * self._model.swap_s(mean))
        load = SubBatchLoad(num_gdec=len(on_device), gdec_tokens=num_tokens)
        return eviction_s / predict(self._model, [load]).step_s * len(on_device)

    def may_swap_in(
        self,
        request: Request,
        num_on_device: int,
        step: int,
        outlook: Callable[[], DeviceOutlook] | None,
    ) -> bool:
        """Return whether the device comfortably holds a host-resident request now.

        Args:
            request: The request.
            num_on_device: Requests there.
            step: The number of this one.
            outlook: Makes a look at what the device will hold; None: every request there should
                have some blocks to grow.
        """
        device, last = self._residency.device, request.last_swap_step
        has_cooled_down = last is None or step - last > self._config.swap_cooldown_steps
        if not has_cooled_down or request.num_computed_tokens == 0:
            return False
        num_blocks = device.blocks_for(request.num_tokens)
        if outlook is None:
            num_blocks += self._config.headroom_blocks * (num_on_device + 1)
        fits = num_blocks <= device.num_free
        return fits and (outlook is None or outlook().admit(request))

    def fits_device(self, request: Request, headroom: int | None = None) -> bool:
        """Return whether the device could ever hold a request, with room to grow."""
        device = self._residency.device
        extra = self._config.headroom_blocks if headroom is None else headroom
        return device.blocks_for(request.num_tokens) + extra <= device.num_blocks

    def is_parked(self, request: Request) -> bool:
        """Return whether a host-resident request only waits there for the device."""
        return not self._policy.offloads and self.fits_device(request)

    def may_decode_on_host(self, request: Request, num_on_device: int, num_waiting: int) -> bool:
        """Return whether a step may compute a host-resident row.

        Not one that is parked while others wait: where offloading does not pay in the long run, a
        step that would gain by it now only keeps the device's blocks taken for longer.
        """
        is_alone = num_on_device == 0 or num_waiting == 0
        return is_alone or not self.is_parked(request) or self.patience(request) <= 0

    def patience(self, request: Request) -> int:
        """Return how many more steps may leave a host-resident request out."""
        config, parked = self._config, self.is_parked(request)
        limit = config.max_parked_steps if parked else config.max_skipped_steps
        return limit - request.num_skipped_steps

    def _prefill_s(self, num_tokens: int) -> float:
        layer_s = self._model.linear_s(num_tokens)
        layer_s += self._model.prefill_attention_s(num_tokens, num_tokens)
        return layer_s * self._model.num_layers
