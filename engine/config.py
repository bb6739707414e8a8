"""What the engine was asked to do, checked once."""

from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError
from engine.scheduling.scheduler import SchedulerConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
BLOCK_SIZES = (16, 32, 64)
PCIE_MODES = ("auto", "overlap")
"""Those that may have rotating rows, whose attention the device may compute itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine; the command line takes its defaults from here.

    Args:
        model: Folder, `.gguf` file or Hub id; None is the embedded default model.
        revision: Branch, tag or commit of a Hub id.
        load_format: One of `LOAD_FORMATS`; `dummy` makes random weights on the device.
        dtype: Of weights, activations and KV cache: one of `DTYPES`; `auto` follows the model.
        device: `auto` (`cuda` where there is one), `cuda`, `cuda:N` or `cpu`.
        max_model_len: Most tokens of a request; None is what the model and the pool allow.
        block_size: Tokens of a KV block.
        device_kv_blocks: Blocks of the device pool; None sizes it from free memory.
        host_kv_gb: GiB of host memory for the KV of offloaded requests; None takes up to 4 where
            offloading can be of use (not on a CPU device).
        gpu_memory_utilization: Share of the GPU's memory NEO may use, in (0, 1].
        threads: CPU attention threads; None is all cores but one.
        seed: For dummy weights and for requests without a seed of their own.
        pcie_attention: In overlap mode, let the GPU compute part of the offloaded attention itself,
            reading the KV in host memory over PCIe.
        enforce_eager: Launch every kernel from Python instead of replaying CUDA graphs.
        async_scheduling: Plan and launch a step while the one before it runs; None: where the
            device works behind the host, as a GPU does.
        log_steps: Write one JSON line a step to this file.
        scheduler: Limits of one step.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """

    model: str | None = None
    revision: str | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    device_kv_blocks: int | None = None
    host_kv_gb: float | None = None
    gpu_memory_utilization: float = 0.9
    threads: int | None = None
    seed: int = 0
    pcie_attention: bool = False
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    log_steps: Path | None = None
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        self._check(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        self._check(
            self.load_format in LOAD_FORMATS,
            "load_format",
            f"one of {', '.join(LOAD_FORMATS)}",
            self.load_format,
        )
        self._check(
            self.block_size in BLOCK_SIZES, "block_size", f"one of {BLOCK_SIZES}", self.block_size
        )
        for name in ("max_model_len", "device_kv_blocks", "threads"):
            value = getattr(self, name)
            self._check(value is None or value >= 1, name, "at least 1", value)
        self._check(
            self.host_kv_gb is None or self.host_kv_gb > 0, "host_kv_gb", "above 0", self.host_kv_gb
        )
        self._check(
            0 < self.gpu_memory_utilization <= 1,
            "gpu_memory_utilization",
            "above 0 and at most 1",
            self.gpu_memory_utilization,
        )
        is_device = self.device in ("auto", "cpu", "cuda") or (
            self.device.startswith("cuda:") and self.device[5:].isdigit()
        )
        self._check(is_device, "device", "auto, cpu, cuda or cuda:N", self.device)
        self._check(
            not self.pcie_attention or self.scheduler.mode in PCIE_MODES,
            "mode",
            f"{' or '.join(PCIE_MODES)} with pcie_attention",
            self.scheduler.mode,
        )

    @staticmethod
    def _check(ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise ConfigError(f"{name} must be {expected}, got {got}")
