"""Serves requests with the real scheduler in simulated time, by a cost model's predictions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.cost_model import AnalyticCostModel, HardwareSpec, ModelSpec, load_of, predict
from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import Scheduler, SchedulerConfig, StepPlan
from engine.step_plan import StepMode

LLAMA2_7B = ModelSpec(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_q_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)
LLAMA3_8B = ModelSpec(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
# What the machines reach, so the efficiencies are 1.
REACHED = {
    "linear_bandwidth_efficiency": 1.0,
    "linear_flops_efficiency": 1.0,
    "gpu_attention_efficiency": 1.0,
    "cpu_attention_efficiency": 1.0,
}
T4 = HardwareSpec(
    gpu_bandwidth_bytes_s=260e9,
    gpu_flops_s=40e12,
    pcie_bytes_s=12e9,
    cpu_bandwidth_bytes_s=60e9,
    **REACHED,
)
H200 = HardwareSpec(
    gpu_bandwidth_bytes_s=4.3e12,
    gpu_flops_s=785e12,
    pcie_bytes_s=55e9,
    cpu_bandwidth_bytes_s=142e9,
)


def a10g(cpu_bandwidth_bytes_s: float) -> HardwareSpec:
    return HardwareSpec(
        gpu_bandwidth_bytes_s=540e9,
        gpu_flops_s=62e12,
        pcie_bytes_s=20e9,
        cpu_bandwidth_bytes_s=cpu_bandwidth_bytes_s,
        **REACHED,
    )


@dataclass
class Result:
    """What a simulated run did."""

    time_s: float = 0.0
    num_steps: int = 0
    num_finished: int = 0
    modes: Counter[StepMode] = field(default_factory=Counter)
    num_preemptions: int = 0
    num_swaps: int = 0
    plans: list[StepPlan] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        return self.num_finished / self.time_s


def make_request(name: str, num_prompt: int, max_tokens: int, **options: object) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=1_000_000,
        **options,
    )


def simulate(
    hardware: HardwareSpec,
    model: ModelSpec,
    lengths: Sequence[tuple[int, int]],
    *,
    device_tokens: int,
    host_tokens: int,
    keep_plans: bool = False,
    **options: object,
) -> Result:
    """Serve requests that all arrive at once; lengths are (prompt, output)."""
    cost_model = AnalyticCostModel(hardware, model)
    device, host = BlockPool(device_tokens // 16, 16), BlockPool(host_tokens // 16, 16)
    scheduler = Scheduler(SchedulerConfig(**options), device, host, cost_model)
    requests = [make_request(str(i), *pair) for i, pair in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    result = Result()
    while any(True for _ in scheduler.requests()):
        plan = scheduler.plan_step()
        assert not plan.is_empty
        result.num_steps += 1
        result.modes[plan.mode] += 1
        result.num_preemptions += len(plan.preempted)
        result.num_swaps += len(plan.swaps_in) + len(plan.swaps_out)
        swap_tokens = sum(s.request.num_computed_tokens for s in plan.swaps_in + plan.swaps_out)
        loads = [load_of(cost_model, sub_batch) for sub_batch in plan.sub_batches]
        result.time_s += predict(cost_model, loads, swap_tokens=swap_tokens).step_s
        scheduler.complete_step(plan, [0] * len(plan.sampling))
        if keep_plans:
            result.plans.append(plan)
    device.check_integrity()
    host.check_integrity()
    assert device.num_used == host.num_used == 0
    result.num_finished = sum(request.is_finished for request in requests)
    return result
