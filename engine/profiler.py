"""Measures the cost model's tables on the engine that will use them, in seconds.

Every point runs the very code that serves: the model's two halves of a layer, the backend's
attention, the hand-over to the CPU, swaps. Where the device works behind the host, it is kept busy
until all is launched, so that times are the device's own, as in a CUDA graph; what launching takes
the host is measured beside them.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from engine.backends import Backend, HostStepTimes, NormedRows
from engine.batch import Batch
from engine.batch_builder import BatchBuilder
from engine.cost_model.table import StepTables, Table, num_visible_pairs
from engine.graph_limits import MAX_GRAPH_TOKENS
from engine.kv_blocks import BlockPool
from engine.models import DecoderModel
from engine.request import Request
from engine.sampler import launch_sampling
from engine.sampling_params import SamplingParams
from engine.step_plan import ScheduledRequest, SubBatch

METHOD = 3
"""Raised when points are measured in another way, so that tables kept before are not used."""
REPEATS = 3
HEAD_START_S = 0.0008
"""For which the device is kept busy before a point, for each layer: more than launching takes."""
_GPU_CLOCK_HZ = 2e9
"""Roughly; no GPU is so much faster that its head start would be too short."""
_USUAL_TOKENS = 512
"""Of a request, where there are few tokens in all; with more tokens, requests are longer."""
_TILE = 128
"""Rows of a matrix product that a GPU computes together, at least, if there are many."""
MAX_POINT_S = 2.0
"""A table grows no further once one run of a point takes this long; beyond, lines go on."""


class Profiler:
    """Measures one model on one backend whose pools are allocated and idle.

    Args:
        model: The model.
        backend: Its backend.
        device_pool: For its size; a private accounting of the same size is used.
        host_pool: Likewise; None leaves the host's tables at 0.
        max_num_batched_tokens: Most rows of a step.
        max_num_seqs: Most requests of a step.
        max_model_len: Most tokens of a request.
    """

    def __init__(
        self,
        model: DecoderModel,
        backend: Backend,
        device_pool: BlockPool,
        host_pool: BlockPool | None,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._num_layers = model.config.num_layers
        self._device_size = device_pool
        self._host_size = host_pool
        self._max_rows = max_num_batched_tokens
        self._max_seqs = max_num_seqs
        self._max_len = max_model_len

    @torch.inference_mode()
    def measure(self, on_progress: Callable[[str], None] = lambda line: None) -> StepTables:
        """Measure every table."""
        on_progress("profiling linear layers")
        linear = self._linear()
        on_progress("profiling prefill attention")
        prefill = self._prefill_attention()
        on_progress("profiling decode attention on the device")
        gpu, gpu_row_s = self._decode_attention("gdec")
        fixed = self._fixed_step()
        launch_s = self._launch_layer()
        if self._host_size is None:
            zero = Table([(0, 0.0)])
            return StepTables(
                linear=linear,
                prefill_attention=prefill,
                gpu_attention=gpu,
                cpu_attention=zero,
                swap=zero,
                fixed_step=fixed,
                gpu_attention_row_s=gpu_row_s,
                launch_s=launch_s,
            )
        on_progress("profiling decode attention on the host")
        cpu, cpu_row_s = self._decode_attention("cdec")
        handover_s, handover_launch_s = self._handover()
        return StepTables(
            linear=linear,
            prefill_attention=prefill,
            gpu_attention=gpu,
            cpu_attention=cpu,
            swap=self._swap(),
            fixed_step=fixed,
            gpu_attention_row_s=gpu_row_s,
            cpu_attention_row_s=cpu_row_s,
            handover_s=handover_s,
            launch_s=launch_s,
            handover_launch_s=handover_launch_s,
        )

    def _linear(self) -> Table:
        """Time both halves of all layers, by rows."""
        points = []
        for num_rows in linear_sizes(self._max_rows, tiled=self._backend.device.type == "cuda"):
            seconds = self._time(self._layers(num_rows))
            points.append((num_rows, seconds / self._num_layers))
            if seconds > MAX_POINT_S:
                break
        return _rising(points)

    def _layers(self, num_rows: int) -> Callable[[], None]:
        """Return a run of all layers without attention."""
        config, weights = self._model.config, self._model.weights
        residual = weights.embedding[:1].expand(num_rows, -1).clone()
        attended = residual.new_zeros(num_rows, config.num_q_heads * config.head_dim)

        def run() -> None:
            normed = NormedRows(residual)
            for layer in range(self._num_layers):
                self._model.before_attention(layer, normed)
                normed = self._model.after_attention(layer, attended, residual)

        return run

    def _launch_layer(self) -> float:
        """Return what launching a layer of a step takes that both prefills and decodes."""
        decode = self._batch([_request(0, 1)], "gdec", 1)
        prefill = self._batch([_request(0, 2)], "gprf", 2)
        runs = (self._layers(1), lambda: self._attend(decode), lambda: self._attend(prefill))
        return sum(self._launch(run) for run in runs)

    def _prefill_attention(self) -> Table:
        points = [(0.0, 0.0)]
        longest = min(self._max_rows, self._max_len, self._device_size.capacity_tokens)
        for length in _powers(16, longest, start=(16,)):
            batch = self._batch([_request(0, length)], "gprf", length)
            seconds = self._time(functools.partial(self._attend, batch))
            points.append((num_visible_pairs(length, length), seconds / self._num_layers))
            if seconds > MAX_POINT_S:
                break
        return _rising(points)

    def _decode_attention(self, kind: str) -> tuple[Table, float]:
        """Time decode attention by tokens, and what a further request adds.

        What a request adds is seen where the same tokens belong to many and to few. (A request of
        one token costs far more than it adds: it waits for memory, and nothing hides that.)
        """
        pool = self._device_size if kind == "gdec" else self._host_size
        assert pool is not None, "decode attention is measured where there is a pool"
        most_seqs = max(1, min(32, self._max_seqs, pool.num_blocks))
        longest, capacity = self._max_len - 1, pool.capacity_tokens
        short, usual = min(longest, pool.block_size), min(longest, capacity, _USUAL_TOKENS)

        def requests_of(tokens: int) -> tuple[int, int]:
            """Return the number and length of usual requests with so many tokens together."""
            num_seqs = min(most_seqs, -(-tokens // usual))
            length = tokens // num_seqs
            return num_seqs, length - length % short  # whole blocks, of which there are enough

        row_s = 0.0
        few, length = requests_of(most_seqs * short)
        if 2 * few <= most_seqs:
            few_s = self._decode_point(kind, few, length) * most_seqs * short / (few * length)
            many_s = self._decode_point(kind, most_seqs, short)
            row_s = max(0.0, many_s - few_s) / (most_seqs - few)
        points = [(1.0, max(0.0, self._decode_point(kind, 1, 1) - row_s))]
        for tokens in _powers(short, min(capacity, most_seqs * longest), start=(short,)):
            num_seqs, length = requests_of(tokens)
            if num_seqs * length <= points[-1][0]:
                continue
            seconds = self._decode_point(kind, num_seqs, length)
            points.append((num_seqs * length, max(0.0, seconds - num_seqs * row_s)))
            if seconds * self._num_layers > MAX_POINT_S:
                break
        return _rising(points), row_s

    def _decode_point(self, kind: str, num_seqs: int, length: int) -> float:
        """Return one layer's time for requests of `length` tokens each."""
        requests = [_request(i, length) for i in range(num_seqs)]
        if kind == "gdec":
            batch = self._batch(requests, kind, 1)
            return self._time(lambda: self._attend(batch)) / self._num_layers
        # Other blocks each time: what was just read may be in a cache of hundreds of megabytes.
        batches = [self._batch(requests, kind, 1, turn=turn) for turn in range(REPEATS + 1)]
        times = [self._time_host(batch)[2] for batch in batches][1:]
        attention = [sum(t.attention_s) for t in times]
        return statistics.median(attention) / self._num_layers

    def _handover(self) -> tuple[float, float]:
        """Return what a layer's hand-over takes the device beside CPU attention, and the host."""
        batch = self._batch([_request(0, 1)], "cdec", 1)
        beside, launches = [], []
        for _ in range(REPEATS + 1):
            device_s, launch_s, times = self._time_host(batch)
            beside.append(device_s - sum(times.attention_s))
            launches.append(launch_s)
        handover_s = max(0.0, statistics.median(beside[1:]) / self._num_layers)
        if not self._backend.runs_behind:
            return handover_s, 0.0
        return handover_s, statistics.median(launches[1:]) / self._num_layers

    def _swap(self) -> Table:
        assert self._host_size is not None, "swaps are measured where there is a host pool"
        most = min(self._device_size.num_blocks, self._host_size.num_blocks, 256)
        points = [(0.0, 0.0)]
        for num_blocks in _powers(1, most, start=(1,)):
            blocks = list(range(num_blocks))
            seconds = self._time(functools.partial(self._swap_out, blocks))
            points.append((num_blocks * self._device_size.block_size, seconds))
        return _rising(points)

    def _swap_out(self, blocks: Sequence[int]) -> None:
        self._backend.swap_out(blocks, blocks)
        self._backend.join_copies()

    def _fixed_step(self) -> Table:
        points = []
        for num_rows in _powers(1, self._max_seqs, start=(1, 16)):
            requests = [_request(i, 2) for i in range(num_rows)]
            ids = torch.zeros(num_rows, dtype=torch.int64, device=self._backend.device)
            rows = torch.arange(num_rows, device=self._backend.device)

            def run(
                ids: torch.Tensor = ids,
                rows: torch.Tensor = rows,
                requests: Sequence[Request] = requests,
            ) -> None:
                hidden = F.embedding(ids, self._model.weights.embedding)
                launch_sampling(self._model.logits(hidden[rows]), requests)

            points.append((num_rows, self._time(run)))
        return _rising(points)

    def _batch(
        self, requests: Sequence[Request], kind: str, num_tokens: int, turn: int = 0
    ) -> Batch:
        """Return a batch of the last `num_tokens` tokens of each request.

        Each turn has host blocks of its own, as far as there are so many.
        """
        device = BlockPool(self._device_size.num_blocks, self._device_size.block_size)
        host = self._host_size and BlockPool(self._host_size.num_blocks, device.block_size)
        if host is not None and kind.startswith("c"):
            wanted = sum(host.blocks_for(request.num_tokens) for request in requests)
            turn %= max(1, host.num_blocks // wanted)
            if turn:
                host.grow("earlier turns", turn * wanted * host.block_size)
        sub_batch = SubBatch()
        for request in requests:
            pool = host if kind.startswith("c") else device
            assert pool is not None, "host rows need a host pool"
            pool.grow(request.request_id, request.num_tokens)
            share = ScheduledRequest(request, request.num_tokens - num_tokens, num_tokens)
            getattr(sub_batch, kind).append(share)
        return BatchBuilder(self._backend.device, device, host).build(sub_batch)

    def _attend(self, batch: Batch) -> None:
        """Run the attention of all layers; with host-resident decodes, `end_step` must follow."""
        shape = self._model.attention_shape(self._device_size.block_size)
        width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = torch.zeros(batch.num_tokens, width, dtype=shape.dtype, device=self._backend.device)
        self._backend.begin_step([batch])
        for layer in range(self._num_layers):
            out = self._model.start_attention(0, layer, qkv)
            self._backend.finish_attention(0, layer, out)

    def _time_host(self, batch: Batch) -> tuple[float, float, HostStepTimes]:
        """Return `_time_once` of a batch of host-resident decodes, and what the CPU did."""
        device_s, launch_s = self._time_once(lambda: self._attend(batch))
        times = self._backend.end_step()
        assert times is not None, "the batch has host-resident decodes"
        return device_s, launch_s, times

    def _time(self, run: Callable[[], object]) -> float:
        """Return the median time that the device takes for a run, after one that does not count."""
        seconds = []
        for _ in range(REPEATS + 1):
            seconds.append(self._time_once(run)[0])
            if seconds[0] > MAX_POINT_S:
                return seconds[0]
        return statistics.median(seconds[1:])

    def _time_once(self, run: Callable[[], object]) -> tuple[float, float]:
        """Return what a run takes the device, and what launching it takes the host."""
        self._synchronize()
        self._keep_busy()
        begin = self._backend.mark()
        start = time.perf_counter()
        run()
        launch_s = time.perf_counter() - start
        end = self._backend.mark()
        self._synchronize()
        return end.seconds_since(begin), launch_s

    def _launch(self, run: Callable[[], object]) -> float:
        """Return what launching a layer takes the host; 0 where calls compute at once."""
        if not self._backend.runs_behind:
            return 0.0
        launches = [self._time_once(run)[1] for _ in range(REPEATS + 1)][1:]
        return statistics.median(launches) / self._num_layers

    def _keep_busy(self) -> None:
        """Give the device something to do while the next point is launched."""
        if self._backend.runs_behind:
            cycles = HEAD_START_S * self._num_layers * _GPU_CLOCK_HZ
            torch.cuda._sleep(int(cycles))

    def _synchronize(self) -> None:
        if self._backend.device.type == "cuda":
            torch.cuda.synchronize(self._backend.device)


def _rising(points: Sequence[tuple[float, float]]) -> Table:
    """Return a table in which more never takes less: where it seemed to, the clock was noisy."""
    seconds = itertools.accumulate((y for _, y in points), max)
    return Table(zip((x for x, _ in points), seconds, strict=True))


def linear_sizes(most: int, *, tiled: bool) -> list[int]:
    """Return the numbers of rows that linear layers are timed for.

    Args:
        most: The largest.
        tiled: Whether time goes by tiles, as on a GPU: 548 rows take as long as 768 may. Then
            prompts' usual sizes are timed one tile after the other.
    """
    tiles = range(_TILE, min(most, MAX_GRAPH_TOKENS) + 1, _TILE) if tiled else ()
    return sorted({*_powers(1, most, start=(1, 8, 16)), *tiles})


def _powers(least: int, most: int, start: tuple[int, ...]) -> list[int]:
    """Return `start`, then doubling numbers, up to and including `most`."""
    found = [number for number in start if number <= most] or [max(least, most)]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    if found[-1] < most:
        found.append(most)
    return found


def _request(number: int, num_tokens: int) -> Request:
    return Request(
        request_id=f"profile-{number}",
        prompt_token_ids=[0] * num_tokens,
        params=SamplingParams(temperature=0),
        max_total_tokens=num_tokens + 1,
    )
