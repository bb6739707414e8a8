"""Deals host-resident decode rows to the two sub-batches of an asymmetric step.

Rows come in the order of their right to be computed. Those that go to sub-batch 1 are dealt first:
its window is the linear work of sub-batch 0, which holds the prefills. Pure arithmetic on numbers
of tokens; the exact exposed wait is the business of `engine.cost_model.predict`.

Source: the NEO paper, arXiv 2411.01142 (balance, hide the CPU).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.cost_model import CostModel, SubBatchLoad


@dataclass(frozen=True, slots=True)
class Deal:
    """How the first k rows are dealt: indices of rows, `second` as two ranges."""

    first: range
    second: tuple[range, range]


@dataclass(frozen=True, slots=True)
class Windows:
    """How many rows each sub-batch's window hides: of sub-batch 1 first, then of sub-batch 0."""

    num_second: int
    num_first: int

    @property
    def num_hidden(self) -> int:
        """Rows that cost the device no waiting."""
        return self.num_second + self.num_first

    def deal(self, num_rows: int) -> Deal:
        """Deal the first `num_rows` rows; those that no window hides are dealt evenly."""
        second = min(num_rows, self.num_second)
        first = min(num_rows - second, self.num_first)
        first += (num_rows - second - first) // 2
        return Deal(range(second, second + first), (range(second), range(second + first, num_rows)))


def prefix_sums(row_tokens: Sequence[int]) -> list[int]:
    """Return the tokens of the first 0, 1, 2, ... rows."""
    sums = [0]
    for tokens in row_tokens:
        sums.append(sums[-1] + tokens)
    return sums


def hidden_windows(model: CostModel, base: SubBatchLoad, prefix: Sequence[int]) -> Windows:
    """Return how many rows hide behind the device's work.

    Args:
        model: Times of the parts.
        base: Sub-batch 0 without host rows.
        prefix: Tokens of the first 0, 1, 2, ... rows.
    """
    num_rows = len(prefix) - 1
    window_s = model.linear_s(max(1, base.num_rows))
    second = largest(num_rows, lambda n: model.cpu_attention_s(n, prefix[n]) <= window_s)
    # Without rows in the other sub-batch there is no other sub-batch to hide behind.
    other_s = model.linear_s(second) if second else 0.0
    window_s = other_s + device_attention_s(model, base)
    first = largest(
        num_rows - second,
        lambda n: model.cpu_attention_s(n, prefix[second + n] - prefix[second]) <= window_s,
    )
    return Windows(second, first)


def hidden_in_one(model: CostModel, base: SubBatchLoad, prefix: Sequence[int]) -> int:
    """Return how many rows hide behind the device's attention when there is one sub-batch."""
    window_s = device_attention_s(model, base)
    return largest(
        len(prefix) - 1, lambda n: n == 0 or model.cpu_attention_s(n, prefix[n]) <= window_s
    )


def device_attention_s(model: CostModel, base: SubBatchLoad) -> float:
    """Return one layer's attention on the device."""
    return base.prefill_attention_s + model.gpu_attention_s(base.num_gdec, base.gdec_tokens)


def dealt_loads(base: SubBatchLoad, prefix: Sequence[int], deal: Deal) -> list[SubBatchLoad]:
    """Return the two sub-batches' loads."""
    first_tokens = prefix[deal.first.stop] - prefix[deal.first.start]
    num_second = sum(len(rows) for rows in deal.second)
    second_tokens = sum(prefix[rows.stop] - prefix[rows.start] for rows in deal.second)
    return [
        replace(base, num_cdec=len(deal.first), cdec_tokens=first_tokens),
        SubBatchLoad(num_cdec=num_second, cdec_tokens=second_tokens),
    ]


def one_load(base: SubBatchLoad, prefix: Sequence[int], num_rows: int) -> list[SubBatchLoad]:
    """Return the load of one sub-batch that holds everything."""
    return [replace(base, num_cdec=num_rows, cdec_tokens=prefix[num_rows])]


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest n from 0 to `most` that fits, where all smaller ones fit too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
