"""Which graphs are captured before there are requests that would wait for it."""

from dataclasses import replace

from engine.graph_ladders import GraphLadders, at_least
from engine.graph_limits import MAX_GRAPH_TOKENS, PROMPT_VISITORS, USUAL_DECODES, padded_tiles
from engine.graph_shape import GraphShape
from engine.lane_fields import LaneShape, PagedShape

_USUAL_TOKENS = (256, 512, MAX_GRAPH_TOKENS)
_WHOLE_PROMPTS = (128, 256, 384, 512, MAX_GRAPH_TOKENS)
"""Rows of steps in which prompts go to the host from their first token on."""
_USUAL_VISITORS = (4, PROMPT_VISITORS)


class UsualShapes:
    """Roomy shapes that most steps with prompts fit, and most that rotate rows.

    Args:
        ladders: The numbers that shapes have.
    """

    def __init__(self, ladders: GraphLadders) -> None:
        self._ladders = ladders

    def shapes(self, *, rotates: bool) -> list[GraphShape]:
        """Return them, with or without those that rotate rows."""
        tokens, most_visitors = self._ladders.tokens, self._ladders.visitors[-1]
        top = tokens[-1]
        sizes = sorted({at_least(tokens, min(number, top)) for number in _USUAL_TOKENS})
        mixed = [LaneShape(device=self._mixed(size)) for size in sizes]
        shapes = [GraphShape((lane,)) for lane in mixed]
        if not rotates:
            return shapes
        visitors = [
            at_least(self._ladders.visitors, min(number, most_visitors))
            for number in _USUAL_VISITORS
        ]
        most = visitors[-1]
        bounds = zip((0, *USUAL_DECODES), USUAL_DECODES, strict=False)
        decodes = [PagedShape(), *(self._decodes_between(low + 1, high) for low, high in bounds)]
        lanes = [LaneShape(device=self._mixed(size - most)) for size in sizes]
        shares = [top // 4, top // 2]
        on_device = [*decodes, *(self._mixed(padded_tiles(share)) for share in shares)]
        lanes += [
            self._filled(size, device, most)
            for size in sizes
            for device in on_device
            if device.num_tokens + most < size
        ]
        lanes += [
            replace(self._filled(size, device, most), num_prefix=0)
            for size in sorted({at_least(tokens, min(number, top)) for number in _WHOLE_PROMPTS})
            for device in decodes
            if device.num_tokens + most < size
        ]
        shapes += [_with_visitors(lane, most) for lane in dict.fromkeys(lanes)]
        begun = [self._filled(size, device, 0) for size in sizes[1:] for device in decodes]
        shapes += [GraphShape((lane,)) for lane in dict.fromkeys(begun)]
        rows = [LaneShape(device=device) for device in dict.fromkeys(decodes)]
        return shapes + [_with_visitors(lane, n) for lane in rows for n in dict.fromkeys(visitors)]

    def _filled(self, num_rows: int, device: PagedShape, num_visitors: int) -> LaneShape:
        """Return a lane of so many rows, the rest of them prompts that go to the host."""
        ladders = self._ladders
        num_tokens = num_rows - device.num_tokens - num_visitors
        prefills = PagedShape(num_tokens, 0, ladders.prefills[0], ladders.max_width)
        return LaneShape(
            device=device,
            host_prefills=prefills,
            num_prefix=ladders.prefixes[0] if ladders.uses_staging else 0,
            num_written=ladders.num_written(prefills),
        )

    def _decodes_between(self, least: int, most: int) -> PagedShape:
        """Return room for any number of decodes between two, of any length."""
        rows = self._ladders.few_rows
        most = at_least(rows, min(most, rows[-1]))
        num_splits = self._ladders.most_splits(least)
        return PagedShape(most, most, 0, self._ladders.max_width, num_splits)

    def _mixed(self, num_tokens: int) -> PagedShape:
        """Return room for prefill chunks and some decodes, of so many tokens together."""
        ladders = self._ladders
        most, num_prefills = ladders.mixed_decodes[0], ladders.prefills[0]
        num_splits = ladders.most_splits(most)
        return PagedShape(max(num_tokens, most), most, num_prefills, ladders.max_width, num_splits)


def _with_visitors(lane: LaneShape, number: int) -> GraphShape:
    return GraphShape((replace(lane, num_entering=number),), number)
