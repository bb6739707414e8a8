"""Decides what each step computes: which requests, how many tokens of each, whose blocks, where.

First come, first served. Decodes go first, so that running requests never wait for a prompt; what
is left of the token budget goes to prefill chunks. A request is wholly on the device or wholly on
the host. When device blocks run out, the request that came last moves to the host, or is preempted:
its blocks are freed and its tokens are computed again later. Plain Python, no torch.

Nobody starves. Device-resident rows decode in every step but the one in which they come from the
host, if there are others. A host-resident row whose prompt is done is computed at the latest after
`max_skipped_steps` (parked ones: `max_parked_steps`) and one more step for each other host-resident
row, since a due step computes at least the most overdue one; or it begins to rotate, and goes on in
every overlap step while those pay.
Prompts and waiting requests go in order of arrival, so only those that came first can hold them up.

This file keeps the state: the queue, who runs, who holds blocks. `step_former` chooses among the
steps that are possible, `offload_policy` says whether the host is worth using.
"""

import functools
import time
from bisect import insort
from collections.abc import Callable, Iterable, Sequence

from engine.cost_model import CostModel
from engine.kv_blocks import BlockPool
from engine.request import FinishReason, Placement, Request, RequestState
from engine.scheduling.lookahead import DeviceOutlook
from engine.scheduling.offload_policy import OffloadPolicy
from engine.scheduling.residency import Residency
from engine.scheduling.scheduler_config import SchedulerConfig
from engine.scheduling.step_former import StepFormer
from engine.scheduling.step_view import Choice, StepView
from engine.scheduling.swap_rules import SwapRules
from engine.step_plan import ScheduledRequest, StepPlan

__all__ = ["ScheduledRequest", "Scheduler", "SchedulerConfig", "StepPlan"]


class Scheduler:
    """Forms steps from waiting and running requests.

    Args:
        config: Limits of one step, and when the host is used.
        device_pool: The block accounting of device memory.
        host_pool: That of host memory; None keeps every request on the device.
        cost_model: Times of a step's parts.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        device_pool: BlockPool,
        host_pool: BlockPool | None,
        cost_model: CostModel,
    ) -> None:
        self.config = config
        host = None if config.mode == "gpu-only" else host_pool
        self.residency = Residency(device_pool, host)
        self.policy = OffloadPolicy(
            config, cost_model, device_pool.capacity_tokens, host.capacity_tokens if host else 0
        )
        self._rules = SwapRules(config, cost_model, self.residency, self.policy)
        self._former = StepFormer(config, cost_model)
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._num_added = 0
        self._num_steps = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks yet, or no longer."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks, on either side."""
        return len(self._running)

    @property
    def num_running_host(self) -> int:
        """Requests that hold blocks on the host."""
        return len(self._resident(Placement.HOST))

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        request.sequence = self._num_added
        self._num_added += 1
        self._waiting.append(request)

    def requests(self) -> Iterable[Request]:
        """Return every unfinished request, running ones first."""
        return [*self._running, *self._waiting]

    def plan_step(self) -> StepPlan:
        """Choose what the next step computes and reserve its blocks."""
        plan = StepPlan()
        self.residency.settle()
        self.policy.update(self._running, self._waiting)
        self._reserve_host_decodes(plan)
        self._reserve_device_decodes(plan)
        self._swap_in(plan)
        plan.moves_beside = bool(plan.swaps_in)
        choice = self._former.form(self._view(plan))
        if plan.moves_beside and choice.draft.is_empty:
            plan.moves_beside = False  # there is nothing else to do
            choice = self._former.form(self._view(plan))
        self._commit(plan, choice)
        self._num_steps += 1
        return plan

    def begin_step(self, plan: StepPlan) -> None:
        """Count a step as on its way, so that the next one can be planned before it is done."""
        plan.is_begun = True
        for row in plan.rotating:
            row.share.request.rotation_layer = None if row.samples else row.next_layer
        for item in plan.scheduled:
            item.request.num_computed_tokens = item.end
            item.request.num_pending_tokens += item.samples

    def complete_step(self, plan: StepPlan, token_ids: Sequence[int]) -> None:
        """Record what a step sampled.

        Args:
            plan: The step; begun here if it has not been.
            token_ids: The new tokens of `plan.sampling`.
        """
        if not plan.is_begun:
            self.begin_step(plan)
        for item, token_id in zip(plan.sampling, token_ids, strict=True):
            request = item.request
            request.num_pending_tokens -= 1
            if request.is_finished:
                continue  # ended while the step ran: the token is one too many
            request.append_token(token_id)
            if request.is_finished:
                self.release(request)

    def abandon_step(self, plan: StepPlan) -> None:
        """Give up a step that failed; nothing it computed or moved counts.

        Its requests' caches are in an unknown state. Those that the caller aborts, before or after,
        are gone; all others start again from their tokens. What the CPU has computed for rotating
        rows of other steps is void.
        """
        for request in self._running:
            request.rotation_layer = None
        if plan.is_begun:
            for item in plan.sampling:
                item.request.num_pending_tokens -= 1
        for request in sorted(plan.requests, key=_sequence):
            if request.state is RequestState.RUNNING:
                self._preempt(request)

    def release(self, request: Request) -> None:
        """Drop a finished request, wherever it stands, and free its blocks."""
        self.residency.drop(request)
        if request in self._running:
            if request.finish_reason is not FinishReason.ABORT:
                self.policy.observe_finished(request)
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def _resident(self, placement: Placement) -> list[Request]:
        return [request for request in self._running if request.placement is placement]

    def _last_resident(self, placement: Placement) -> Request:
        """Return who gives way; a request that only awaits its last token keeps its blocks."""
        return [r for r in self._resident(placement) if not r.awaits_last_token][-1]

    def _growing(self, placement: Placement) -> list[Request]:
        """Return the decodes whose next token needs another block.

        One that rotates has all its blocks since its token began.
        """
        needs_blocks = self.residency.needs_blocks
        return [
            request
            for request in self._resident(placement)
            if request.rotation_layer is None and _decodes(request) and needs_blocks(request)
        ]

    def _reserve_host_decodes(self, plan: StepPlan) -> None:
        """Reserve every host-resident row's next block; the last come give way to the first."""
        for request in self._growing(Placement.HOST):
            while request.state is RequestState.RUNNING and not self.residency.can_grow(request):
                victim = self._last_resident(Placement.HOST)
                self._preempt(victim)
                plan.preempted.append(victim)
            if request.state is RequestState.RUNNING:
                self.residency.grow(request)

    def _reserve_device_decodes(self, plan: StepPlan) -> None:
        """Reserve every device-resident row's next block; the last come give way to the first."""
        for request in self._growing(Placement.DEVICE):
            while _is_on_device(request) and not self.residency.can_grow(request):
                victim = self._last_resident(Placement.DEVICE)
                if self._rules.should_swap_out(victim):
                    plan.swaps_out.append(self.residency.swap_out(victim, self._num_steps))
                else:
                    self._preempt(victim)
                    plan.preempted.append(victim)
            if _is_on_device(request):
                self.residency.grow(request)

    def _swap_in(self, plan: StepPlan) -> None:
        """Bring a request back when the device comfortably holds it."""
        if self.residency.host is None or plan.swaps_out or plan.preempted:
            return
        if self.policy.offloads and self._waiting and not self.policy.target.rotates:
            return  # new prompts fill the device without a swap
        request = self._next_arrival() if self.residency.device.num_free else None
        if request is not None:
            plan.swaps_in.append(self.residency.swap_in(request, self._num_steps))

    def _next_arrival(self) -> Request | None:
        """Return who comes to the device, if anybody.

        Of a rotation, the longest prompt that fits: the CPU then has less to attend to, and few
        blocks are left over. Only those between two tokens may leave it: others would begin theirs
        again, and the device would have to wait until the CPU has left their blocks alone. All
        others come in order of arrival, and the first holds back the rest. Those that are parked
        come as soon as they might start there, so that nobody who came later starts before them.
        """
        rotates = self.policy.offloads and self.policy.target.rotates
        in_order = []
        for request in self._resident(Placement.HOST):
            if self._waiting and request.sequence > self._waiting[0].sequence:
                break
            if rotates and request.rotation_layer is not None:
                continue
            if not request.awaits_last_token and self._rules.fits_device(request):
                in_order.append(request)
        between = [request for request in in_order if request.rotation_layer is None]
        candidates = between if rotates else (between or in_order)[:1]
        looks = self.config.admission_lookahead and not self.policy.offloads
        outlook = self._outlooks(()) if looks else None
        num_on_device = len(self._resident(Placement.DEVICE))
        fitting = [
            request
            for request in candidates
            if self._rules.may_swap_in(request, num_on_device, self._num_steps, outlook)
        ]
        return max(fitting, key=lambda request: len(request.prompt_token_ids), default=None)

    def _view(self, plan: StepPlan) -> StepView:
        device, host = self.residency.device, self.residency.host
        on_device, on_host = self._resident(Placement.DEVICE), self._resident(Placement.HOST)
        patience = {request: self._rules.patience(request) for request in on_host}
        cdec = [
            request
            for request in on_host
            if (request.rotation_layer is not None or _decodes(request))
            and self._rules.may_decode_on_host(request, len(on_device), len(self._waiting))
        ]
        headroom = self.config.headroom_blocks
        parked = self._parked(on_host)
        kept = sum(device.blocks_for(request.num_tokens) + headroom for request in parked)
        target = self.policy.target.num_host if self.policy.offloads else 0
        needs_host = bool(self._waiting) and not self._rules.fits_device(self._waiting[0], 0)
        moved = sum(s.request.num_computed_tokens for s in plan.swaps_out + plan.swaps_in)
        arriving = {swap.request for swap in plan.swaps_in} if plan.moves_beside else set()
        return StepView(
            gdec=[r for r in on_device if _decodes(r) and r not in arriving],
            cdec=sorted(cdec, key=lambda r: (patience[r], r.sequence)),
            prefilling=[
                r
                for r in self._running
                if r.rotation_layer is None and r.num_uncomputed_tokens > 1 and r not in arriving
            ],
            waiting=self._waiting,
            num_running=len(self._running),
            device_free=max(0, device.num_free - kept),
            device_total=device.num_blocks,
            host_free=0 if host is None else max(0, host.num_free - headroom * len(on_host)),
            host_room=max(0, target - len(on_host)),
            block_size=device.block_size,
            can_admit=not self._running or not (plan.preempted or plan.swaps_out),
            swap_tokens=0 if arriving else moved,
            arriving_tokens=moved if arriving else 0,
            uses_host=host is not None and bool(on_host or target or needs_host),
            rotates=self.policy.target.rotates if self.policy.offloads else None,
            least_gain=1.0 if self.policy.offloads else self.config.min_offload_gain,
            is_due=min(patience.values(), default=1) <= 0,
            mean_load=functools.cache(lambda: self.policy.mean_load(self._running, self._waiting)),
            outlook=self._outlooks(parked) if self.config.admission_lookahead else None,
        )

    def _outlooks(self, parked: Sequence[Request]) -> Callable[[], DeviceOutlook]:
        """Return what makes a fresh outlook for each draft of this step, from one that is kept.

        Args:
            parked: Requests on the host that come back before others start.
        """
        device = self.residency.device

        @functools.cache
        def first() -> DeviceOutlook:
            on_device = self._resident(Placement.DEVICE)
            return DeviceOutlook(
                [*on_device, *parked],
                self.policy.mean_output,
                device.num_blocks,
                device.block_size,
                self._rules.steps_worth_eviction(on_device),
            )

        return lambda: first().copy()

    def _parked(self, on_host: Sequence[Request]) -> list[Request]:
        """Return who came before all that wait, and has only to wait for blocks of the device."""
        if self.policy.offloads or not self._waiting:
            return []
        first = self._waiting[0].sequence
        return [r for r in on_host if r.sequence < first and self._rules.fits_device(r)]

    def _commit(self, plan: StepPlan, choice: Choice) -> None:
        draft = choice.draft
        for request, placement in draft.admitted:
            self._start(request, placement)
        plan.mode, plan.sub_batches = draft.mode, draft.sub_batches
        plan.reason, plan.forced = choice.reason, choice.forced
        if not draft.is_empty:
            plan.prediction = draft.prediction
            plan.direct_share = draft.prediction.direct_share
        if choice.gpu_only is not None:
            plan.gpu_only_prediction = choice.gpu_only.prediction
        advanced = {item.request for item in plan.scheduled}
        rotating = {row.share.request for row in plan.rotating}
        for request in self._resident(Placement.HOST):
            skipped = request not in advanced and request not in rotating
            request.num_skipped_steps = request.num_skipped_steps + 1 if skipped else 0
            if request in advanced - rotating or (rotating and request not in rotating):
                request.rotation_layer = None  # computed in one go, or left behind

    def _start(self, request: Request, placement: Placement) -> None:
        """Give a waiting request all blocks of its known tokens, so that its prompt can finish."""
        self._waiting.remove(request)
        request.placement = placement
        self.residency.grow(request)
        request.state = RequestState.RUNNING
        if request.first_scheduled_time_s is None:
            request.first_scheduled_time_s = time.monotonic()
        insort(self._running, request, key=_sequence)

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self.residency.drop(request)
        request.state = RequestState.WAITING
        request.num_computed_tokens = 0
        request.num_skipped_steps = 0
        request.num_preemptions += 1
        insort(self._waiting, request, key=_sequence)


def _sequence(request: Request) -> int:
    return request.sequence


def _decodes(request: Request) -> bool:
    return request.num_uncomputed_tokens == 1 and not request.awaits_last_token


def _is_on_device(request: Request) -> bool:
    return request.state is RequestState.RUNNING and request.placement is Placement.DEVICE
