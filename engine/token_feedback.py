"""The tokens that the last step sampled, on the device, for the step that follows it.

A step can be launched before anyone on the host knows what the one before it sampled: its rows name
the place of their token among those instead.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch

from engine.batch import Batch
from engine.request import Request

NO_SOURCE = -1


class TokenFeedback:
    """Where sampled tokens wait.

    Args:
        max_num_seqs: Most tokens that a step samples.
        device: Where.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.token_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        """`[max_num_seqs]`, int64, device; in batch order of the step that sampled them."""
        self._rows: dict[Request, int] = {}

    def source(self, request: Request) -> int:
        """Return the place of a request's pending token."""
        return self._rows[request]

    def note(self, requests: Iterable[Request]) -> None:
        """Remember for whom the step just launched samples."""
        self._rows = {request: row for row, request in enumerate(requests)}

    def keep(self, token_ids: torch.Tensor) -> None:
        """Keep what the step just launched samples."""
        self.token_ids[: token_ids.shape[0]].copy_(token_ids)

    def complete(self, batch: Batch) -> Batch:
        """Return a batch with all that its tokens are taken from."""
        return batch if batch.sources is None else replace(batch, sampled=self.token_ids)
