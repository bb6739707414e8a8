"""Forbids, on the device, the tokens that grammars do not allow."""

from collections.abc import Sequence

import torch

from engine.request import Request

_BITS_OF_A_BYTE = 8


def forbid_tokens(logits: torch.Tensor, requests: Sequence[Request], rows: Sequence[int]) -> None:
    """Set the logits of tokens that a row's grammar does not allow to minus infinity, in place.

    Only the given rows are uploaded, one bit a token. Stop tokens before `min_tokens` count as
    forbidden unless nothing else is allowed.

    Args:
        logits: `[L, vocab_size]`, float32, device.
        requests: Row `i` belongs to `requests[i]`.
        rows: Those with a grammar.
    """
    vocab_size = logits.shape[-1]
    allowed = _allowed_bits([requests[row] for row in rows], pinned=logits.is_cuda)
    on_device = allowed.to(logits.device, non_blocking=True)
    bits = 1 << torch.arange(_BITS_OF_A_BYTE, dtype=torch.uint8, device=logits.device)
    banned = (on_device.unsqueeze(-1) & bits).eq(0).flatten(1)[:, :vocab_size]
    index = torch.tensor(rows, device=logits.device)
    logits[index] = logits[index].masked_fill_(banned, float("-inf"))


def _allowed_bits(requests: Sequence[Request], *, pinned: bool) -> torch.Tensor:
    """Return `[len(requests), bytes]`, uint8, CPU: one bit a token, lowest first."""
    grammars = [request.grammar for request in requests]
    num_bytes = max(grammar.num_mask_bytes for grammar in grammars if grammar is not None)
    masks = torch.zeros(len(requests), num_bytes, dtype=torch.uint8, pin_memory=pinned)
    for mask, grammar, request in zip(masks, grammars, requests, strict=True):
        assert grammar is not None, "only rows with a grammar have a mask"
        grammar.write_mask(mask.data_ptr())
        if len(request.output_token_ids) < request.params.min_tokens:
            _clear(mask, request.stop_ids)
    return masks


def _clear(mask: torch.Tensor, token_ids: frozenset[int]) -> None:
    """Forbid some tokens of one row, unless none would be left."""
    kept = mask.clone()
    for token_id in token_ids:
        if token_id // _BITS_OF_A_BYTE < mask.shape[0]:
            kept[token_id // _BITS_OF_A_BYTE] &= 0xFF ^ (1 << token_id % _BITS_OF_A_BYTE)
    if kept.any():
        mask.copy_(kept)
