"""One tiny case a kernel under Triton's interpreter on CPU tensors; prints a JSON line a case.

A process of its own, because TRITON_INTERPRET counts only before triton is imported:
`TRITON_INTERPRET=1 python -m tests.gpu_kernels.interpreter_cases`. A smoke test: the interpreter
computes bf16 wrongly and accepts shapes that the compiler refuses; the GPU tests are the proof.
"""

import json
import time
import traceback
from collections.abc import Callable

import torch

from tests.gpu_kernels import kernel_checks as checks

CASES: dict[str, Callable[[], None]] = {
    "decode_one_split": lambda: checks.check_decode(
        [17, 0, 1], group_size=2, head_dim=16, num_kv_heads=1, device="cpu", num_splits=1
    ),
    "decode_three_splits": lambda: checks.check_decode(
        [40, 0, 129], group_size=3, head_dim=24, num_kv_heads=1, device="cpu", num_splits=3
    ),
    "decode_fp16": lambda: checks.check_decode(
        [150], group_size=1, head_dim=32, num_kv_heads=2, dtype=torch.float16, device="cpu",
        num_splits=2,
    ),
    "prefill_mixed": lambda: checks.check_prefill(
        [(20, 15), (0, 0), (40, 1), (0, 3)], group_size=3, head_dim=24, num_kv_heads=1,
        device="cpu",
    ),
    "prefill_fp16": lambda: checks.check_prefill(
        [(130, 5)], group_size=2, head_dim=32, num_kv_heads=1, dtype=torch.float16, device="cpu"
    ),
    "rope_store": lambda: checks.check_rope_store(4, head_dim=24, device="cpu"),
    "rope_store_partial_norm": lambda: checks.check_rope_store(
        2, head_dim=32, rotary_dim=16, with_norm=True, device="cpu"
    ),
    "rotating_rows": lambda: checks.check_rotating_rows(
        4, head_dim=24, hidden_size=40, device="cpu"
    ),
    "rotating_rows_partial_norm": lambda: checks.check_rotating_rows(
        2, head_dim=32, rotary_dim=16, hidden_size=1500, with_norm=True, device="cpu"
    ),
    "store": lambda: checks.check_store(4, head_dim=24, device="cpu"),
    "swap": lambda: checks.check_swap(3, head_dim=24, device="cpu"),
    "swap_few_programs": lambda: checks.check_swap(
        3, num_kv_heads=3, head_dim=24, device="cpu", max_programs=4
    ),
    "swap_nothing": lambda: checks.check_swap(0, device="cpu"),
    "handover": lambda: checks.check_handover(3, 2, width=72, device="cpu"),
    "handover_few_programs": lambda: checks.check_handover(7, 6, device="cpu", max_programs=2),
    "handover_nothing": lambda: checks.check_handover(2, 0, device="cpu"),
    "host_pool_attention": lambda: checks.check_host_pool_attention(
        [17, 0, 1, 33, 30], group_size=3, head_dim=24, num_kv_heads=2, device="cpu"
    ),
    "host_pool_attention_fp16": lambda: checks.check_host_pool_attention(
        [70], group_size=1, head_dim=32, num_kv_heads=3, block_size=32, dtype=torch.float16,
        device="cpu",
    ),
    "host_pool_attention_nothing": lambda: checks.check_host_pool_attention([], device="cpu"),
    "norm": lambda: checks.check_norm(2, 48, device="cpu"),
    "skinny_linear": lambda: checks.check_skinny_linear(3, 128, 512, with_bias=True, device="cpu"),
    "norm_between_linears": lambda: checks.check_norm_between_linears(
        3, 384, 256, 128, with_bias=True, device="cpu"
    ),
    "embedding": lambda: checks.check_embedding(3, 40, device="cpu"),
    "greedy_tokens": lambda: checks.check_greedy_tokens(3, 20_000, device="cpu"),
    "silu": lambda: checks.check_silu(2, 40, device="cpu"),
}  # fmt: skip


def main() -> None:
    """Runs all cases; a failure is reported, not raised, so that the others still run."""
    for name, check in CASES.items():
        start = time.perf_counter()
        error = ""
        try:
            check()
        except Exception:
            error = traceback.format_exc()
        seconds = time.perf_counter() - start
        print(json.dumps({"case": name, "seconds": round(seconds, 2), "error": error}), flush=True)


if __name__ == "__main__":
    main()
