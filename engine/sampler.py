"""From logits to tokens, for a whole batch at once on the device.

Each draw uses one uniform number derived from the request's seed and the token's index alone, and
inverts the cumulative distribution over the sorted vocabulary. So a seeded request gives the same
tokens whatever runs beside it, and goes on rightly after a preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.request import Request
from engine.structured_output.mask import forbid_tokens

_MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, before penalties, bias, temperature or truncation.

    Args:
        token_id: The sampled token.
        logprob: Its log-probability.
        rank: Its rank among all tokens, 1 is the likeliest.
        top: The likeliest tokens and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One new token per row.

    Args:
        token_ids: The tokens.
        logprobs: Their log-probabilities, None where not asked for.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
    """Draw the next token of each request.

    Args:
        logits: `[L, vocab_size]`, float32, device; overwritten. The model's are inference tensors,
            which only inference mode may change.
        requests: Row `i` belongs to `requests[i]`.

    Returns:
        Tokens and log-probabilities on the host.
    """
    if not requests:
        return SampledTokens([], [])
    raw = logits.clone() if any(r.params.logprobs is not None for r in requests) else None
    guided = [row for row, request in enumerate(requests) if request.grammar is not None]
    if guided:
        forbid_tokens(logits, requests, guided)
    _adjust(logits, requests)
    token_ids = logits.argmax(dim=-1)
    drawn = [row for row, request in enumerate(requests) if not request.params.is_greedy]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        token_ids[rows] = _draw(logits[rows], [requests[row] for row in drawn])
    ids: list[int] = token_ids.tolist()
    return SampledTokens(ids, _logprobs(raw, ids, requests))


def uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends on the two arguments alone.

    The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, OOPSLA 2014), applied to seed and index in turn.
    """
    state = 0
    for word in (seed & _MASK_64, index):
        state = (state + word + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return (state >> 11) / 2**53


def _adjust(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Apply penalties, bias and the minimum length in place."""
    vocab_size = logits.shape[-1]
    for row, request in enumerate(requests):
        params = request.params
        if params.has_penalties:
            _penalise(logits[row], request)
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()), device=logits.device)
            logits[row, list(params.logit_bias)] += bias
        if len(request.output_token_ids) < params.min_tokens and request.grammar is None:
            banned = [token_id for token_id in request.stop_ids if token_id < vocab_size]
            logits[row, banned] = float("-inf")


def _penalise(logits: torch.Tensor, request: Request) -> None:
    """Lower the logits of tokens seen before; `logits` is one row, changed in place."""
    params = request.params
    output = torch.tensor(request.output_token_ids, dtype=torch.int64, device=logits.device)
    counts = torch.bincount(output, minlength=logits.shape[0])
    seen = counts > 0
    if params.repetition_penalty != 1.0:
        prompt = torch.tensor(request.prompt_token_ids, device=logits.device)
        repeated = seen.index_fill(0, prompt, True)
        factor = torch.where(logits > 0, 1.0 / params.repetition_penalty, params.repetition_penalty)
        logits.copy_(torch.where(repeated, logits * factor, logits))
    logits -= params.frequency_penalty * counts + params.presence_penalty * seen


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Return one token per row, `[R]`, int64, for rows that are not greedy."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    params = [request.params for request in requests]
    # From the maximum down, so that no temperature is too small.
    below = logits.double() - logits.amax(dim=-1, keepdim=True)
    scaled = below / column([p.temperature for p in params])
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    probs = ordered.softmax(dim=-1)
    keep = ranks < column([p.top_k if p.top_k > 0 else logits.shape[-1] for p in params])
    probs = probs * keep
    probs = probs / probs.sum(dim=-1, keepdim=True)
    # A token stays while those before it have not reached top_p; the first always stays.
    keep = probs.cumsum(dim=-1) - probs < column([p.top_p for p in params])
    keep &= probs >= column([p.min_p for p in params]) * probs[:, :1]
    cumulative = (probs * keep).cumsum(dim=-1)
    draws = [uniform(r.seed, len(r.output_token_ids)) for r in requests]
    target = column(draws) * cumulative[:, -1:]
    # The first entry whose cumulative probability exceeds the target has itself some probability.
    picked = torch.searchsorted(cumulative, target, right=True)
    picked = picked.clamp_(max=logits.shape[-1] - 1)
    return order.gather(1, picked).squeeze(1)


def _logprobs(
    raw: torch.Tensor | None, token_ids: list[int], requests: Sequence[Request]
) -> list[TokenLogprobs | None]:
    """Return the log-probabilities that were asked for, from untouched logits."""
    found: list[TokenLogprobs | None] = [None] * len(requests)
    if raw is None:
        return found
    for row, request in enumerate(requests):
        if request.params.logprobs is None:
            continue
        logprobs = raw[row].log_softmax(dim=-1)
        own = logprobs[token_ids[row]]
        values, ids = logprobs.topk(min(request.params.logprobs, logprobs.shape[0]))
        found[row] = TokenLogprobs(
            token_id=token_ids[row],
            logprob=own.item(),
            rank=int((logprobs > own).sum().item()) + 1,
            top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
        )
    return found
