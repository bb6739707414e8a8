"""The pool: several callers, failing workers, closing, forking, leaving."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.topology import keep_off
from tests.cpu_kernels.oracle import Case, make_case

pytestmark = pytest.mark.ispc


def run(attention: CpuAttention, case: Case) -> torch.Tensor:
    out = torch.empty_like(case.q)
    attention.paged_decode_attention(
        out,
        case.q,
        case.k_cache,
        case.v_cache,
        case.block_tables,
        case.seq_lens,
        case.scale,
    )
    return out


def attention_threads() -> set[str]:
    """Thread ids; one that was joined may stay in /proc for a moment."""
    threads = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if (task / "comm").read_text().startswith("neo-attn"):
                threads.add(task.name)
    return threads


@pytest.mark.parametrize("spin_us", [0, 20])
def test_several_python_threads_at_once(kernel_cache: Path, spin_us: int) -> None:
    cases = [make_case([seed * 97 + 1, 600], seed=seed, head_dim=64) for seed in range(4)]
    wrong: list[int] = []
    with CpuAttention(kernel_cache, 3, spin_us=spin_us) as attention:
        expected = [run(attention, case) for case in cases]

        def repeat(i: int) -> None:
            for _ in range(50):
                if not torch.equal(run(attention, cases[i]), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_worker_exception_reaches_the_caller_and_the_pool_lives_on(kernel_cache: Path) -> None:
    case = make_case([100])
    with CpuAttention(kernel_cache, 2) as attention:
        expected = run(attention, case)
        for _ in range(20):
            with pytest.raises(RuntimeError, match=r"^worker failed on purpose$"):
                attention.native.context.fail_in_worker("worker failed on purpose")
        assert torch.equal(run(attention, case), expected)


def test_close_joins_the_threads(kernel_cache: Path) -> None:
    before = attention_threads()
    attention = CpuAttention(kernel_cache, 3)
    assert attention.num_threads == 3
    assert len(attention_threads() - before) == 2  # the caller is the third
    attention.close()
    attention.close()
    deadline = time.monotonic() + 10
    while attention_threads() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not attention_threads() - before
    with pytest.raises(ValueError, match=r"closed"):
        run(attention, make_case([5]))


def test_single_thread_is_the_caller_alone(kernel_cache: Path) -> None:
    before = attention_threads()
    case = make_case([5, 1300])
    with CpuAttention(kernel_cache, 1) as alone, CpuAttention(kernel_cache, 4) as four:
        assert len(attention_threads() - before) == 3
        assert torch.equal(run(alone, case), run(four, case))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_touch_fills_with_zeros_and_nothing_else(kernel_cache: Path, num_threads: int) -> None:
    memory = torch.full((7_000_003,), 7, dtype=torch.uint8)
    with CpuAttention(kernel_cache, num_threads) as attention:
        attention.touch(memory[5:-5])
        attention.touch(memory[:0])
        with pytest.raises(ValueError, match=r"^memory: expected a contiguous CPU tensor"):
            attention.touch(memory[::2])
    assert (memory[5:-5] == 0).all()
    assert (memory[:5] == 7).all()
    assert (memory[-5:] == 7).all()


def test_a_thread_keeps_off_the_attention_threads(kernel_cache: Path) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("needs two CPUs")
    found = []

    def work() -> None:
        with CpuAttention(kernel_cache, len(before) - 1) as attention:
            was = keep_off(attention.cpus)
            found.append((was, os.sched_getaffinity(0), set(attention.cpus)))
            assert keep_off(before) is None  # nothing would be left

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    [(was, now, attention_cpus)] = found
    assert was == before
    assert now == before - attention_cpus
    assert len(now) == 1
    assert os.sched_getaffinity(0) == before


def test_default_leaves_a_core(kernel_cache: Path) -> None:
    with CpuAttention(kernel_cache) as attention:
        assert 1 <= attention.num_threads <= max(1, len(os.sched_getaffinity(0)) - 1)


SCRIPT = """
import os, sys, torch
from pathlib import Path
from cpu_kernels.attention import CpuAttention
attention = CpuAttention(Path(sys.argv[1]), 2)
k_cache, v_cache = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 16, 64)
rows = torch.ones(1, 1, 64)
attention.store_kv(rows, rows, k_cache, v_cache, torch.tensor([0]))
child = os.fork()
if child == 0:
    try:
        attention.store_kv(rows, rows, k_cache, v_cache, torch.tensor([1]))
    except RuntimeError as error:
        assert "fork" in str(error)
        attention.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
attention.store_kv(rows, rows, k_cache, v_cache, torch.tensor([1]))
print("done")
"""


def test_fork_and_exit_without_close(kernel_cache: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(kernel_cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
