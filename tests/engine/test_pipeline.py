"""Steps with host-resident rows give the tokens that device-only steps give.

Plans are made by hand here, by a seeded random policy that has nothing in common with NEO's own:
any mixture of the four kinds of row, in one sub-batch or two, with swaps in between.
"""

import random
from pathlib import Path

import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.errors import StepError
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import SchedulerConfig
from engine.step_plan import ScheduledRequest, StepMode, StepPlan, SubBatch, Swap
from tests.engine.played_gpu import ring_nobody, use_channels, use_static_buffers
from tests.engine.tiny_models import make_tiny_model
from tests.markers import DEVICES

NUM_OUTPUT = 24
PARAMS = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True)
PROMPT_LENGTHS = (1, 15, 16, 17, 40, 90)


def make_runner(
    folder: Path, device: str, dtype: str = "float32", mode: str = "asymmetric", **options
) -> ModelRunner:
    config = EngineConfig(
        model=str(folder),
        device=device,
        dtype=dtype,
        max_model_len=200,
        host_kv_gb=0.02,
        threads=2,
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, mode=mode),
        **{"device_kv_blocks": 64, **options},
    )
    return ModelRunner(config, open_checkpoint(folder), lambda line: None)


def make_requests() -> list[Request]:
    rng = random.Random(5)
    return [
        Request(
            request_id=str(number),
            prompt_token_ids=[rng.randrange(2, 199) for _ in range(length)],
            params=PARAMS,
            max_total_tokens=200,
        )
        for number, length in enumerate(PROMPT_LENGTHS)
    ]


class RandomPolicy:
    """Plans steps at random; `host_share` is the chance of a request to start on the host."""

    def __init__(self, runner: ModelRunner, seed: int, host_share: float, swap_chance: float):
        assert runner.host_pool is not None
        self.runner, self.rng, self.swap_chance = runner, random.Random(seed), swap_chance
        self.requests = make_requests()
        self.on_host = {r.request_id: self.rng.random() < host_share for r in self.requests}

    def pool(self, request: Request):
        return self.runner.host_pool if self.on_host[request.request_id] else self.runner.pool

    def plan(self) -> StepPlan:
        plan = StepPlan(StepMode.ASYMMETRIC, [SubBatch(), SubBatch()])
        self.swap(plan)
        for request in self.requests:
            if request.is_finished or self.rng.random() < 0.2:
                continue
            start, left = request.num_computed_tokens, request.num_uncomputed_tokens
            share = ScheduledRequest(request, start, min(left, self.rng.choice((5, 16, 33, 200))))
            self.pool(request).grow(request.request_id, share.end)
            host, is_decode = self.on_host[request.request_id], left == 1
            kind = ("c" if host else "g") + ("dec" if is_decode else "prf")
            sub_batch = plan.sub_batches[self.rng.randrange(2)]
            getattr(sub_batch, kind).append(share)
        return plan

    def swap(self, plan: StepPlan) -> None:
        to_host = self.rng.random() < 0.5
        for request in self.requests:
            name = request.request_id
            movable = not request.is_finished and request.num_computed_tokens > 0
            if not movable or self.on_host[name] == to_host or self.rng.random() > self.swap_chance:
                continue
            source = self.pool(request)
            blocks = tuple(source.block_table(name))
            source.free(name)
            self.on_host[name] = to_host
            self.pool(request).grow(name, request.num_computed_tokens)
            new = tuple(self.pool(request).block_table(name))[: len(blocks)]
            blocks = blocks[: len(new)]
            if to_host:
                plan.swaps_out.append(Swap(request, blocks, new))
            else:
                plan.swaps_in.append(Swap(request, new, blocks))

    def run(self) -> list[list[int]]:
        for _ in range(1000):
            plan = self.plan()
            if plan.is_empty:
                self.runner.move(plan)
                if all(request.is_finished for request in self.requests):
                    break
                continue
            result = self.runner.execute(plan)
            for item in plan.scheduled:
                item.request.num_computed_tokens = item.end
            sampling = [item for item in plan.scheduled if item.end == item.request.num_tokens]
            for item, token in zip(sampling, result.sampled.token_ids, strict=True):
                item.request.append_token(token)
                if item.request.is_finished:
                    self.pool(item.request).free(item.request.request_id)
        assert self.runner.pool.num_used == 0
        assert self.runner.host_pool is not None
        assert self.runner.host_pool.num_used == 0
        return [request.output_token_ids for request in self.requests]


@pytest.fixture(scope="module", params=["llama3.1", "qwen3"])
def model_folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_model(request.param, folder)
    return folder


@pytest.mark.parametrize("device", DEVICES)
def test_any_mixture_gives_the_same_tokens(model_folder: Path, device: str) -> None:
    runner = make_runner(model_folder, device)
    try:
        expected = RandomPolicy(runner, 0, host_share=0.0, swap_chance=0.0).run()
        assert all(len(tokens) == NUM_OUTPUT for tokens in expected)
        for seed, (host_share, swap_chance) in enumerate(
            [(1.0, 0.0), (0.5, 0.0), (0.5, 0.2), (1.0, 0.3), (0.0, 0.5)]
        ):
            assert RandomPolicy(runner, seed, host_share, swap_chance).run() == expected
    finally:
        runner.close()


@pytest.mark.ispc
@pytest.mark.parametrize("channels", [False, True])
def test_static_buffers_change_nothing(model_folder: Path, channels: bool, monkeypatch) -> None:
    use_static_buffers(monkeypatch)
    if channels:
        use_channels(monkeypatch)
    runner = make_runner(model_folder, "cpu")
    try:
        expected = RandomPolicy(runner, 0, host_share=0.0, swap_chance=0.0).run()
        for seed, (host_share, swap_chance) in enumerate([(1.0, 0.0), (0.5, 0.2), (0.3, 0.3)]):
            assert RandomPolicy(runner, seed, host_share, swap_chance).run() == expected
    finally:
        runner.close()


@pytest.mark.parametrize("device", DEVICES)
def test_failed_step_is_reported_and_the_next_one_works(
    model_folder: Path, device: str, monkeypatch
) -> None:
    from engine.backends import host_attention

    monkeypatch.setattr(host_attention, "DEFAULT_TIMEOUT_S", 0.5)
    runner = make_runner(model_folder, device)
    try:
        expected = RandomPolicy(runner, 0, host_share=1.0, swap_chance=0.0).run()
        policy = RandomPolicy(runner, 0, host_share=1.0, swap_chance=0.0)
        while not (plan := policy.plan()).num_decodes:
            result = runner.execute(plan)
            for item in plan.scheduled:
                item.request.num_computed_tokens = item.end
            for item, token in zip(
                [i for i in plan.scheduled if i.end == i.request.num_tokens],
                result.sampled.token_ids,
                strict=True,
            ):
                item.request.append_token(token)
        with monkeypatch.context() as patch:
            # The device never rings: the service must give up, release every wait and say why.
            ring_nobody(patch)
            with pytest.raises(StepError, match="overdue"):
                runner.execute(plan)
        for request in policy.requests:
            policy.pool(request).free(request.request_id)
        assert RandomPolicy(runner, 0, host_share=1.0, swap_chance=0.0).run() == expected
    finally:
        runner.close()


def test_device_error_leaves_no_step_open(model_folder: Path, monkeypatch) -> None:
    runner = make_runner(model_folder, "cpu")
    try:
        policy = RandomPolicy(runner, 0, host_share=1.0, swap_chance=0.0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                policy.run()
        for request in policy.requests:
            policy.pool(request).free(request.request_id)
        RandomPolicy(runner, 0, host_share=1.0, swap_chance=0.0).run()
    finally:
        runner.close()
