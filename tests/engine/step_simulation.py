"""Machines and models for scheduler tests, and runs of the simulator on them."""

from collections.abc import Sequence

from engine.cost_model import (
    AnalyticCostModel,
    CorrectedCostModel,
    HardwareSpec,
    ModelSpec,
    load_of,
    predict,
)
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import SchedulerConfig
from engine.step_plan import StepMeasurement, StepPlan
from tests.engine.fake_executor import moved_tokens
from workloads.request import WorkloadRequest
from workloads.simulation.simulator import OnStep, Simulation, Simulator

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


def make_request(name: str, num_prompt: int, max_tokens: int, **options: object) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=1_000_000,
        **options,
    )


class SlowAnswersModel(AnalyticCostModel):
    """A machine on which each attention that the device waits for takes half as long again."""

    def cpu_attention_s(self, num_rows: int, total_tokens: int, *, rotating: bool = False) -> float:
        """Return the time, longer unless the rows rotate."""
        seconds = super().cpu_attention_s(num_rows, total_tokens, rotating=rotating)
        return seconds if rotating else 1.5 * seconds


class SurprisingSimulator(Simulator):
    """Steps take what another model says than the one that the scheduler has; that one learns."""

    def __init__(self, expected: AnalyticCostModel, real: AnalyticCostModel, *args, **options):
        self.corrected = CorrectedCostModel(expected)
        self.real = real
        super().__init__(self.corrected, *args, **options)

    def _count(self, plan: StepPlan, simulation: Simulation) -> float:
        super()._count(plan, simulation)
        loads = [load_of(self.real, sub_batch) for sub_batch in plan.sub_batches]
        real = predict(self.real, loads, **moved_tokens(plan))
        attention_s = sum(real.cpu_attention_s) or None
        assert plan.prediction is not None
        self.corrected.observe(
            plan.prediction,
            StepMeasurement(
                step_s=real.step_s,
                device_busy_s=real.step_s - real.exposed_cpu_s,
                cpu_attention_s=attention_s,
            ),
        )
        return real.step_s


def simulate(
    hardware: HardwareSpec,
    model: ModelSpec,
    lengths: Sequence[tuple[int, int]],
    *,
    device_tokens: int,
    host_tokens: int,
    on_step: OnStep | None = None,
    slow_answers: bool = False,
    **options: object,
) -> Simulation:
    """Serve requests that all arrive at once; lengths are (prompt, output)."""
    limits = SchedulerConfig(**options)
    sizes = {"device_blocks": device_tokens // 16, "host_blocks": host_tokens // 16}
    expected = AnalyticCostModel(hardware, model)
    if slow_answers:
        real = SlowAnswersModel(hardware, model)
        simulator: Simulator = SurprisingSimulator(expected, real, limits, **sizes)
    else:
        simulator = Simulator(expected, limits, **sizes)
    requests = [
        WorkloadRequest(num_prompt_tokens=prompt, num_output_tokens=output)
        for prompt, output in lengths
    ]
    result = simulator.run(requests, on_step=on_step)
    for pool in (simulator.device_pool, simulator.host_pool):
        pool.check_integrity()
        assert pool.num_used == 0
    return result
