"""Runs step plans: owns the model on its device, the KV cache and the block accounting of it."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from engine.backends import (
    AttentionShape,
    HostPoolSize,
    HostStepTimes,
    make_backend,
    resolve_device,
)
from engine.batch import Batch
from engine.batch_builder import BatchBuilder
from engine.checkpoint import Checkpoint
from engine.config import DTYPES, EngineConfig
from engine.cost_model.table import StepTables
from engine.direct_rows import DirectChoice
from engine.errors import CapacityError, ConfigError, StepError
from engine.kv_blocks import BlockPool
from engine.memory import (
    fit_max_model_len,
    num_cpu_device_blocks,
    num_gpu_blocks,
    num_host_blocks,
    wanted_max_model_len,
)
from engine.model_config import ModelConfig
from engine.models import DecoderModel, load_weights, make_dummy_weights
from engine.models.weights import allocate_weights
from engine.profiler import Profiler
from engine.prompt_scoring import PromptScores, score_prompts
from engine.rotation import Rotation
from engine.sampler import PendingTokens, launch_sampling, sample
from engine.step_graphs import StepGraphs
from engine.step_in_flight import StepInFlight, StepResult
from engine.step_plan import StepPlan, Swap
from engine.token_feedback import TokenFeedback
from engine.worst_step import make_worst_step


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
        self._rotation: Rotation | None = None
        self._graphs: StepGraphs | None = None
        self._feedback = TokenFeedback(config.scheduler.max_num_seqs, self.device)
        try:
            self._model = self._make_model(config, checkpoint, max_model_len, on_progress)
            shape = self._model.attention_shape(config.block_size)
            on_progress("preparing kernels")
            self._backend.prepare(self.model_config, shape)
            num_blocks = self._num_blocks(config, shape, max_model_len)
            host_blocks = num_host_blocks(config, shape, max_model_len, self.device.type)
            self.pool = BlockPool(num_blocks, config.block_size)
            self.host_pool = BlockPool(host_blocks, config.block_size) if host_blocks else None
            largest = max(num_blocks, host_blocks) * config.block_size
            self.max_model_len = fit_max_model_len(config, max_model_len, largest)
            self.kv_cache_bytes = num_blocks * shape.block_bytes
            self.host_kv_cache_bytes = host_blocks * shape.block_bytes
            on_progress(
                f"allocating {self.kv_cache_bytes / 2**30:.2f} GiB of KV cache on the device, "
                f"{self.host_kv_cache_bytes / 2**30:.2f} GiB on the host"
            )
            host = HostPoolSize(host_blocks, config.scheduler.max_num_seqs) if host_blocks else None
            self._backend.allocate_kv_cache(shape, num_blocks, host)
        except torch.OutOfMemoryError as error:
            self.close()
            raise CapacityError(
                f"the model does not fit on {self.device}: {str(error).split('. ')[0]}; use a "
                "smaller --dtype, --max-num-batched-tokens or --max-num-seqs, or a smaller model"
            ) from error
        except BaseException:
            self.close()
            raise
        self._limits = config.scheduler
        self._rotation = self._make_rotation(config)
        self._builder = BatchBuilder(self.device, self.pool, self.host_pool, self._rotation)
        self._graphs = self._make_graphs(config, self._builder, self.pool, self.max_model_len)
        self._last_finish_s = 0.0

    @property
    def description(self) -> str:
        """What computes what, for people."""
        return self._backend.description

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a step and wait for it; see `launch` and `finish`."""
        return self.finish(self.launch(plan))

    def launch(self, plan: StepPlan) -> StepInFlight:
        """Give the device all work of a step.

        Args:
            plan: Not empty; its blocks are reserved in the pools. The step before it must be done
                unless it `lets_next_go_ahead`.

        Raises:
            StepError: CPU attention failed or was overdue; other steps can follow.
        """
        start_s = time.perf_counter()
        begin = self._backend.mark()
        self._backend.join_arrivals()
        self._forget_leavers(plan)
        if self._rotation is not None and self._rotation.direct is not None:
            self._rotation.direct.share = plan.direct_share
        self._swap(plan)
        is_graph = self._graphs is not None and self._graphs.fits(plan)
        uses_host = any(sub_batch.cdec for sub_batch in plan.sub_batches)
        num_captured = self._num_captured
        scores: list[PromptScores] = []
        try:
            if is_graph:
                assert self._graphs is not None
                self._backend.join_copies()  # a graph cannot wait for them layer by layer
                tokens = self._graphs.launch(plan)
            else:
                tokens, scores = self._launch_eagerly(plan)
            self._feedback.note(item.request for item in plan.sampling)
            self._backend.join_copies()
        except BaseException as error:
            self._give_up(f"{type(error).__name__} on the device", uses_host=uses_host)
            raise
        return StepInFlight(
            plan=plan,
            tokens=tokens,
            start_s=start_s,
            launch_s=time.perf_counter() - start_s,
            begin=begin,
            end=self._backend.mark(),
            uses_host=uses_host,
            rotation=self._backend.num_rotations if plan.rotating else None,
            graph_rows=self._graphs.num_rows if is_graph and self._graphs is not None else 0,
            captured=self._num_captured > num_captured,
            prompt_scores=scores,
        )

    @property
    def _num_captured(self) -> int:
        return 0 if self._graphs is None else self._graphs.num_captured

    def move(self, plan: StepPlan) -> None:
        """Do what a step that computes nothing leaves to do: its swaps."""
        self._backend.join_arrivals()
        self._forget_leavers(plan)
        self._swap(plan)
        self._backend.join_copies()

    def _launch_eagerly(self, plan: StepPlan) -> tuple[PendingTokens, list[PromptScores]]:
        source, complete = self._feedback.source, self._feedback.complete
        sub_batches = [s for s in plan.sub_batches if not s.is_empty]
        batches = [complete(self._builder.build(s, source)) for s in sub_batches]
        self._backend.begin_step(batches)
        states = self._model.run_layers(batches)
        logits = self._model.sampling_logits(states, batches)
        tokens = launch_sampling(logits, [item.request for item in plan.sampling])
        self._feedback.keep(tokens.token_ids)
        return tokens, self._prompt_scores(states, batches)

    def finish(self, step: StepInFlight) -> StepResult:
        """Wait for a step.

        Returns:
            New tokens of the plan's shares that sample, in batch order, and measured times.

        Raises:
            StepError: CPU attention failed or was overdue; other steps can follow.
        """
        try:
            sampled = step.tokens.wait()
        except BaseException as error:
            reason = f"{type(error).__name__} while waiting for the device"
            self._give_up(reason, uses_host=step.uses_host)
            raise
        host = self._backend.end_step() if step.uses_host else None
        if step.rotation is not None:
            host = self._end_rotations(step.rotation)
        now_s = time.perf_counter()
        step_s = now_s - max(step.start_s, self._last_finish_s)
        self._last_finish_s = now_s
        if host is not None and step.rotation is not None:
            host = replace(host, waiting_s=max(0.0, step_s - sum(host.attention_s)))
        return StepResult(
            sampled=sampled,
            step_s=step_s,
            launch_s=step.launch_s,
            device_s=step.end.seconds_since(step.begin),
            graph_rows=step.graph_rows,
            captured=step.captured,
            host=host,
        )

    def _make_rotation(self, config: EngineConfig) -> Rotation | None:
        if self.host_pool is None:
            return None
        return Rotation(
            self.model_config.num_layers,
            config.scheduler.max_num_seqs,
            like=self._model.weights.embedding,
            direct=DirectChoice(config.block_size) if config.pcie_attention else None,
        )

    def _forget_leavers(self, plan: StepPlan) -> None:
        """Wait for the CPU if it may be writing to blocks of requests that no longer rotate.

        The blocks may be somebody else's by now.
        """
        if self._rotation is not None and self._rotation.forget_leavers(plan):
            self._end_rotations(self._backend.num_rotations + 1)

    def _end_rotations(self, before: int) -> HostStepTimes | None:
        try:
            return self._backend.end_rotations(before)
        except StepError as error:
            self._give_up(str(error), uses_host=False)
            raise

    def _give_up(self, reason: str, *, uses_host: bool) -> None:
        """Release whatever waits, on either side; all rotating rows start again."""
        self._backend.abandon_step(reason)
        if uses_host:
            with contextlib.suppress(StepError):
                self._backend.end_step()
        if self._rotation is not None:
            self._rotation.clear()

    @property
    def runs_behind(self) -> bool:
        """Whether the device works behind the host, so that going ahead of it pays."""
        return self._backend.runs_behind

    def _prompt_scores(
        self, states: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> list[PromptScores]:
        return [
            score
            for lane, batch in zip(states, batches, strict=True)
            for score in score_prompts(self._model, lane, batch.scored)
        ]

    def capture_graphs(self, on_progress: Callable[[str], None]) -> None:
        """Capture the graphs that requests are likely to need first."""
        if self._graphs is not None:
            on_progress("capturing graphs")
            can_rotate = self.host_pool is not None and self._limits.mode in ("auto", "overlap")
            self._graphs.capture_usual(rotates=can_rotate)

    def profile(self, on_progress: Callable[[str], None]) -> StepTables:
        """Measure the parts of a step; the runner must be idle, and what its pools hold is lost."""
        profiler = Profiler(
            self._model,
            self._backend,
            self.pool,
            self.host_pool,
            max_num_batched_tokens=self._limits.max_num_batched_tokens,
            max_num_seqs=self._limits.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        return profiler.measure(on_progress)

    @property
    def num_attention_threads(self) -> int:
        """Threads of CPU attention, 0 if there are none."""
        return self._backend.num_attention_threads

    def _swap(self, plan: StepPlan) -> None:
        if plan.swaps_out:
            self._backend.swap_out(*_blocks(plan.swaps_out))
        if plan.swaps_in:
            self._backend.swap_in(*_blocks(plan.swaps_in), beside=plan.moves_beside)

    def close(self) -> None:
        """Release threads and memory, whoever still holds on to the runner."""
        self._backend.close()
        self._graphs = None
        self.__dict__.pop("_model", None)  # not there if it did not fit
        gc.collect()  # graphs and what they were captured from refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
            return num_cpu_device_blocks(config, shape, max_model_len)
        # Of engines before this one: what they held at most, and what is kept for others like it.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._run_worst_step(config, shape, max_model_len)
        # What is taken now, by anyone, plus what this process held in addition at its peak.
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        occupied = total - free + peak - torch.cuda.memory_reserved(self.device)
        return num_gpu_blocks(
            config, shape, max_model_len, total_bytes=total, occupied_bytes=occupied
        )

    def _make_graphs(
        self, config: EngineConfig, builder: BatchBuilder, pool: BlockPool, max_model_len: int
    ) -> StepGraphs | None:
        if self.device.type != "cuda" or config.enforce_eager:
            return None
        return StepGraphs(
            self._model,
            self._backend,
            builder,
            pool,
            self._feedback,
            self._rotation,
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_tokens=config.scheduler.max_num_batched_tokens,
            max_model_len=max_model_len,
        )

    def _run_worst_step(
        self, config: EngineConfig, shape: AttentionShape, max_model_len: int
    ) -> None:
        """Run the largest step there can be, so that its memory can be measured."""
        limits = config.scheduler
        pool, sub_batch = make_worst_step(
            limits.max_num_batched_tokens, max_model_len, config.block_size
        )
        self._backend.allocate_kv_cache(shape, pool.num_blocks)
        builder = BatchBuilder(self.device, pool)
        batch = builder.build(sub_batch)
        self._backend.begin_step([batch])
        logits = self._model.forward([batch])
        requests = [sub_batch.gprf[0].request] * limits.max_num_seqs
        sample(logits[:1].expand(limits.max_num_seqs, -1).clone(), requests)
        graphs = self._make_graphs(config, builder, pool, max_model_len)
        if graphs is not None:
            graphs.capture_hungriest()
        torch.cuda.synchronize(self.device)


def _blocks(swaps: Sequence[Swap]) -> tuple[list[int], list[int]]:
    """Return the blocks of all swaps, on the device and on the host."""
    device = [block for swap in swaps for block in swap.device_blocks]
    return device, [block for swap in swaps for block in swap.host_blocks]


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
