"""From the parts of a step to the whole: what hides behind what, and what is left exposed.

The pipeline of a step runs, layer by layer, for each sub-batch j in turn:

    wait for the host's answer of j at the layer before; output projection and MLP of j; QKV of j;
    ring the host for j; device attention of j.

The host serves one ring after the other. `pipeline_s` walks through exactly that.

Rotating rows are in the batch for one layer of each step; the host attends to them, one layer each,
while the device runs the whole step. So the step takes whichever of the two takes longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.cost_model.base import CostModel
from engine.graph_limits import MAX_GRAPH_TOKENS, MAX_STAGED_TOKENS
from engine.step_plan import StepPrediction, SubBatch

_ARRIVING_SHARE = 0.1
"""Of the time of requests that come to the device beside the layers, what these take longer: an
H200 took 6.5 instead of 6.0 ms beside 47 GB/s, by twice the programs that copy now."""
_PROMPT_COPY_SLOWNESS = 1.2
"""Prompts are copied to the host more slowly than swaps, 43 instead of 50 GB/s on an H200, so that
the layers beside them hardly notice."""
_PROMPT_COPY_SHARE = 0.05
"""Of that time, what the layers of a step with rotating rows take longer: 161 instead of 160 µs
(Llama-2-7B, 248 rows, H200)."""
_PREFIX_SHARE = 0.6
"""Of the time of prefixes that come back from the host meanwhile, what those layers take longer:
8.6 instead of 7.3 ms with 240 tokens, 8.6 instead of 5.8 with 350 before a chunk of 40
(Llama-2-7B, H200)."""
_DIRECT_SLOWNESS = 1.1
"""What attention over PCIe takes, of a copy of the same K and V: 47 instead of 51.4 GB/s on an
H200."""
_DIRECT_STEP_SHARE = 0.05
"""Of that time, what the layers take longer: 4.90 instead of 4.70 ms with a quarter of the rotating
rows' tokens, but with more rows too (H200)."""
_MANY_TOKENS = 32_768
_SWAP_LEAD_LAYERS = 4
"""Layers that are moved at once: `engine.backends.cuda_swaps` lets a layer wait for no others."""


@dataclass(slots=True, kw_only=True)
class SubBatchLoad:
    """A sub-batch as the cost model sees it: numbers only.

    `prefill_attention_s` is one layer's. `copy_out_tokens` are prompt tokens whose K and V go to
    the host, `copy_in_tokens` those of earlier chunks that come back for attention. Rotating rows
    decode one layer of their token.
    """

    num_prefill_tokens: int = 0
    prefill_attention_s: float = 0.0
    num_gdec: int = 0
    gdec_tokens: int = 0
    num_cdec: int = 0
    cdec_tokens: int = 0
    num_sampled_prefills: int = 0
    copy_out_tokens: int = 0
    copy_in_tokens: int = 0
    num_rotating: int = 0
    rotating_tokens: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that go through all linear layers."""
        return self.num_prefill_tokens + self.num_gdec + self.num_cdec

    @property
    def num_decodes(self) -> int:
        """Rows that decode in one step, on either side."""
        return self.num_gdec + self.num_cdec


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One sub-batch in one layer, in seconds; without host rows, `cpu_attention_s` is 0.

    `handover_s` is the device's own time: rotating, copying, ringing and copying back are work of
    its stream and of whoever launches it, and no other work of the device runs beside them.
    """

    linear_s: float
    gpu_attention_s: float
    cpu_attention_s: float = 0.0
    handover_s: float = 0.0


def load_of(model: CostModel, sub_batch: SubBatch) -> SubBatchLoad:
    """Return what a sub-batch asks of the machine."""
    prefills = sub_batch.gprf + sub_batch.cprf
    return SubBatchLoad(
        num_prefill_tokens=sum(item.num_tokens for item in prefills),
        prefill_attention_s=sum(
            model.prefill_attention_s(item.num_tokens, item.end) for item in prefills
        ),
        num_gdec=len(sub_batch.gdec),
        gdec_tokens=sum(item.end for item in sub_batch.gdec),
        num_rotating=len(sub_batch.rotating),
        rotating_tokens=sum(row.share.end for row in sub_batch.rotating),
        num_cdec=len(sub_batch.cdec),
        cdec_tokens=sum(item.end for item in sub_batch.cdec),
        num_sampled_prefills=sum(item.samples for item in prefills),
        copy_out_tokens=sum(item.num_tokens for item in sub_batch.cprf),
        copy_in_tokens=sum(item.start for item in sub_batch.cprf),
    )


def pipeline_s(stages: Sequence[StageTimes], num_layers: int) -> tuple[float, float]:
    """Walk through the layers of a step.

    Once the host's lead over the device repeats from one layer to the next, so do all later layers
    (times only enter as differences); the rest is then a multiplication, and still exact.

    Args:
        stages: The sub-batches, in order.
        num_layers: Layers of the model.

    Returns:
        The whole time, and how much of it the device waits for the host, in seconds.
    """
    device = host = exposed = 0.0
    answers = [0.0] * len(stages)
    leads: list[float] = []
    layer = 0
    while layer < num_layers:
        start, exposed_before = device, exposed
        for j, stage in enumerate(stages):
            exposed += max(0.0, answers[j] - device)
            device = max(device, answers[j]) + stage.linear_s
            if stage.cpu_attention_s > 0.0:
                device += stage.handover_s
                host = max(host, device) + stage.cpu_attention_s
                answers[j] = host
            device += stage.gpu_attention_s
        layer += 1
        before, leads = leads, [max(0.0, time - device) for time in (host, *answers)]
        if leads == before or _close(leads, before, device - start):
            left = num_layers - layer
            shift = left * (device - start)
            exposed += left * (exposed - exposed_before)
            device, answers = device + shift, [answer + shift for answer in answers]
            break
    end = max(device, *answers)
    return end, exposed + end - device


def _close(leads: list[float], before: list[float], period: float) -> bool:
    tolerance = 1e-9 * period
    return len(leads) == len(before) and all(
        abs(lead - other) <= tolerance for lead, other in zip(leads, before, strict=True)
    )


def rotation_steps(model: CostModel) -> int:
    """Return how many overlap steps a rotating row's token takes."""
    return model.num_layers + 1


def rotating_attention_s(
    model: CostModel, num_rows: int, total_tokens: int, direct_share: float
) -> tuple[float, float]:
    """Return the times of the rotating rows' attention in a step.

    Args:
        model: Times of the parts.
        num_rows: Rows that rotate.
        total_tokens: Tokens that they attend to.
        direct_share: Share of them that is the device's.

    Returns:
        The CPU's, and the device's, which reads over PCIe meanwhile.
    """
    direct_tokens = round(direct_share * total_tokens)
    cpu_s = model.cpu_attention_s(num_rows, total_tokens - direct_tokens, rotating=True)
    return cpu_s, _direct_s(model, direct_tokens)


def _direct_share(
    model: CostModel, num_rows: int, total_tokens: int, device_s: float, incoming_s: float
) -> float:
    """Return the share of rotating rows' tokens that the CPU cannot hide behind the device's work.

    The device reads no more than that itself: it slows down what runs beside. Nor does it read more
    than PCIe has time for besides what comes to the device for `incoming_s`.
    """
    if not model.most_direct_share or not num_rows:
        return 0.0
    cpu_s = model.cpu_attention_s(num_rows, total_tokens, rotating=True)
    if cpu_s <= 0:
        return 0.0
    balanced = (cpu_s - incoming_s) / (cpu_s + _direct_s(model, total_tokens))
    return max(0.0, min(model.most_direct_share, balanced, 1 - device_s / cpu_s))


def prefix_cost_s(model: CostModel, num_tokens: int) -> float:
    """Return what a step with rotating rows takes longer if a prefix comes back from the host.

    Args:
        model: Times of the parts.
        num_tokens: Of the prefix.
    """
    return _PREFIX_SHARE * model.swap_s(num_tokens)


def balanced_direct_share(model: CostModel) -> float:
    """Return the share of the rotating rows' tokens with which device and CPU take equally long."""
    cpu_s = model.cpu_attention_s(1, _MANY_TOKENS, rotating=True)
    direct_s = _direct_s(model, _MANY_TOKENS)
    return cpu_s / (cpu_s + direct_s) if direct_s > 0 else 0.0


def _direct_s(model: CostModel, num_tokens: int) -> float:
    return _DIRECT_SLOWNESS * model.swap_s(num_tokens) / model.num_layers


def _visitors(model: CostModel, load: SubBatchLoad) -> int:
    """Return how many rotating rows are in a layer on average, rounded up."""
    return -(-load.num_rotating // rotation_steps(model))


def _visited_share(model: CostModel, load: SubBatchLoad, *, is_graph: bool) -> float:
    """Return the share of layers that have rotating rows, or in a graph: room for them."""
    return 1.0 if is_graph else min(1.0, load.num_rotating / rotation_steps(model))


def _linear_s(model: CostModel, load: SubBatchLoad, *, is_graph: bool) -> float:
    """Return an average layer's linear work; one that nobody is in is skipped."""
    num_rows = load.num_rows + _visitors(model, load)
    if num_rows == 0:
        return 0.0
    share = 1.0 if load.num_rows else _visited_share(model, load, is_graph=is_graph)
    return share * model.linear_s(num_rows, rotating=load.num_rotating > 0)


def _handover_s(model: CostModel, load: SubBatchLoad, *, is_graph: bool) -> float:
    """Return the device's time for an average layer's hand-over, of either kind."""
    if load.num_cdec:
        return model.handover_s()
    if not load.num_rotating:
        return 0.0
    return _visited_share(model, load, is_graph=is_graph) * model.handover_s(rotating=True)


def _is_graph(loads: Sequence[SubBatchLoad]) -> bool:
    """Return whether the step is launched as a whole; see `StepGraphs.fits`."""
    busy = [load for load in loads if load.num_rows or load.num_rotating]
    if any(load.copy_in_tokens + load.copy_out_tokens > MAX_STAGED_TOKENS for load in busy):
        return False
    return all(
        not load.num_prefill_tokens or load.num_gdec + load.num_prefill_tokens <= MAX_GRAPH_TOKENS
        for load in busy
    )


def _launch_s(model: CostModel, loads: Sequence[SubBatchLoad]) -> float:
    """Return the host's time to launch all layers."""
    handovers = [
        int(load.num_cdec > 0 or load.num_rotating > 0)
        for load in loads
        if load.num_rows or load.num_rotating
    ]
    return model.num_layers * sum(model.launch_s(count) for count in handovers)


def predict(
    model: CostModel,
    loads: Sequence[SubBatchLoad],
    *,
    swap_tokens: int = 0,
    arriving_tokens: int = 0,
    prefill_weight: float = 0.0,
) -> StepPrediction:
    """Predict a step.

    Args:
        model: Times of the parts.
        loads: The sub-batches; those without rows cost nothing. Rotating rows are in one that is
            alone.
        swap_tokens: Tokens whose K and V move before the step computes.
        arriving_tokens: Tokens whose K and V come to the device while it computes.
        prefill_weight: Decode tokens that a prefill token is worth.
    """
    is_graph = _is_graph(loads)
    visitors = sum(_visitors(model, load) for load in loads)
    linear = [_linear_s(model, load, is_graph=is_graph) for load in loads]
    gdec = [model.gpu_attention_s(load.num_gdec, load.gdec_tokens) for load in loads]
    cdec = [model.cpu_attention_s(load.num_cdec, load.cdec_tokens) for load in loads]
    handovers = [_handover_s(model, load, is_graph=is_graph) for load in loads]
    stages = [
        StageTimes(
            # Rotating rows are copied to and fro, but waited for in the next step only.
            linear[j] + (handovers[j] if load.num_rotating else 0.0),
            gdec[j] + load.prefill_attention_s,
            cdec[j],
            handovers[j],
        )
        for j, load in enumerate(loads)
        if load.num_rows or load.num_rotating
    ]
    layers_s, exposed_s = pipeline_s(stages, model.num_layers) if stages else (0.0, 0.0)
    # Prompts go to the host beside the layers; what was computed of them before comes back a layer
    # ahead.
    copies_s = _PROMPT_COPY_SLOWNESS * model.swap_s(sum(load.copy_out_tokens for load in loads))
    num_prefix_tokens = sum(load.copy_in_tokens for load in loads)
    prefix_s = model.swap_s(num_prefix_tokens)
    launch_s = 0.0 if is_graph else _launch_s(model, loads)
    num_decodes = sum(load.num_decodes for load in loads)
    num_sampled = num_decodes + sum(load.num_sampled_prefills for load in loads) + visitors
    swap_s = model.swap_s(swap_tokens)
    exposed_swap_s = swap_s if is_graph else _SWAP_LEAD_LAYERS / model.num_layers * swap_s
    arriving_s = model.swap_s(arriving_tokens)
    layers_s += _ARRIVING_SHARE * arriving_s
    if any(load.num_rotating for load in loads):
        layers_s += _PROMPT_COPY_SHARE * copies_s + prefix_cost_s(model, num_prefix_tokens)
    incoming_s = max(prefix_s, arriving_s)
    device_s = max(layers_s, copies_s, incoming_s, launch_s, swap_s) + min(swap_s, exposed_swap_s)
    device_s += model.fixed_step_s(num_sampled)
    num_rotating = sum(load.num_rotating for load in loads)
    rotating_tokens = sum(load.rotating_tokens for load in loads)
    direct_share = _direct_share(model, num_rotating, rotating_tokens, device_s, incoming_s)
    rotating_s, direct_s = rotating_attention_s(model, num_rotating, rotating_tokens, direct_share)
    device_s = max(device_s + _DIRECT_STEP_SHARE * direct_s, incoming_s + direct_s)
    step_s = max(device_s, rotating_s)
    rotated = num_rotating / rotation_steps(model)
    value = num_decodes + rotated + prefill_weight * sum(load.num_prefill_tokens for load in loads)
    n = model.num_layers
    return StepPrediction(
        step_s=step_s,
        linear_s=tuple(n * part for part in linear),
        gpu_attention_s=tuple(n * part for part in gdec),
        cpu_attention_s=(rotating_s,) if rotating_s else tuple(n * part for part in cdec),
        prefill_attention_s=n * sum(load.prefill_attention_s for load in loads),
        swap_s=swap_s,
        handover_s=n * sum(handovers),
        exposed_cpu_s=exposed_s + step_s - device_s,
        tokens_per_s=value / step_s if step_s > 0 else 0.0,
        prompt_copy_s=max(copies_s, prefix_s),
        launch_s=launch_s,
        fixed_s=model.fixed_step_s(num_sampled),
        arriving_s=arriving_s,
        rotates=num_rotating > 0,
        direct_share=direct_share,
        most_rows=max((load.num_rows + _visitors(model, load) for load in loads), default=0),
    )
