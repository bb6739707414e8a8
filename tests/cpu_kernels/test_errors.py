"""Every ValueError: it names the argument, and nothing has been written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes
from tests.cpu_kernels.oracle import make_case

pytestmark = pytest.mark.ispc

Arguments = dict[str, Any]


def decode_arguments() -> Arguments:
    case = make_case([5, 40])
    rows = torch.randn(2, 2, 128)
    return {
        "out": torch.zeros_like(case.q),
        "q": case.q,
        "k_cache": case.k_cache,
        "v_cache": case.v_cache,
        "block_tables": case.block_tables,
        "seq_lens": case.seq_lens,
        "softmax_scale": 0.1,
        "k": rows,
        "v": rows,
    }


BAD_DECODE: dict[str, tuple[str, Callable[[Arguments], Any], str]] = {
    "q dtype": ("q", lambda a: a["q"].double(), "q: expected bfloat16"),
    "q dim": ("q", lambda a: a["q"][0], "q: expected shape"),
    "q heads apart": ("q", lambda a: a["q"].repeat(1, 1, 2)[:, :, :128], "q: expected contig"),
    "q head_dim": ("q", lambda a: a["q"][:, :, :64], "q: expected shape"),
    "group": ("q", lambda a: a["q"][:, :3].contiguous(), "q: expected 1 to 16 query heads"),
    "group 17": ("q", lambda a: torch.zeros(2, 34, 128), "q: expected 1 to 16 query heads"),
    "out shape": ("out", lambda a: a["out"][:1], "out: expected shape"),
    "out dtype": ("out", lambda a: a["out"].half(), "out: expected torch.float32"),
    "k missing": ("k", lambda a: None, "k and v: expected both or neither"),
    "k shape": ("k", lambda a: a["k"][:, :1], "k: expected shape"),
    "v dtype": ("v", lambda a: a["v"].half(), "v: expected torch.float32"),
    "k_cache dtype": ("k_cache", lambda a: a["k_cache"].double(), "k_cache: expected bfloat16"),
    "k_cache dim": ("k_cache", lambda a: a["k_cache"][0], "k_cache: expected 4 dimensions"),
    "k_cache strided": ("k_cache", lambda a: a["k_cache"][::2], "k_cache: expected a contiguous"),
    "k_cache device": ("k_cache", lambda a: a["k_cache"].to("meta"), "k_cache: expected a CPU"),
    "v_cache shape": ("v_cache", lambda a: a["k_cache"], "v_cache: expected shape"),
    "v_cache dtype": ("v_cache", lambda a: a["v_cache"].half(), "v_cache: expected torch.bfloat"),
    "head_dim": ("k_cache", lambda a: torch.zeros(3, 2, 72, 16), "head_dim: expected one of"),
    "block_size": ("k_cache", lambda a: torch.zeros(3, 2, 64, 8), "block_size: expected one of"),
    "tables shape": ("block_tables", lambda a: a["block_tables"][:1], "block_tables: expected sh"),
    "tables dtype": ("block_tables", lambda a: a["block_tables"].long(), "block_tables: expected"),
    "tables stride": (
        "block_tables",
        lambda a: a["block_tables"].repeat(1, 2)[:, ::2],
        "block_tables: expected a last stride",
    ),
    "block id high": (
        "block_tables",
        lambda a: torch.full_like(a["block_tables"], len(a["k_cache"])),
        r"block_tables\[0, 0\]: expected a block id",
    ),
    "block id low": (
        "block_tables",
        lambda a: torch.full_like(a["block_tables"], -1),
        r"block_tables\[0, 0\]: expected a block id",
    ),
    "lens shape": ("seq_lens", lambda a: a["seq_lens"][:1], "seq_lens: expected shape"),
    "lens dtype": ("seq_lens", lambda a: a["seq_lens"].long(), "seq_lens: expected torch.int32"),
    "lens high": ("seq_lens", lambda a: a["seq_lens"] + 100, r"seq_lens\[0\]: expected 0 to 48"),
    "lens negative": ("seq_lens", lambda a: -a["seq_lens"], r"seq_lens\[0\]: expected 0 to"),
}


@pytest.mark.parametrize("name", BAD_DECODE)
def test_decode_refuses(attention: CpuAttention, name: str) -> None:
    key, change, message = BAD_DECODE[name]
    arguments = decode_arguments()
    out, before = arguments["out"], arguments["k_cache"].clone()
    cache = arguments["k_cache"]
    arguments[key] = change(arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        attention.paged_decode_attention(**arguments)
    assert (out == 0).all()
    assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))


def test_store_refuses(attention: CpuAttention) -> None:
    k_cache, v_cache = torch.zeros(2, 1, 64, 16), torch.zeros(2, 1, 16, 64)
    rows, slots = torch.ones(2, 1, 64), torch.tensor([0, 1])
    bad: list[tuple[str, list[torch.Tensor]]] = [
        ("k: expected shape", [rows[:, :, :32], rows, k_cache, v_cache, slots]),
        ("v: expected torch.float32", [rows, rows.half(), k_cache, v_cache, slots]),
        ("slot_mapping: expected shape", [rows, rows, k_cache, v_cache, slots[:1]]),
        ("slot_mapping: expected torch.int64", [rows, rows, k_cache, v_cache, slots.int()]),
        (r"slot_mapping\[1\]: expected less than 32", [rows, rows, k_cache, v_cache, slots + 31]),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=f"^{message}"):
            attention.store_kv(*arguments)
    assert k_cache.sum() == v_cache.sum() == 0


def test_gather_refuses(attention: CpuAttention) -> None:
    k_cache, v_cache = torch.zeros(2, 1, 64, 16), torch.zeros(2, 1, 16, 64)
    table = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^seq_len: expected 0 to 32"):
        attention.gather_kv(k_cache, v_cache, table, 33)
    with pytest.raises(ValueError, match=r"^block_table\[1\]: expected a block id from 0 to 1"):
        attention.gather_kv(k_cache, v_cache, table, 17)
    with pytest.raises(ValueError, match=r"^block_table: expected torch.int32"):
        attention.gather_kv(k_cache, v_cache, table.long(), 16)


def test_shapes_refuse() -> None:
    with pytest.raises(ValueError, match=r"^head_dim: expected one of"):
        host_kv_shapes(1, 1, 100, 16)
    with pytest.raises(ValueError, match=r"^block_size: expected one of"):
        host_kv_shapes(1, 1, 128, 24)


def test_constructor_refuses(kernel_cache: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_threads: expected 1 to 1024, got 0"):
        CpuAttention(kernel_cache, 0)
    with pytest.raises(ValueError, match=r"^spin_us: expected"):
        CpuAttention(kernel_cache, 1, spin_us=-1)
