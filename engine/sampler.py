"""From logits to tokens, for a whole batch at once on the device.

Each draw uses one uniform number derived from the request's seed and the token's index alone, and
inverts the cumulative distribution over the sorted vocabulary. So a seeded request gives the same
tokens whatever runs beside it, and goes on rightly after a preemption.

Sampling is launched first and read later: on a GPU nothing here waits for the device before
`PendingTokens.wait`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.request import Request
from engine.structured_output.mask import forbid_tokens
from engine.token_logprobs import TokenLogprobs
from engine.transfer import HostCopy, WrittenToHost, to_device, to_host

_MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One new token per row.

    Args:
        token_ids: The tokens.
        logprobs: Their log-probabilities, None where not asked for.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class PendingTokens:
    """New tokens on the device, on their way to the host.

    Args:
        token_ids: `[L]`, int64, device.
        logprobs: What was asked for; None if nothing was.
        on_host: The same tokens, if they go to the host by themselves; None copies them.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        logprobs: "_PendingLogprobs | None" = None,
        on_host: WrittenToHost | None = None,
    ) -> None:
        self.token_ids = token_ids
        self._logprobs = logprobs
        self._on_host = on_host or to_host(token_ids)

    def wait(self) -> SampledTokens:
        """Wait for the device and return tokens and log-probabilities on the host."""
        token_ids: list[int] = self._on_host.wait().tolist()
        found: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self._logprobs is not None:
            self._logprobs.fill(found, token_ids)
        return SampledTokens(token_ids, found)


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> SampledTokens:
    """Draw the next token of each request and wait for it; see `launch_sampling`."""
    return launch_sampling(logits, requests).wait()


@torch.inference_mode()
def launch_sampling(logits: torch.Tensor, requests: Sequence[Request]) -> PendingTokens:
    """Draw the next token of each request.

    Args:
        logits: `[L, vocab_size]`, float32 or the model's dtype, device; may be overwritten. The
            model's are inference tensors, which only inference mode may change.
        requests: Row `i` belongs to `requests[i]`.
    """
    if all(is_plainly_greedy(request) for request in requests):
        return PendingTokens(logits.argmax(dim=-1))
    logits = logits.float()
    raw = logits.clone() if any(r.params.logprobs is not None for r in requests) else None
    guided = [row for row, request in enumerate(requests) if request.grammar is not None]
    if guided:
        forbid_tokens(logits, requests, guided)
    _adjust(logits, requests)
    token_ids = logits.argmax(dim=-1)
    drawn = [row for row, request in enumerate(requests) if not request.params.is_greedy]
    if drawn:
        rows = to_device(drawn, torch.int64, logits.device)
        token_ids[rows] = _draw(logits[rows], [requests[row] for row in drawn])
    return PendingTokens(token_ids, _logprobs(raw, token_ids, requests))


def is_plainly_greedy(request: Request) -> bool:
    """Return whether a request takes the likeliest token, and nothing else is asked of it."""
    params = request.params
    return (
        params.is_greedy
        and params.logprobs is None
        and not params.needs_host_tokens
        and not params.logit_bias
        and request.num_output_tokens >= params.min_tokens
    )


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
            bias = to_device(list(params.logit_bias.values()), logits.dtype, logits.device)
            columns = to_device(list(params.logit_bias), torch.int64, logits.device)
            logits[row].index_add_(0, columns, bias)
        if request.num_output_tokens < params.min_tokens and request.grammar is None:
            banned = [token_id for token_id in request.stop_ids if token_id < vocab_size]
            columns = to_device(banned, torch.int64, logits.device)
            logits[row].index_fill_(0, columns, float("-inf"))


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
        return to_device(values, torch.float64, logits.device).unsqueeze(1)

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
    draws = [uniform(r.seed, r.num_output_tokens) for r in requests]
    target = column(draws) * cumulative[:, -1:]
    # The first entry whose cumulative probability exceeds the target has itself some probability.
    picked = torch.searchsorted(cumulative, target, right=True)
    picked = picked.clamp_(max=logits.shape[-1] - 1)
    return order.gather(1, picked).squeeze(1)


def _logprobs(
    raw: torch.Tensor | None, token_ids: torch.Tensor, requests: Sequence[Request]
) -> "_PendingLogprobs | None":
    """Compute the log-probabilities that were asked for, from untouched logits."""
    if raw is None:
        return None
    counts = {
        row: request.params.logprobs
        for row, request in enumerate(requests)
        if request.params.logprobs is not None
    }
    rows = to_device(list(counts), torch.int64, raw.device)
    logprobs = raw[rows].log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[rows].unsqueeze(1))
    values, ids = logprobs.topk(min(max(counts.values()), logprobs.shape[1]), dim=-1)
    ranks = (logprobs > own).sum(dim=-1) + 1
    return _PendingLogprobs(
        counts=counts,
        own=to_host(own.squeeze(1)),
        ranks=to_host(ranks),
        top_ids=to_host(ids),
        top_values=to_host(values),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _PendingLogprobs:
    """Log-probabilities on their way to the host; `counts` says how many tops a row asked for."""

    counts: dict[int, int]
    own: HostCopy
    ranks: HostCopy
    top_ids: HostCopy
    top_values: HostCopy

    def fill(self, found: list[TokenLogprobs | None], token_ids: Sequence[int]) -> None:
        """Put them where they belong."""
        own, ranks = self.own.wait().tolist(), self.ranks.wait().tolist()
        ids, values = self.top_ids.wait().tolist(), self.top_values.wait().tolist()
        for index, (row, count) in enumerate(self.counts.items()):
            found[row] = TokenLogprobs(
                token_id=token_ids[row],
                logprob=own[index],
                rank=ranks[index],
                top=tuple(zip(ids[index][:count], values[index][:count], strict=True)),
            )
