"""The attention service: answers, tickets, reports, refusals. Failures have a file of their own."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.service import AttentionService
from cpu_kernels.step import Lane
from tests.cpu_kernels.service_rig import HEAD_DIM, NUM_BLOCKS, ROW_SIZE, ServiceRig

pytestmark = pytest.mark.ispc

HALF = torch.float16
LANES = [[[5, 40, 1, 600, 0, 16]], [[1, 513], [17, 33, 64]], [[3], [70], [30, 9]]]


@pytest.mark.parametrize("seq_lens", LANES, ids=["one", "two", "three"])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, HALF)],
)
def test_equals_paged_decode_attention(
    attention: CpuAttention,
    seq_lens: list[list[int]],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
) -> None:
    rig = ServiceRig(attention, seq_lens=seq_lens, dtype=dtype, cache_dtype=cache_dtype)
    with rig.service:
        for _ in range(3):
            rig.serve_and_compare()
            rig.grow()


def test_threads_do_not_change_the_answers(kernel_cache: Any) -> None:
    for num_threads in (1, 4):
        with CpuAttention(kernel_cache, num_threads) as attention:
            rig = ServiceRig(attention, seq_lens=[[700, 90], [1030]])
            with rig.service:
                rig.serve_and_compare()


@pytest.mark.parametrize("first_bell", [0, -30, 2**31 - 30])
def test_many_steps_and_tickets_that_wrap(attention: CpuAttention, first_bell: int) -> None:
    rig = ServiceRig(attention, first_bell=first_bell)
    with rig.service:
        for step in range(30):
            rig.serve_and_compare()
            expected = (first_bell + 1 + step * rig.num_layers) % 2**32
            assert rig.service.first_ticket(0) == rig.service.first_ticket(1) == expected
        last = rig.bells[:, :, 0].to(torch.int64) % 2**32
        assert (last == (first_bell + 30 * rig.num_layers) % 2**32).all()


def test_fewer_lanes_than_there_are(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service:
        rig.begin(1)
        rig.service.ring(0, rig.service.first_ticket(0) + rig.num_layers - 1)
        rig.service.end_step()
        rig.serve_and_compare()
        assert rig.service.first_ticket(0) == 1 + rig.num_layers
        assert rig.service.first_ticket(1) == 1


def test_report(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service:
        report = rig.serve_and_compare()
    times = report.timeline_ns
    assert report.num_layers == rig.num_layers
    assert times.shape == (rig.num_layers, 2, 4)
    assert (times.flatten().diff() >= 0).all()
    attention_s = (times[:, :, 2] - times[:, :, 1]).sum(0) * 1e-9
    torch.testing.assert_close(
        torch.tensor(report.attention_s, dtype=torch.float64), attention_s.double()
    )
    assert 0 < sum(report.attention_s) < report.wall_s
    assert report.waiting_s > 0
    assert 0 <= report.handover_s < report.wall_s


def test_tables_may_change_once_the_step_has_begun(attention: CpuAttention) -> None:
    rig = ServiceRig(attention, num_layers=1)
    with rig.service:
        rig.write_rows()
        expected = rig.expect(rig.k_pool.clone(), rig.v_pool.clone(), 0)
        rig.begin()
        for lane, requests in enumerate(rig.lanes):
            requests.block_tables.fill_(-1)
            requests.seq_lens.fill_(9999)
            rig.service.ring(lane, rig.service.first_ticket(lane))
        rig.service.end_step()
        for lane, out in enumerate(expected):
            assert torch.equal(rig.out[lane, : len(out)], out.flatten(1))


def test_other_calls_take_turns_with_the_service(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    stop = threading.Event()
    failures: list[object] = []

    def store_and_gather() -> None:
        k_cache, v_cache = torch.zeros(4, 2, 64, 16), torch.zeros(4, 2, 16, 64)
        k, v = torch.randn(2, 64, 2, 64)
        table = torch.arange(4, dtype=torch.int32)
        while not stop.is_set():
            attention.store_kv(k, v, k_cache, v_cache, torch.arange(64))
            if not torch.equal(attention.gather_kv(k_cache, v_cache, table, 64)[0], k):
                failures.append("gathered something else")

    thread = threading.Thread(target=store_and_gather)
    thread.start()
    with rig.service:
        for _ in range(20):
            rig.serve_and_compare()
    stop.set()
    thread.join()
    assert not failures


def test_attention_may_close_first(kernel_cache: Any) -> None:
    rig = ServiceRig(CpuAttention(kernel_cache, 3), num_layers=1)
    rig.begin(1)
    rig.attention.close()
    rig.write_rows()
    rig.service.ring(0, rig.service.first_ticket(0))
    rig.service.end_step()
    del rig
    gc.collect()


Step = dict[str, Any]
BAD_STEPS: dict[str, tuple[Callable[[Step], object], str]] = {
    "no lanes": (lambda s: s.update(lanes=[]), "lanes: expected 1 to 2 lanes, got 0"),
    "many lanes": (lambda s: s.update(lanes=s["lanes"] * 2), "lanes: expected 1 to 2 lanes, got 4"),
    "k layers": (lambda s: s.update(k_pool=s["k_pool"][1:]), "k_pool: expected 5 dimensions"),
    "k strided": (
        lambda s: s.update(k_pool=s["k_pool"].transpose(3, 4)),
        "k_pool: expected a contiguous",
    ),
    "v type": (lambda s: s.update(v_pool=s["v_pool"].half()), "v_cache: expected torch.bfloat16"),
    "heads": (
        lambda s: s.update(
            k_pool=torch.zeros(4, 9, 3, 64, 16), v_pool=torch.zeros(4, 9, 3, 16, 64)
        ),
        "k_pool: expected 2 KV heads of size 64, got 3 of size 64",
    ),
}


def lane_with(tables: object, lens: object, dtype: torch.dtype = torch.int32) -> Lane:
    return Lane(
        block_tables=torch.tensor(tables, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=dtype),
    )


BAD_LANES = {
    "empty": (lane_with([[]], []), r"lanes\[1\]: expected 1 to 3 requests, got 0"),
    "rows": (lane_with([[1]] * 4, [1] * 4), r"lanes\[1\]: expected 1 to 3 requests, got 4"),
    "lens type": (lane_with([[1]], [1], torch.int64), r"lanes\[1\].seq_lens: expected torch.int32"),
    "tables shape": (lane_with([1], [1]), r"lanes\[1\].block_tables: expected shape"),
    "block id": (lane_with([[NUM_BLOCKS]], [1]), r"block_tables\[0, 0\]: expected a block id"),
    "length": (lane_with([[1]], [17]), r"seq_lens\[0\]: expected 0 to 16"),
}


@pytest.mark.parametrize("name", [*BAD_STEPS, *BAD_LANES])
def test_begin_step_refuses(attention: CpuAttention, name: str) -> None:
    rig = ServiceRig(attention)
    step = {"k_pool": rig.k_pool, "v_pool": rig.v_pool, "lanes": rig.lanes, "softmax_scale": 1.0}
    with rig.service:
        if name in BAD_STEPS:
            change, message = BAD_STEPS[name]
            change(step)
        else:
            lane, message = BAD_LANES[name]
            step["lanes"] = [rig.lanes[0], lane]
        with pytest.raises(ValueError, match=f"^{message}"):
            rig.service.begin_step(**step)  # type: ignore[arg-type]
        assert rig.service.first_ticket(0) == 1
        rig.serve_and_compare()


BAD_SERVICES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_layers": 0}, "num_layers: expected 1 to"),
    "timeout": ({"timeout_s": 0.0}, "timeout_s: expected 0.001 to"),
    "spin": ({"spin_us": -1}, "spin_us: expected 0 to"),
    "group": ({"num_q_heads": 3}, "q: expected 1 to 16 query heads"),
    "rows": ({"rows": torch.zeros(2, 3, ROW_SIZE - 1)}, "rows: expected shape"),
    "rows type": ({"rows": torch.zeros(2, 3, ROW_SIZE).double()}, "rows: expected bfloat16"),
    "rows strided": ({"rows": torch.zeros(3, 2, ROW_SIZE).transpose(0, 1)}, "rows: expected cont"),
    "out": ({"out": torch.zeros(2, 2, 8 * HEAD_DIM)}, "out: expected shape"),
    "out type": ({"out": torch.zeros(2, 3, 8 * HEAD_DIM).half()}, "out: expected shape"),
    "bells": ({"bells": torch.zeros(2, 2, 8, dtype=torch.int32)}, "bells: expected shape"),
    "bells type": ({"bells": torch.zeros(2, 2, 16)}, "bells: expected shape"),
    "bells place": (
        {"bells": torch.zeros(65, dtype=torch.int32)[1:].view(2, 2, 16)},
        "bells: expected memory aligned",
    ),
    "device": ({"rows": torch.zeros(2, 3, ROW_SIZE, device="meta")}, "rows: expected a CPU tensor"),
}


@pytest.mark.parametrize("name", BAD_SERVICES)
def test_constructor_refuses(attention: CpuAttention, name: str) -> None:
    arguments: dict[str, Any] = {
        "num_layers": 2,
        "num_q_heads": 8,
        "num_kv_heads": 2,
        "head_dim": HEAD_DIM,
        "rows": torch.zeros(2, 3, ROW_SIZE),
        "out": torch.zeros(2, 3, 8 * HEAD_DIM),
        "bells": torch.zeros(2, 2, 16, dtype=torch.int32),
    }
    change, message = BAD_SERVICES[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        AttentionService(attention, **(arguments | change))


def test_lanes_and_tickets_out_of_range(attention: CpuAttention) -> None:
    rig = ServiceRig(attention)
    with rig.service as service:
        for call in (service.first_ticket, lambda lane: service.wait(lane, 0)):
            with pytest.raises(ValueError, match=r"^lane: expected 0 to 1, got 2"):
                call(2)
        with pytest.raises(ValueError, match=r"^lane: expected 0 to 1, got -1"):
            service.ring(-1, 0)
        with pytest.raises(ValueError, match=r"^ticket: expected at most 0"):
            service.wait(0, 1)
        with pytest.raises(ValueError, match=r"^timeout_s: expected"):
            service.end_step(-1.0)
