"""The scheduler's options, checked once."""

from dataclasses import dataclass

from engine.errors import ConfigError

MODES = ("auto", "gpu-only", "asymmetric", "overlap")
FORCED_MODES = ("asymmetric", "overlap")
"""Those that use the host whenever they can, whatever that costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step, and when the host is used.

    Args:
        max_num_seqs: Most requests that run at once, on device and host together.
        max_num_batched_tokens: Most tokens of one step; longer prompts are prefilled in chunks.
        mode: One of `MODES`. `gpu-only` never uses the host pool; `asymmetric` uses it whenever
            the device pool is full, and computes every host-resident row in every step; `overlap`
            likewise, with rotating rows only; `auto` takes what promises most.
        tpot_limit_ms: A decode token should not take longer than this; None is no limit. It takes
            one step, that of a rotating row as many as the model has layers, and one more.
        min_offload_gain: Predicted steady-state throughput with the host, over that without, above
            which new requests are sent to the host. Once they are, the gain may fall to half way
            between this and 1 before that stops. Smaller gains are not worth a wrong prediction.
        policy_interval_steps: Steps between two looks at that gain.
        max_skipped_steps: Steps in a row that may leave out a host-resident request. Then the next
            step computes at least the one that waited longest.
        max_parked_steps: The same for one that is only parked on the host until the device has
            room again, because offloading does not pay. A GPU-only engine would have preempted it,
            so its wait may be as long as a queue's.
        admission_lookahead: A request starts on the device only if it is expected to find blocks
            there to its end, beside those that run, or for so many tokens that they are worth an
            eviction; otherwise as soon as its prompt fits.
        swap_cooldown_steps: Steps that a request stays where it was swapped to.
        headroom_blocks: Blocks per resident request that stay free when a request is swapped in or
            sent to the host, so that the others' growth does not evict it at once.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    mode: str = "auto"
    tpot_limit_ms: float | None = None
    min_offload_gain: float = 1.05
    policy_interval_steps: int = 16
    max_skipped_steps: int = 32
    max_parked_steps: int = 512
    admission_lookahead: bool = True
    swap_cooldown_steps: int = 4
    headroom_blocks: int = 1

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, got {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"got {self.max_num_batched_tokens}"
            )
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode}")
        if self.tpot_limit_ms is not None and not self.tpot_limit_ms > 0:
            raise ConfigError(f"tpot_limit_ms must be above 0, got {self.tpot_limit_ms}")
        if not self.min_offload_gain >= 1:
            raise ConfigError(f"min_offload_gain must be at least 1, got {self.min_offload_gain}")
        for name, least in (
            ("policy_interval_steps", 1),
            ("max_skipped_steps", 0),
            ("max_parked_steps", 0),
            ("swap_cooldown_steps", 1),
            ("headroom_blocks", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def tpot_limit_s(self) -> float:
        """The limit in seconds; infinite without one."""
        return float("inf") if self.tpot_limit_ms is None else self.tpot_limit_ms / 1000
