"""What a graph is captured for: how many rows of each kind it has room for."""

from dataclasses import dataclass

from engine.lane_fields import LaneShape, PagedShape


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What a graph is captured for.

    Args:
        lanes: Its sub-batches.
        num_visitors: Rotating rows that every layer has room for.
    """

    lanes: tuple[LaneShape, ...]
    num_visitors: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that the first layer computes, and those between with other visitors."""
        return sum(lane.num_rows for lane in self.lanes)

    @property
    def num_prefix(self) -> int:
        """Blocks that may come back from the host, for which attention waits in each layer."""
        return sum(lane.num_prefix for lane in self.lanes)

    @property
    def recurs(self) -> bool:
        """Whether many steps have this very shape: those that only decode on the device."""
        return len(self.lanes) == 1 and self.lanes[0].only_decodes

    def holds(self, other: "GraphShape") -> bool:
        """Return whether steps of another shape can take a graph of this one.

        Nothing but room may differ: a graph that hands rows over waits for answers.
        """
        return (
            len(self.lanes) == len(other.lanes)
            and all(map(_holds, self.lanes, other.lanes))
            and _has_room(self.num_visitors, other.num_visitors)
        )


def _holds(lane: LaneShape, other: LaneShape) -> bool:
    return (
        _holds_rows(lane.device, other.device)
        and _holds_rows(lane.host_prefills, other.host_prefills)
        and _has_room(lane.num_host_decodes, other.num_host_decodes)
        and _has_room(lane.num_entering, other.num_entering)
        and lane.num_prefix >= other.num_prefix
        and lane.num_written >= other.num_written
    )


def _holds_rows(rows: PagedShape, other: PagedShape) -> bool:
    return (
        _has_room(rows.num_tokens, other.num_tokens)
        and _has_room(rows.num_prefills, other.num_prefills)
        and rows.num_decodes >= other.num_decodes
        and rows.width >= other.width
        and rows.num_splits >= other.num_splits
    )


def _has_room(number: int, other: int) -> bool:
    return number >= other and bool(number) == bool(other)
