"""Runs step plans: owns the model on its device, the KV cache and the block accounting of it."""

from collections.abc import Callable

import torch

from engine.backends import AttentionShape, make_backend, resolve_device
from engine.batch import BatchBuilder
from engine.checkpoint import Checkpoint
from engine.config import DTYPES, EngineConfig
from engine.errors import CapacityError, ConfigError
from engine.kv_blocks import BlockPool
from engine.memory import (
    fit_max_model_len,
    num_gpu_blocks,
    num_host_blocks,
    wanted_max_model_len,
)
from engine.model_config import ModelConfig
from engine.models import DecoderModel, load_weights, make_dummy_weights
from engine.models.weights import allocate_weights
from engine.request import Request
from engine.sampler import SampledTokens, sample
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, StepPlan

_PROBE_VOCAB_ID = 0


class ModelRunner:
    """A model, ready to run steps.

    Args:
        config: The options.
        checkpoint: Where the model comes from.
        on_progress: Told what is going on, one line at a time.

    Raises:
        ConfigError: An option does not go with the model or the machine.
        CheckpointError: The weights do not fit the configuration.
        CapacityError: The model or its cache does not fit into memory.
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint, on_progress: Callable[[str], None]
    ) -> None:
        self.model_config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
        max_model_len = wanted_max_model_len(config, self.model_config)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.model_config.dtype)
        self._backend = make_backend(self.device, config.threads)
        try:
            self._model = self._make_model(config, checkpoint, max_model_len, on_progress)
            shape = self._model.attention_shape(config.block_size)
            on_progress("preparing kernels")
            self._backend.prepare(self.model_config, shape)
            num_blocks = self._num_blocks(config, shape, max_model_len)
            self.pool = BlockPool(num_blocks, config.block_size)
            self.max_model_len = fit_max_model_len(config, max_model_len, self.pool.capacity_tokens)
            self.kv_cache_bytes = num_blocks * shape.block_bytes
            on_progress(f"allocating {self.kv_cache_bytes / 2**30:.2f} GiB of KV cache")
            self._backend.allocate_kv_cache(shape, num_blocks)
        except torch.OutOfMemoryError as error:
            self.close()
            raise CapacityError(
                f"the model does not fit on {self.device}: {str(error).split('. ')[0]}; use a "
                "smaller --dtype, --max-num-batched-tokens or --max-num-seqs, or a smaller model"
            ) from error
        except BaseException:
            self.close()
            raise
        self._builder = BatchBuilder(self.device, self.pool)

    @property
    def description(self) -> str:
        """What computes what, for people."""
        return self._backend.description

    def execute(self, plan: StepPlan) -> SampledTokens:
        """Compute a step.

        Args:
            plan: Not empty; its blocks are reserved in `pool`.

        Returns:
            New tokens of the plan's shares that sample, in batch order.
        """
        logits = self._model.forward(self._builder.build(plan))
        return sample(logits, [item.request for item in plan.sampling])

    def close(self) -> None:
        """Release threads and memory."""
        self._backend.close()

    def _make_model(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        max_model_len: int,
        on_progress: Callable[[str], None],
    ) -> DecoderModel:
        weights = allocate_weights(self.model_config, self.dtype, self.device)
        if config.load_format == "dummy":
            on_progress(f"making dummy weights on {self.device}")
            make_dummy_weights(weights, config.seed)
        else:
            on_progress(f"loading {checkpoint.name} to {self.device}")
            load_weights(weights, checkpoint.tensors(self.device))
        return DecoderModel(self.model_config, weights, self._backend, max_model_len)

    def _num_blocks(self, config: EngineConfig, shape: AttentionShape, max_model_len: int) -> int:
        if self.device.type == "cpu":
            return num_host_blocks(config, shape, max_model_len)
        self._run_worst_step(config, shape)
        # What is taken now, by anyone, plus what this process held in addition at its peak.
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        occupied = total - free + peak - torch.cuda.memory_reserved(self.device)
        return num_gpu_blocks(
            config, shape, max_model_len, total_bytes=total, occupied_bytes=occupied
        )

    def _run_worst_step(self, config: EngineConfig, shape: AttentionShape) -> None:
        """Run the largest step there can be, so that its memory can be measured."""
        limits = config.scheduler
        num_tokens = min(limits.max_num_batched_tokens, self.model_config.rope.max_positions)
        pool = BlockPool(-(-num_tokens // config.block_size), config.block_size)
        request = Request(
            request_id="worst-case",
            prompt_token_ids=[_PROBE_VOCAB_ID] * num_tokens,
            params=SamplingParams(top_p=0.5),
            max_total_tokens=num_tokens,
        )
        pool.grow(request.request_id, num_tokens)
        self._backend.allocate_kv_cache(shape, pool.num_blocks)
        plan = StepPlan(prefills=[ScheduledRequest(request, 0, num_tokens)])
        batch = BatchBuilder(self.device, pool).build(plan)
        logits = self._model.forward(batch)
        sample(logits.expand(limits.max_num_seqs, -1).clone(), [request] * limits.max_num_seqs)
        torch.cuda.synchronize(self.device)


def resolve_dtype(wanted: str, of_model: str) -> torch.dtype:
    """Return the dtype that an option means.

    Args:
        wanted: One of `DTYPES`.
        of_model: The checkpoint's own, which `auto` takes.

    Raises:
        ConfigError: The checkpoint's own is not supported.
    """
    name = of_model if wanted == "auto" else wanted
    if name not in DTYPES:
        raise ConfigError(
            f"the checkpoint's dtype {name} is not supported; choose one with --dtype: "
            f"{', '.join(DTYPES[1:])}"
        )
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
