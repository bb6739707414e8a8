"""Runs each kernel once on small shapes, for compute-sanitizer.

`compute-sanitizer --tool memcheck python -m tests.gpu_kernels.sanitize_cases`, or racecheck. Set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation whose ends are guarded.
"""

import torch

from tests.gpu_kernels import kernel_checks as checks


def main() -> None:
    """Compares as the tests do; an out-of-bounds access is the sanitizer's to report."""
    for dtype in (torch.bfloat16, torch.float32):
        for num_splits in (1, 3):
            checks.check_decode([1, 0, 17, 300], head_dim=80, dtype=dtype, num_splits=num_splits)
        checks.check_decode([16, 129], head_dim=128, dtype=dtype, num_splits=2)
        checks.check_decode([2100], head_dim=128, num_kv_heads=1, dtype=dtype)
        checks.check_prefill([(0, 33), (40, 1), (0, 0), (100, 140)], head_dim=128, dtype=dtype)
        checks.check_prefill([(5, 20)], group_size=3, head_dim=80, dtype=dtype)
        checks.check_rope_store(7, head_dim=80, dtype=dtype)
        checks.check_rope_store(7, head_dim=128, rotary_dim=64, with_norm=True, dtype=dtype)
        checks.check_rotating_rows(5, head_dim=80, dtype=dtype)
        checks.check_rotating_rows(5, head_dim=128, rotary_dim=64, with_norm=True, dtype=dtype)
        checks.check_store(7, num_kv_heads=3, head_dim=80, dtype=dtype)
        for pinned in (False, True):
            checks.check_swap(
                5, num_kv_heads=3, head_dim=80, block_size=48, dtype=dtype, pinned=pinned
            )
            checks.check_host_pool_attention(
                [1, 0, 17, 300], num_kv_heads=3, head_dim=80, dtype=dtype, pinned=pinned
            )
        checks.check_norm(3, 576, dtype=dtype)
        checks.check_silu(3, 1100, dtype=dtype)
    torch.cuda.synchronize()
    print("all sanitizer cases ran")


if __name__ == "__main__":
    main()
