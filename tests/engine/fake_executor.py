"""Stands for the model, the two memories and the clock: what is in which block, and what if not."""

from collections import Counter
from collections.abc import Sequence

from engine.cost_model import CostModel, load_of, predict, rotation_steps
from engine.kv_blocks import BlockPool
from engine.request import Placement, Request, RequestState
from engine.scheduling.scheduler import Scheduler, SchedulerConfig
from engine.step_plan import StepMode, StepPlan, Swap

Block = tuple[Placement, int]
Content = tuple[str, int, int]
"""Whose tokens, the how-manieth block of them, how many tokens."""


class FakeExecutor:
    """Checks a plan against both memories and computes it.

    The token sampled at position `p` is `p`, and it must not matter how often it is computed.
    """

    def __init__(
        self,
        limits: SchedulerConfig,
        device: BlockPool,
        host: BlockPool | None,
        cost_model: CostModel,
    ) -> None:
        self.limits = limits
        self.pools = {Placement.DEVICE: device, Placement.HOST: host}
        self.cost_model = cost_model
        self.time_s = 0.0
        self.memory: dict[Block, Content] = {}
        self.arrivals: list[Swap] = []
        """Blocks that move beside the step before, as late as they may."""
        self.rotation: dict[Request, int] = {}
        """Layers whose attention the CPU has computed since the last overlap step."""

    def execute(self, plan: StepPlan) -> list[int]:
        self.check_rows(plan)
        self.check_prediction(plan)
        assert not (plan.swaps_out and plan.swaps_in)
        scheduled = {item.request for item in plan.scheduled}
        for request in plan.preempted:
            assert (request.state is RequestState.RUNNING) == (request in scheduled)
            assert request.num_computed_tokens == 0
        self.move_blocks(plan)
        for sub_batch in plan.sub_batches:
            for item in sub_batch.scheduled:
                self.compute(item)
        self.rotate(plan)
        assert plan.prediction is not None
        self.time_s += plan.prediction.step_s
        return [item.end for item in plan.sampling]

    def move_blocks(self, plan: StepPlan) -> None:
        for swap in self.arrivals:
            self.copy(swap.host_blocks, Placement.HOST, swap.device_blocks, Placement.DEVICE)
        self.arrivals = []
        for swap in plan.swaps_out:
            self.check_swap(swap, Placement.HOST)
            self.copy(swap.device_blocks, Placement.DEVICE, swap.host_blocks, Placement.HOST)
        for swap in plan.swaps_in:
            self.check_swap(swap, Placement.DEVICE)
        if plan.moves_beside:
            self.arrivals = plan.swaps_in
            return
        for swap in plan.swaps_in:
            self.copy(swap.host_blocks, Placement.HOST, swap.device_blocks, Placement.DEVICE)

    def check_rows(self, plan: StepPlan) -> None:
        resident = [item for s in plan.sub_batches for item in s.resident]
        scheduled = resident + [row.share for row in plan.rotating]
        requests = {item.request for item in scheduled}
        assert len(requests) == len(scheduled) <= self.limits.max_num_seqs
        restarted = set(plan.preempted) & requests
        assert not restarted or all(item.start == 0 for item in scheduled)
        most_rotating = max(Counter(row.next_layer for row in plan.rotating).values(), default=0)
        num_tokens = sum(item.num_tokens for item in resident) + most_rotating
        assert 0 < num_tokens <= self.limits.max_num_batched_tokens
        for sub_batch in plan.sub_batches:
            assert not sub_batch.is_empty
            assert all(item.num_tokens == 1 for item in sub_batch.gdec + sub_batch.cdec)
            for item in sub_batch.gdec + sub_batch.gprf:
                assert item.request.placement is Placement.DEVICE
            for item in sub_batch.cdec + sub_batch.cprf:
                assert item.request.placement is Placement.HOST
        host_rows = any(s.cdec or s.cprf for s in plan.sub_batches)
        if plan.mode is StepMode.OVERLAP:
            assert not any(s.cdec for s in plan.sub_batches)
            assert len(plan.sub_batches) == 1
            assert plan.rotating or host_rows or self.limits.mode == "overlap"
        else:
            assert not plan.rotating
            assert (plan.mode is StepMode.ASYMMETRIC) == host_rows
        assert self.limits.mode != "overlap" or plan.mode is not StepMode.ASYMMETRIC
        assert self.limits.mode != "asymmetric" or plan.mode is not StepMode.OVERLAP
        assert len(plan.sub_batches) <= (2 if host_rows else 1)
        assert not any(s.gdec or s.gprf or s.cprf for s in plan.sub_batches[1:])

    def check_prediction(self, plan: StepPlan) -> None:
        """What the scheduler predicted is what the plan's rows cost, and it chose the better."""
        assert plan.prediction is not None
        loads = [load_of(self.cost_model, sub_batch) for sub_batch in plan.sub_batches]
        again = predict(self.cost_model, loads, **moved_tokens(plan))
        assert abs(again.step_s - plan.prediction.step_s) <= 1e-9 * again.step_s
        baseline, limit_s = plan.gpu_only_prediction, self.limits.tpot_limit_s
        if baseline is None or self.limits.mode in ("asymmetric", "overlap") or plan.forced:
            return
        steps = rotation_steps(self.cost_model) if plan.rotating else 1
        if plan.prediction.step_s * steps > limit_s and (plan.num_decodes or plan.rotating):
            assert baseline.step_s > limit_s
        # A rotation that only begins or is not full yet is chosen for what it will be.
        if baseline.step_s <= limit_s and plan.mode is not StepMode.OVERLAP:
            assert plan.prediction.tokens_per_s >= baseline.tokens_per_s * (1 - 1e-9)

    def check_swap(self, swap: Swap, target: Placement) -> None:
        blocks, request = _blocks(swap), swap.request
        assert request.placement is target
        assert request.state is RequestState.RUNNING
        pool = self.pools[target]
        assert pool is not None
        num_blocks = pool.blocks_for(request.num_computed_tokens)
        assert num_blocks == len(swap.device_blocks) == len(swap.host_blocks) > 0
        assert tuple(pool.block_table(request.request_id)[:num_blocks]) == blocks[target]

    def copy(
        self, old: Sequence[int], source: Placement, new: Sequence[int], target: Placement
    ) -> None:
        for old_block, new_block in zip(old, new, strict=True):
            self.memory[target, new_block] = self.memory.pop((source, old_block))

    def rotate(self, plan: StepPlan) -> None:
        """Every row goes on where the last overlap step left it, with its place in the cache."""
        host = self.pools[Placement.HOST]
        before, self.rotation = self.rotation, {} if plan.rotating else self.rotation
        for row in plan.rotating:
            request = row.share.request
            assert request.placement is Placement.HOST
            assert row.layer is None or row.layer == before[request]
            assert row.samples == (row.next_layer == self.cost_model.num_layers)
            assert host is not None
            assert len(host.block_table(request.request_id)) * host.block_size >= row.share.end
            if not row.samples:
                assert row.share.start == request.num_computed_tokens
                self.rotation[request] = row.next_layer

    def compute(self, item) -> None:
        """Every earlier token must be in its place; the new ones follow without a gap."""
        request, placement = item.request, item.request.placement
        pool = self.pools[placement]
        table = pool.block_table(request.request_id)
        size = pool.block_size
        assert request not in {swap.request for swap in self.arrivals}
        moving = {block for swap in self.arrivals for block in _blocks(swap)[placement]}
        assert not moving.intersection(table), "a block that moves is in use"
        assert item.start == request.num_computed_tokens
        assert item.num_tokens >= 1
        assert item.end <= request.num_tokens
        assert len(table) * size >= item.end
        for index in range(pool.blocks_for(item.start)):
            filled = min(size, item.start - index * size)
            assert self.memory[placement, table[index]] == (request.request_id, index, filled)
        for index in range(item.start // size, pool.blocks_for(item.end)):
            filled = min(size, item.end - index * size)
            self.memory[placement, table[index]] = (request.request_id, index, filled)


def moved_tokens(plan: StepPlan) -> dict[str, int]:
    """Return what moves before a step, and what beside it, as `predict` takes it."""
    moved = sum(s.request.num_computed_tokens for s in plan.swaps_out + plan.swaps_in)
    return {"arriving_tokens" if plan.moves_beside else "swap_tokens": moved}


def _blocks(swap: Swap) -> dict[Placement, Sequence[int]]:
    return {Placement.DEVICE: swap.device_blocks, Placement.HOST: swap.host_blocks}


def run_to_end(scheduler: Scheduler, executor: FakeExecutor) -> list[StepPlan]:
    plans = []
    while list(scheduler.requests()):
        plan = scheduler.plan_step()
        scheduler.complete_step(plan, executor.execute(plan))
        plans.append(plan)
    return plans
