"""Every wrong argument gets a ValueError that names it; empty batches pass. Needs no GPU."""

from typing import Any

import pytest
import torch

import gpu_kernels
from gpu_kernels.few_rows import NUM_COUNTERS
from gpu_kernels.tiles import MAX_SPLITS, decode_num_splits

H, KV, D, B, N, L = 4, 2, 32, 16, 3, 2
F16, F32, I32, I64 = torch.float16, torch.float32, torch.int32, torch.int64


def zeros(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def decode_args(n: int = N) -> dict[str, Any]:
    return {
        "out": zeros(n, H, D), "q": zeros(n, H, D), "k_cache": zeros(5, KV, B, D),
        "v_cache": zeros(5, KV, B, D), "block_tables": zeros(n, 2, dtype=I32),
        "seq_lens": zeros(n, dtype=I32), "softmax_scale": 1.0, "max_seq_len": 8,
    }  # fmt: skip


def prefill_args(n: int = N) -> dict[str, Any]:
    args = decode_args(n) | {"cu_seqlens_q": zeros(n + 1, dtype=I32)}
    del args["max_seq_len"]
    return args


def rope_args(n: int = N) -> dict[str, Any]:
    return {
        "q": zeros(n, H, D), "k": zeros(n, KV, D), "v": zeros(n, KV, D),
        "positions": zeros(n, dtype=I64), "cos_sin_cache": zeros(9, D, dtype=F32),
        "k_cache": zeros(5, KV, B, D), "v_cache": zeros(5, KV, B, D),
        "slot_mapping": zeros(n, dtype=I64),
    }  # fmt: skip


def store_args(n: int = N) -> dict[str, Any]:
    names = ("k", "v", "k_cache", "v_cache", "slot_mapping")
    return {name: value for name, value in rope_args(n).items() if name in names}


def swap_args(n: int = N) -> dict[str, Any]:
    return {
        "k_cache": zeros(L, 5, KV, B, D), "v_cache": zeros(L, 5, KV, B, D),
        "device_block_ids": zeros(n, dtype=I32), "k_host": zeros(L, 6, KV, D, B),
        "v_host": zeros(L, 6, KV, B, D), "host_block_ids": zeros(n, dtype=I32),
    }  # fmt: skip


def send_args(n: int = N) -> dict[str, Any]:
    return {
        "rows": zeros(2, n, D), "src": zeros(n, D), "bells": zeros(2, 2, 16, dtype=I32),
        "parameters": zeros(3, dtype=I32), "counter": zeros(1, dtype=I32), "offset": 0,
    }  # fmt: skip


def receive_args(n: int = N) -> dict[str, Any]:
    return {
        "dst": zeros(n, D), "answers": zeros(2, n, D), "bells": zeros(2, 2, 16, dtype=I32),
        "parameters": zeros(3, dtype=I32), "seen": zeros(2, dtype=I32),
        "waited": zeros(1, dtype=torch.int64), "offset": 0, "limit_s": 1.0,
    }  # fmt: skip


def depart_args(n: int = N) -> dict[str, Any]:
    width = (H + 2 * KV) * D
    return {
        "sent": zeros(n, width), "kept": zeros(5, 48), "qkv": zeros(n, width),
        "residual": zeros(n, 48), "positions": zeros(n, dtype=I64), "slots": zeros(n, dtype=I64),
        "cos_sin_cache": zeros(9, D, dtype=F32), "num_q_heads": H, "num_kv_heads": KV,
    }  # fmt: skip


def rejoin_args(n: int = N) -> dict[str, Any]:
    return {
        "out": zeros(n, D), "residual": zeros(n, 48), "answers": zeros(7, D),
        "answer_ids": zeros(n, dtype=I64), "kept": zeros(5, 48), "slots": zeros(n, dtype=I64),
    }  # fmt: skip


def pcie_args(n: int = N) -> dict[str, Any]:
    return {
        "out": zeros(7, H * D), "sent": zeros(5, (H + 2 * KV) * D),
        "entries": zeros(4, n, dtype=I32), "blocks": zeros(9, dtype=I32),
        "k_host": zeros(6, KV, D, B), "v_host": zeros(6, KV, B, D),
        "softmax_scale": 1.0,
    }  # fmt: skip


def norm_args(n: int = N) -> dict[str, Any]:
    return {"out": zeros(n, D), "x": zeros(n, D), "weight": zeros(D), "eps": 1e-5}


def add_norm_args(n: int = N) -> dict[str, Any]:
    return norm_args(n) | {"residual": zeros(n, D)}


def silu_args(n: int = N) -> dict[str, Any]:
    return {"out": zeros(n, D), "gate_up": zeros(n, 2 * D)}


def skinny_args(n: int = N) -> dict[str, Any]:
    return {
        "out": zeros(n, 128),
        "x": zeros(n, 256),
        "weight": zeros(128, 256),
        "bias": zeros(128),
        "counters": zeros(NUM_COUNTERS, dtype=I32),
    }


def gated_args(n: int = N) -> dict[str, Any]:
    named = skinny_args(n) | {"out": zeros(n, 64)}
    return {name: value for name, value in named.items() if name != "counters"}


def embed_args(n: int = N) -> dict[str, Any]:
    ids = {name: zeros(n, dtype=I64) for name in ("input_ids", "sources", "sampled")}
    rows = {"out": zeros(n, D), "residual": zeros(n, D)}
    return rows | ids | {"table": zeros(9, D), "weight": zeros(D), "eps": 1e-6}


def greedy_args(n: int = N) -> dict[str, Any]:
    return {
        "token_ids": zeros(n, dtype=I64),
        "host_token_ids": zeros(2, N + 1, dtype=I64),
        "slot": zeros(1, dtype=I64),
        "logits": zeros(n, 99),
        "counters": zeros(N, dtype=I32),
    }


OPEN_NORM = gpu_kernels.OpenNorm(zeros(2, N + 1, dtype=torch.float32), 1e-6)


def skinny_norm_args(n: int = N) -> dict[str, Any]:
    return skinny_args(n) | {"residual": zeros(n, 128), "norm_weight": zeros(128), "eps": 1e-6}


LAUNCHERS: dict[str, tuple[Any, Any]] = {
    "decode": (gpu_kernels.paged_decode_attention, decode_args),
    "prefill": (gpu_kernels.paged_prefill_attention, prefill_args),
    "rope": (gpu_kernels.rope_store_kv, rope_args),
    "store": (gpu_kernels.store_kv, store_args),
    "swap_out": (gpu_kernels.swap_out_kv, swap_args),
    "swap_in": (gpu_kernels.swap_in_kv, swap_args),
    "send": (gpu_kernels.send_rows, send_args),
    "receive": (gpu_kernels.receive_rows, receive_args),
    "depart": (gpu_kernels.depart_rows, depart_args),
    "rejoin": (gpu_kernels.rejoin_rows, rejoin_args),
    "pcie": (gpu_kernels.host_pool_attention, pcie_args),
    "norm": (gpu_kernels.rms_norm, norm_args),
    "add_norm": (gpu_kernels.add_rms_norm, add_norm_args),
    "embed": (gpu_kernels.embed_rows, embed_args),
    "greedy": (gpu_kernels.greedy_tokens, greedy_args),
    "silu": (gpu_kernels.silu_and_mul, silu_args),
    "skinny": (gpu_kernels.skinny_linear, skinny_args),
    "skinny_norm": (gpu_kernels.skinny_linear_add_norm, skinny_norm_args),
    "gated": (gpu_kernels.skinny_gated_linear, gated_args),
}
TENSORS = [
    (launcher, name)
    for launcher, (_, make_args) in LAUNCHERS.items()
    for name, value in make_args().items()
    if isinstance(value, torch.Tensor)
]
WRONG_VALUES = [
    ("decode", {"max_seq_len": 0}, "max_seq_len"),
    ("decode", {"num_splits": 0}, "num_splits"),
    ("decode", {"num_splits": MAX_SPLITS + 1}, "num_splits"),
    ("decode", {"num_splits": 2, "workspace": zeros(10, dtype=F32)}, "workspace"),
    ("decode", {"counters": zeros(1, dtype=I32)}, "counters"),
    ("decode", {"counters": zeros(99)}, "counters"),
    ("decode", {"num_splits": 2, "workspace": zeros(10_000)}, "workspace"),
    ("decode", {"num_splits": 2, "workspace": zeros(9, 9999, dtype=F32).t()}, "workspace"),
    ("decode", {"q": zeros(N, 3, D), "out": zeros(N, 3, D)}, "num_q_heads"),
    ("decode", {"q": zeros(N, 34, D), "out": zeros(N, 34, D)}, "group size"),
    ("decode", {"k_cache": zeros(5, KV, 8, D), "v_cache": zeros(5, KV, 8, D)}, "block_size"),
    ("decode", {"k_cache": zeros(5, KV, D, B).transpose(2, 3)}, "k_cache"),
    ("decode", {"v_cache": zeros(10, KV, B, D)[::2]}, "v_cache"),
    ("decode", {"q": zeros(N, D, H).transpose(1, 2)}, "q"),
    ("decode", {"out": zeros(N, D, H).transpose(1, 2)}, "out"),
    ("decode", {"seq_lens": zeros(2 * N, dtype=I32)[::2]}, "seq_lens"),
    ("decode", {"block_tables": zeros(2, N, dtype=I32).t()}, "block_tables"),
    ("rope", {"positions": zeros(2 * N, dtype=I64)[::2]}, "positions"),
    ("rope", {"slot_mapping": zeros(2 * N, dtype=I64)[::2]}, "slot_mapping"),
    ("store", {"slot_mapping": zeros(2 * N, dtype=I64)[::2]}, "slot_mapping"),
    ("swap_in", {"max_programs": 0}, "max_programs"),
    ("send", {"src": zeros(D, N).t()}, "src"),
    ("send", {"rows": zeros(2, D, N).transpose(1, 2)}, "rows"),
    ("receive", {"bells": zeros(3, 2, 16, dtype=I32)}, "bells"),
    ("receive", {"parameters": zeros(6, dtype=I32)[::2]}, "parameters"),
    ("depart", {"num_q_heads": 3}, "qkv width"),
    ("depart", {"num_kv_heads": 0}, "qkv width"),
    ("depart", {"qkv": zeros((H + 2 * KV) * D, N).t()}, "qkv"),
    ("depart", {"sent": zeros((H + 2 * KV) * D, N).t()}, "sent"),
    ("depart", {"positions": zeros(2 * N, dtype=I64)[::2]}, "positions"),
    ("depart", {"slots": zeros(2 * N, dtype=I64)[::2]}, "slots"),
    ("depart", {"kept": zeros(5, 40)}, "kept"),
    ("depart", {"residual": zeros(48, N).t()}, "residual"),
    ("depart", {"cos_sin_cache": zeros(9, 7, dtype=F32)}, "rotary_dim"),
    ("depart", {"k_norm_weight": zeros(D)}, "k_norm_weight"),
    ("rejoin", {"out": zeros(D, N).t()}, "out"),
    ("pcie", {"sent": zeros(5, (H + 2 * KV) * D + 1)}, "sent width"),
    ("pcie", {"sent": zeros(5, 2 * KV * D)}, "sent width"),
    ("pcie", {"sent": zeros((H + 2 * KV) * D, 5).t()}, "sent"),
    ("pcie", {"out": zeros(H * D, 7).t()}, "out"),
    ("pcie", {"entries": zeros(N, 4, dtype=I32).t()}, "entries"),
    ("pcie", {"blocks": zeros(18, dtype=I32)[::2]}, "blocks"),
    ("pcie", {"k_host": zeros(6, KV, B, D).transpose(2, 3)}, "k_host"),
    ("pcie", {"v_host": zeros(6, KV, D, B)}, "v_host"),
    ("rejoin", {"answers": zeros(D, 7).t()}, "answers"),
    ("rejoin", {"answer_ids": zeros(2 * N, dtype=I64)[::2]}, "answer_ids"),
    ("rejoin", {"kept": zeros(48, 5).t()}, "kept"),
    ("norm", {"weight": zeros(2 * D)[::2]}, "weight"),
    ("prefill", {"seq_lens": zeros(2 * N, dtype=I32)[::2]}, "seq_lens"),
    ("prefill", {"cu_seqlens_q": zeros(2 * N + 2, dtype=I32)[::2]}, "cu_seqlens_q"),
    ("rope", {"cos_sin_cache": zeros(9, D + 2, dtype=F32)}, "rotary_dim"),
    ("rope", {"cos_sin_cache": zeros(9, 7, dtype=F32)}, "rotary_dim"),
    ("rope", {"cos_sin_cache": zeros(D, 9, dtype=F32).t()}, "cos_sin_cache"),
    ("rope", {"q_norm_weight": zeros(D)}, "k_norm_weight"),
    ("rope", {"q_norm_weight": zeros(D + 1), "k_norm_weight": zeros(D)}, "q_norm_weight"),
    ("rope", {"q_norm_weight": zeros(D), "k_norm_weight": zeros(D, dtype=F32)}, "k_norm_weight"),
    ("norm", {"x": zeros(N, 16385), "out": zeros(N, 16385)}, "hidden_size"),
    ("silu", {"gate_up": zeros(N, 7)}, "width"),
    ("embed", {"sources": zeros(N + 1, dtype=I64)}, "sources"),
    ("embed", {"sampled": zeros(2 * N, dtype=I64)[::2]}, "sampled"),
    ("embed", {"table": zeros(9, 2 * D)[:, ::2]}, "table"),
    ("embed", {"residual": zeros(N, D + 1)}, "residual"),
    ("greedy", {"host_token_ids": zeros(2, N - 1, dtype=I64)}, "host_token_ids"),
    ("greedy", {"counters": zeros(N - 1, dtype=I32)}, "counters"),
    ("greedy", {"slot": zeros(2, dtype=I64)}, "slot"),
    ("greedy", {"logits": zeros(99, N).t()}, "logits"),
    ("skinny", {"weight": zeros(64, 256)}, "x and weight"),
    ("skinny", {"open_norm": OPEN_NORM}, "squares"),
    ("gated", {"open_norm": OPEN_NORM}, "squares"),
    ("skinny_norm", {"residual": zeros(N, 256)}, "residual"),
    ("skinny_norm", {"norm_weight": zeros(256)}, "norm_weight"),
    ("skinny", {"weight": zeros(128, 64), "x": zeros(N, 64)}, "x and weight"),
    ("skinny", {"x": zeros(33, 256), "out": zeros(33, 128)}, "x and weight"),
    ("gated", {"weight": zeros(256, 128).t()}, "weight"),
]
WRONG_SWAPS: list[tuple[str, torch.Tensor]] = [
    ("v_cache", zeros(L, 6, KV, B, D)),
    ("v_cache", zeros(L, 6, KV, B, D)[:, :5]),
    ("k_cache", zeros(L, 5, KV, D, B).transpose(3, 4)),
    ("v_cache", zeros(L, 5, KV, D, B).transpose(3, 4)),
    ("k_cache", zeros(L, 10, KV, B, D)[:, ::2]),
    ("device_block_ids", zeros(N, 1, dtype=I32)),
    ("device_block_ids", zeros(N, dtype=I64)),
    ("device_block_ids", zeros(2 * N, dtype=I32)[::2]),
    ("host_block_ids", zeros(N + 1, dtype=I32)),
    ("host_block_ids", zeros(N, dtype=I64)),
    ("host_block_ids", zeros(2 * N, dtype=I32)[::2]),
    ("k_host", zeros(L + 1, 6, KV, D, B)),
    ("k_host", zeros(L, 6, KV + 1, D, B)),
    ("k_host", zeros(L, 6, KV, B, D)),
    ("k_host", zeros(L, 6, KV, D, B, dtype=F32)),
    ("k_host", zeros(L, 6, KV, B, D).transpose(3, 4)),
    ("v_host", zeros(L, 6, KV, D, B)),
    ("v_host", zeros(L, 7, KV, B, D)),
    ("v_host", zeros(L, 6, KV, B, D, dtype=F32)),
    ("v_host", zeros(L, 7, KV, B, D)[:, :6]),
    ("v_host", zeros(L, 12, KV, B, D)[:, ::2]),
]


@pytest.mark.parametrize(("launcher", "name"), TENSORS)
@pytest.mark.parametrize("wrong", ["shape", "dtype", "device"])
def test_wrong_tensor_is_named(launcher: str, name: str, wrong: str) -> None:
    launch, make_args = LAUNCHERS[launcher]
    args = make_args()
    tensor = args[name]
    changed = {
        "shape": lambda: tensor.new_zeros(1, 2, 3, 4, 5),
        "dtype": lambda: tensor.to(torch.float64),
        "device": lambda: tensor.to("meta"),
    }
    args[name] = changed[wrong]()
    with pytest.raises(ValueError, match=r"expected .* got "):
        launch(**args)


@pytest.mark.parametrize(("launcher", "change", "name"), WRONG_VALUES)
def test_wrong_value_is_named(launcher: str, change: dict[str, Any], name: str) -> None:
    launch, make_args = LAUNCHERS[launcher]
    with pytest.raises(ValueError, match=rf"{name}.*: expected .* got "):
        launch(**(make_args() | change))


@pytest.mark.parametrize("launcher", ["swap_out", "swap_in"])
@pytest.mark.parametrize(("name", "value"), WRONG_SWAPS)
def test_wrong_swap_is_named(launcher: str, name: str, value: torch.Tensor) -> None:
    launch, make_args = LAUNCHERS[launcher]
    with pytest.raises(ValueError, match=rf"{name}: expected .* got "):
        launch(**(make_args() | {name: value}))


@pytest.mark.parametrize("launcher", ["swap_out", "swap_in"])
@pytest.mark.parametrize("pageable", ["k_host", "v_host"])
def test_pageable_host_memory_is_refused(launcher: str, pageable: str) -> None:
    launch, make_args = LAUNCHERS[launcher]
    args = make_args()
    device_args = {name: value.to("meta") for name, value in args.items() if name != pageable}
    with pytest.raises(ValueError, match=rf"{pageable}: expected pinned .* got pageable "):
        launch(**(args | device_args))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_empty_batch_does_nothing(launcher: str) -> None:
    launch, make_args = LAUNCHERS[launcher]
    launch(**make_args(0))


@pytest.mark.parametrize(
    ("num_seqs", "max_seq_len", "expected"),
    [(24, 1100, 2), (64, 4000, 4), (1, 1100, 18), (1, 30_000, 58), (256, 1000, 1), (1, 1, 1)],
)
def test_number_of_splits_on_an_h200(num_seqs: int, max_seq_len: int, expected: int) -> None:
    assert decode_num_splits(num_seqs, 8, max_seq_len, 132) == expected
