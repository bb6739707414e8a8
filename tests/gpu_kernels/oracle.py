"""Slow, obvious float32 references, independent of the kernels. Imported only by tests."""

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Causal attention of the last len(q) tokens, every step in `dtype`.

    q [n, num_q_heads, head_dim]; k, v [seq_len, num_kv_heads, head_dim]; returns q's shape.
    """
    num_new, seq_len = q.shape[0], k.shape[0]
    group_size = q.shape[1] // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group_size, dim=1)
    values = v.to(dtype).repeat_interleave(group_size, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(dtype), keys) * softmax_scale
    q_pos = torch.arange(seq_len - num_new, seq_len, device=q.device)
    is_future = torch.arange(seq_len, device=q.device)[None, :] > q_pos[:, None]
    scores = scores.masked_fill(is_future, float("-inf"))
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), values)


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates [n, heads, head_dim] in cos_sin's dtype; elements past rotary_dim pass."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    cos = torch.cat([cos, cos], dim=-1)[:, None, :]
    sin = torch.cat([sin, sin], dim=-1)[:, None, :]
    rotary = x[..., :rotary_dim].to(cos_sin.dtype)
    low, high = rotary.chunk(2, dim=-1)
    rotated = rotary * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([rotated, x[..., rotary_dim:].to(cos_sin.dtype)], dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises the last dimension in float32, rounding as transformers does when x is half."""
    wide = x.float()
    normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, every product and sum in x's dtype."""
    out = x @ weight.to(x.dtype).T
    return out if bias is None else out + bias.to(x.dtype)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in gate_up's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swap_out(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    device_block_ids: list[int],
    k_host: torch.Tensor,
    v_host: torch.Tensor,
    host_block_ids: list[int],
) -> None:
    """Copies [num_layers, block, ...] one block at a time, K transposed on the host's side."""
    for block, host_block in zip(device_block_ids, host_block_ids, strict=True):
        k_host[:, host_block] = k_cache[:, block].transpose(-1, -2)
        v_host[:, host_block] = v_cache[:, block]


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Exactness where both may hold NaN."""
    bits = [tensor.cpu().contiguous().view(torch.uint8) for tensor in (got, expected)]
    assert torch.equal(bits[0], bits[1])


def assert_close(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """The house rule: max error at most twice that of plain torch in the kernel's dtype + 1e-5.

    `exact` is the float32 reference, `plain` the same computed by torch in the kernel's dtype. Both
    may have more rows than `got`, so that few rows are not measured by luck.
    """
    assert not torch.isnan(got).any(), "NaN in the result"
    if got.numel() == 0:
        return
    error = (got.float() - exact[: got.shape[0]].float()).abs().max().item()
    allowed = 2 * (plain.float() - exact.float()).abs().max().item() + 1e-5
    assert error <= allowed, f"max error {error:.3g}, allowed {allowed:.3g}"
