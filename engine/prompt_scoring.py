"""Log-probabilities of prompt tokens, from the rows that a prefill computes anyway.

The vocabulary projection of a long prompt would take gigabytes at once, so it is done in pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.batch import ScoredRows
from engine.models import DecoderModel
from engine.token_logprobs import TokenLogprobs

MAX_PIECE_BYTES = 64 * 2**20
"""Of float32 logits; a few times as much is taken while they are looked at."""

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of some prompt tokens of one request.

    Args:
        request_id: Whose.
        start: Index in the prompt of the first one.
        logprobs: Of the tokens from there.
    """

    request_id: str
    start: int
    logprobs: list[TokenLogprobs]


@torch.inference_mode()
def score_prompts(
    model: DecoderModel, states: torch.Tensor, scored: Sequence[ScoredRows]
) -> list[PromptScores]:
    """Score the prompt tokens that a sub-batch's rows predict.

    Args:
        model: Projects to the vocabulary.
        states: What the sub-batch's rows came to, `[T, H]`.
        scored: Which rows, and which token comes next after each.
    """
    piece = max(1, MAX_PIECE_BYTES // (_FLOAT32_BYTES * model.config.vocab_size))
    found = []
    for wanted in scored:
        logprobs: list[TokenLogprobs] = []
        for at in range(0, len(wanted.token_ids), piece):
            first_row, token_ids = wanted.first_row + at, wanted.token_ids[at : at + piece]
            logits = model.logits(states[first_row : first_row + len(token_ids)])
            logprobs += _pick(logits.float().log_softmax(dim=-1), token_ids, wanted.num_top)
        found.append(PromptScores(wanted.request_id, wanted.start, logprobs))
    return found


def _pick(logprobs: torch.Tensor, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Return the entries of some tokens.

    Args:
        logprobs: `[R, vocab_size]`, float32, device.
        token_ids: One a row.
        num_top: How many of the likeliest tokens to name beside it.
    """
    own = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device).unsqueeze(1))
    ranks = (logprobs > own).sum(dim=1) + 1
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
    columns = (own.squeeze(1).tolist(), ranks.tolist(), ids.tolist(), values.tolist())
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, rank, top_ids, top_values in zip(token_ids, *columns, strict=True)
    ]
