"""Serves a workload in simulated time.

The scheduler, the block accounting and the request are the engine's own; a step takes as long as
its plan's prediction says. Whatever modes the scheduler knows are therefore simulated as they are.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.cost_model import CostModel
from engine.errors import StepError
from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.step_plan import StepMode, StepPlan
from workloads.records import RequestRecord
from workloads.request import WorkloadRequest
from workloads.simulation.time_shares import TimeShares

OnStep = Callable[[StepPlan, float, "Simulator"], None]


@dataclass(slots=True, kw_only=True)
class Simulation:
    """What a simulated run did.

    `shares` says where the time of its steps went; `modes` counts steps.
    """

    records: list[RequestRecord]
    requests: list[Request] = field(default_factory=list)
    duration_s: float = 0.0
    num_steps: int = 0
    modes: Counter[StepMode] = field(default_factory=Counter)
    num_preemptions: int = 0
    num_swaps: int = 0
    peak_device_blocks: int = 0
    peak_host_blocks: int = 0
    shares: TimeShares = field(default_factory=TimeShares)

    @property
    def num_finished(self) -> int:
        """Requests that were answered in full."""
        return sum(record.completed for record in self.records)

    @property
    def requests_per_s(self) -> float:
        """Finished requests over the whole time."""
        return self.num_finished / self.duration_s


class Simulator:
    """A machine that serves one workload after the other.

    Args:
        cost_model: How long steps take; the scheduler decides by it, and it is right.
        config: The scheduler's options.
        device_blocks: KV blocks of the device.
        host_blocks: KV blocks of the host; 0 for none.
        block_size: Tokens of a block.
        max_model_len: Most tokens of a request; None is what the larger pool holds.
    """

    def __init__(
        self,
        cost_model: CostModel,
        config: SchedulerConfig,
        *,
        device_blocks: int,
        host_blocks: int,
        block_size: int = 16,
        max_model_len: int | None = None,
    ) -> None:
        self.cost_model = cost_model
        self.config = config
        self.device_pool = BlockPool(device_blocks, block_size)
        self.host_pool = BlockPool(host_blocks, block_size) if host_blocks else None
        uses_host = self.host_pool is not None and config.mode != "gpu-only"
        largest = max(device_blocks, host_blocks if uses_host else 0) * block_size
        self.max_model_len = min(largest, max_model_len or largest)

    def run(
        self,
        requests: Sequence[WorkloadRequest],
        arrivals: Sequence[float] | None = None,
        *,
        max_concurrency: int | None = None,
        on_step: OnStep | None = None,
        on_finished: Callable[[int], None] = lambda count: None,
    ) -> Simulation:
        """Serve requests.

        Args:
            requests: Their lengths are what counts.
            arrivals: When each arrives, in seconds, rising; None: all at once.
            max_concurrency: Most requests that are under way at once.
            on_step: Called with every plan and the time at which it starts, before it is completed.
            on_finished: Called with how many requests are done, now and then.

        Raises:
            StepError: The scheduler has requests but nothing to do, which is a bug in NEO.
        """
        times = list(arrivals) if arrivals is not None else [0.0] * len(requests)
        records = [
            RequestRecord(
                num_prompt_tokens=request.num_prompt_tokens,
                wanted_output_tokens=request.num_output_tokens,
                scheduled_s=time,
            )
            for request, time in zip(requests, times, strict=True)
        ]
        simulation = Simulation(records=records)
        scheduler = Scheduler(self.config, self.device_pool, self.host_pool, self.cost_model)
        most = max_concurrency or len(records)
        now, next_index, num_active = 0.0, 0, 0
        while next_index < len(records) or num_active:
            while next_index < len(records) and times[next_index] <= now and num_active < most:
                num_active += self._add(scheduler, simulation, next_index, now)
                next_index += 1
            plan = scheduler.plan_step()
            if plan.is_empty:
                if next_index == len(records) or num_active >= most:
                    if num_active:
                        raise StepError("the scheduler found nothing to do for waiting requests")
                    break
                now = max(now, times[next_index])
                continue
            if on_step is not None:
                on_step(plan, now, self)
            now += self._count(plan, simulation)
            num_active -= _complete(scheduler, plan, simulation, now)
            on_finished(next_index - num_active)
        simulation.duration_s = now
        return simulation

    def _add(self, scheduler: Scheduler, simulation: Simulation, index: int, now: float) -> bool:
        """Queue a request; one that is too long fails, as in the engine, and is not queued."""
        record = simulation.records[index]
        # The client sends it when it arrives; the engine sees it between two steps.
        record.start_s = record.scheduled_s
        total = record.num_prompt_tokens + record.wanted_output_tokens
        request = Request(
            request_id=str(index),
            prompt_token_ids=[0] * record.num_prompt_tokens,
            params=SamplingParams(
                max_tokens=record.wanted_output_tokens,
                min_tokens=record.wanted_output_tokens,
                ignore_eos=True,
            ),
            max_total_tokens=self.max_model_len,
            arrival_time_s=now,
        )
        simulation.requests.append(request)
        if total > self.max_model_len:
            record.error = f"longer than the longest request of {self.max_model_len} tokens"
            return False
        scheduler.add(request)
        return True

    def _count(self, plan: StepPlan, simulation: Simulation) -> float:
        """Add a step to the totals and return how long it takes."""
        assert plan.prediction is not None, "every step that computes something is predicted"
        simulation.num_steps += 1
        simulation.modes[plan.mode] += 1
        simulation.num_preemptions += len(plan.preempted)
        simulation.num_swaps += len(plan.swaps_in) + len(plan.swaps_out)
        simulation.peak_device_blocks = max(
            simulation.peak_device_blocks, self.device_pool.num_used
        )
        if self.host_pool is not None:
            simulation.peak_host_blocks = max(simulation.peak_host_blocks, self.host_pool.num_used)
        simulation.shares.add(plan, self.cost_model)
        return plan.prediction.step_s


def _complete(scheduler: Scheduler, plan: StepPlan, simulation: Simulation, now: float) -> int:
    """Give every sampling request its token and return how many have ended."""
    sampling = plan.sampling
    scheduler.complete_step(plan, [0] * len(sampling))
    num_ended = 0
    for item in sampling:
        record = simulation.records[int(item.request.request_id)]
        record.token_times_s.append(now)
        record.num_output_tokens += 1
        if item.request.is_finished:
            record.end_s = now
            num_ended += 1
    return num_ended
