"""Step times from hardware figures, for machines that nobody has measured yet.

The simulator and the planner use it, and the scheduler before a machine was profiled.
"""

from dataclasses import dataclass

from engine.cost_model.base import ROTATING_HANDOVER_SHARE
from engine.errors import ConfigError

_SMOOTHNESS = 3.0
"""Exponent of the smooth maximum of memory time and arithmetic time. With 3, the formula is within
10 % of one H200's linear layers (Llama-3-8B shape, bf16) from 1 to 4,096 rows; a hard maximum is
14 % too low where both times are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSpec:
    """What a machine reaches, and what its kernels reach of that.

    The defaults of the efficiencies and latencies were measured on one NVIDIA H200 with a 16-core
    AVX-512 host.

    Args:
        gpu_bandwidth_bytes_s: Device memory, as a plain copy reaches it (read plus written).
        gpu_flops_s: Large matrix products in the model's dtype.
        pcie_bytes_s: Pinned copies between host and device, one direction.
        cpu_bandwidth_bytes_s: Host memory, as a plain read with all attention threads reaches it.
        linear_bandwidth_efficiency: Of the linear layers at few rows (115 µs for 436 MB).
        linear_flops_efficiency: Of the linear layers at many rows (2,505 µs at 4,096 rows).
        gpu_attention_efficiency: Of paged decode attention, of the bandwidth (252 µs for 1.05 GB).
        gpu_attention_latency_s: Of one decode attention, whatever its size.
        prefill_attention_efficiency: Of causal prefill attention, of the arithmetic.
        cpu_attention_efficiency: Of the CPU's attention, of the bandwidth (125 of 142 GB/s).
        layer_overhead_s: Norms, rotary embedding and activation of one layer.
        handover_s: Device time of one hand-over, rotating and copying included.
        launch_s: The host's time to launch one layer of a sub-batch kernel by kernel, as steps are
            that are too long for a graph (see `engine.graph_limits`); 0: no matter.
        handover_launch_s: What a hand-over adds to that.
        step_overhead_s: Scheduling, launching and sampling of one step.
        swap_latency_s: Of one copy that moves blocks.

    Raises:
        ConfigError: A figure is not positive, or an efficiency above 1.
    """

    gpu_bandwidth_bytes_s: float
    gpu_flops_s: float
    pcie_bytes_s: float
    cpu_bandwidth_bytes_s: float
    linear_bandwidth_efficiency: float = 0.88
    linear_flops_efficiency: float = 0.91
    gpu_attention_efficiency: float = 0.97
    gpu_attention_latency_s: float = 6e-6
    prefill_attention_efficiency: float = 0.5
    cpu_attention_efficiency: float = 0.88
    layer_overhead_s: float = 14e-6
    handover_s: float = 20e-6
    launch_s: float = 4.4e-4
    handover_launch_s: float = 1.5e-4
    step_overhead_s: float = 5e-4
    swap_latency_s: float = 5e-6

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            most = 1.0 if name.endswith("_efficiency") else float("inf")
            least_ok = value >= 0 if _may_be_zero(name) else value > 0
            if not (least_ok and value <= most):
                raise ConfigError(
                    f"hardware figure {name} must be positive"
                    f"{' and at most 1' if most == 1.0 else ''}, got {value}"
                )


def _may_be_zero(name: str) -> bool:
    return name.endswith(("_latency_s", "_overhead_s", "handover_s", "launch_s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a dense decoder, as far as costs go.

    Args:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Elements of a head.
        vocab_size: Rows of the head.
        element_bytes: Of weights and KV.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    element_bytes: int = 2

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        heads = 2 * self.num_q_heads + 2 * self.num_kv_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_bytes


class AnalyticCostModel:
    """A `CostModel` from bandwidths and peak rates.

    Args:
        hardware: The machine.
        model: The model's shape.
    """

    def __init__(self, hardware: HardwareSpec, model: ModelSpec) -> None:
        self.hardware = hardware
        self.model = model
        self.most_direct_share = 0.0
        self._weights_s = (
            model.layer_parameters
            * model.element_bytes
            / (hardware.gpu_bandwidth_bytes_s * hardware.linear_bandwidth_efficiency)
        )
        self._flops_s = hardware.gpu_flops_s * hardware.linear_flops_efficiency
        self._row_s = 2 * model.layer_parameters / self._flops_s

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model.num_layers

    def linear_s(self, num_rows: int, *, rotating: bool = False) -> float:
        """Reading the weights or multiplying by them, smoothly whichever is longer."""
        return _smooth_max(self._weights_s, num_rows * self._row_s) + self.hardware.layer_overhead_s

    def prefill_attention_s(self, query_len: int, context_len: int) -> float:
        """Two products per visible pair of tokens, or reading the context, if that is longer."""
        model, hardware = self.model, self.hardware
        num_pairs = query_len * (context_len - (query_len - 1) / 2)
        flops = 4 * num_pairs * model.num_q_heads * model.head_dim
        rate = hardware.gpu_flops_s * hardware.prefill_attention_efficiency
        return max(flops / rate, self.gpu_attention_s(1, context_len))

    def gpu_attention_s(self, num_seqs: int, total_tokens: int) -> float:
        """Reading K and V once."""
        if num_seqs == 0:
            return 0.0
        hardware = self.hardware
        rate = hardware.gpu_bandwidth_bytes_s * hardware.gpu_attention_efficiency
        return total_tokens * self.model.kv_bytes_per_token / rate + (
            hardware.gpu_attention_latency_s
        )

    def cpu_attention_s(self, num_rows: int, total_tokens: int, *, rotating: bool = False) -> float:
        """Reading K and V once, from host memory."""
        rate = self.hardware.cpu_bandwidth_bytes_s * self.hardware.cpu_attention_efficiency
        return total_tokens * self.model.kv_bytes_per_token / rate

    def handover_s(self, *, rotating: bool = False) -> float:
        """As the hardware figures say."""
        share = ROTATING_HANDOVER_SHARE if rotating else 1.0
        return share * self.hardware.handover_s

    def launch_s(self, num_handovers: int) -> float:
        """As the hardware figures say."""
        return self.hardware.launch_s + num_handovers * self.hardware.handover_launch_s

    def swap_s(self, num_tokens: int) -> float:
        """All layers' K and V over PCIe."""
        if num_tokens == 0:
            return 0.0
        num_bytes = num_tokens * self.model.kv_bytes_per_token * self.model.num_layers
        return num_bytes / self.hardware.pcie_bytes_s + self.hardware.swap_latency_s

    def fixed_step_s(self, num_sampled: int) -> float:
        """Read or multiply by the head once, plus the overhead of a step."""
        head = self.model.vocab_size * self.model.hidden_size
        rate = self.hardware.gpu_bandwidth_bytes_s * self.hardware.linear_bandwidth_efficiency
        return self.hardware.step_overhead_s + _smooth_max(
            head * self.model.element_bytes / rate, 2 * head * num_sampled / self._flops_s
        )


def _smooth_max(a: float, b: float) -> float:
    return float((a**_SMOOTHNESS + b**_SMOOTHNESS) ** (1 / _SMOOTHNESS))
