"""Which graphs steps take: every step fits its own, and few are captured."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.graph_ladders import GraphLadders
from engine.graph_limits import prompt_room
from engine.graph_shape import GraphShape
from engine.kv_blocks import BlockPool
from engine.lane_fields import LaneShape, PagedShape
from engine.rotation import most_visitors, rotation_segments, segment_rows
from engine.shape_chooser import CAPTURE_ROWS, ShapeChooser
from engine.step_plan import RotatingRow, ScheduledRequest, SubBatch
from engine.usual_shapes import UsualShapes
from gpu_kernels.tiles import decode_num_splits
from tests.engine.step_simulation import make_request

NUM_LAYERS = 8
CHUNKS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 200)), max_size=5)
DECODES = st.lists(st.integers(1, 900), max_size=60)


def make_backend() -> SimpleNamespace:
    return SimpleNamespace(
        num_decode_splits=lambda num_seqs, longest: decode_num_splits(num_seqs, 8, longest, 132)
    )


def make_ladders(pool: BlockPool, *, max_num_seqs: int = 64) -> GraphLadders:
    return GraphLadders(
        make_backend(),
        pool,
        uses_staging=True,
        max_num_seqs=max_num_seqs,
        max_num_tokens=1024,
        max_model_len=1000,
        most_visitors=most_visitors(NUM_LAYERS, max_num_seqs),
    )


def shapes(*, max_num_seqs: int = 64, block_size: int = 16) -> ShapeChooser:
    pool = BlockPool(100, block_size)
    builder = SimpleNamespace(block_size=block_size)
    return ShapeChooser(
        make_backend(), builder, pool, make_ladders(pool, max_num_seqs=max_num_seqs)
    )


def usual_shapes(*, rotates: bool) -> list[GraphShape]:
    return UsualShapes(make_ladders(BlockPool(100, 16))).shapes(rotates=rotates)


def share(start: int, num_tokens: int) -> ScheduledRequest:
    return ScheduledRequest(make_request("r", start + num_tokens, 4), start, num_tokens)


def lane(*, gdec=(), gprf=(), cprf=(), cdec=(), rotating=0) -> SubBatch:
    return SubBatch(
        gdec=[share(length - 1, 1) for length in gdec],
        gprf=[share(*chunk) for chunk in gprf],
        cprf=[share(*chunk) for chunk in cprf],
        cdec=[share(length - 1, 1) for length in cdec],
        rotating=[RotatingRow(share(9, 1), None, samples=False) for _ in range(rotating)],
    )


@settings(deadline=None)
@given(
    first=st.builds(lane, gdec=DECODES, gprf=CHUNKS, cprf=CHUNKS, cdec=DECODES),
    second=st.builds(lane, cdec=DECODES),
    num_visitors=st.integers(0, 20),
    block_size=st.sampled_from([8, 16, 64]),
)
def test_shapes_have_room_for_their_steps(first, second, num_visitors, block_size) -> None:
    chooser = shapes(block_size=block_size)
    lanes = [item for item in (first, second) if not item.is_empty]
    if not lanes or not all(map(chooser.fits, lanes)):
        return
    exact = chooser.exact(lanes, num_visitors)
    roomy = chooser.roomy(exact)
    assert exact.holds(exact)
    assert roomy.holds(exact)
    assert roomy.num_rows <= 2 * exact.num_rows
    assert exact.num_visitors >= num_visitors
    largest = chooser.largest
    for room, step in zip(exact.lanes, lanes, strict=True):
        assert room.device.num_tokens >= sum(i.num_tokens for i in step.gdec + step.gprf)
        assert room.device.num_decodes >= len(step.gdec)
        assert room.host_prefills.num_tokens >= sum(i.num_tokens for i in step.cprf)
        assert room.num_host_decodes >= len(step.cdec)
        assert room.device.num_prefills >= len(step.gprf)
        assert all(room.device.width * block_size >= item.end for item in step.gdec + step.gprf)
    for room, most in zip(roomy.lanes, largest.lanes, strict=False):
        for name, (size, _) in room.arrays().items():
            assert size <= most.arrays()[name][0], name


def test_only_room_may_differ() -> None:
    chooser = shapes()
    plain = chooser.exact([lane(gdec=[50] * 9)], 0)
    assert not chooser.exact([lane(gdec=[50] * 9, cdec=[50])], 0).holds(plain)
    assert not chooser.exact([lane(gdec=[50] * 9, gprf=[(0, 60)])], 0).holds(plain)
    assert not chooser.exact([lane(gdec=[50] * 9, cprf=[(0, 60)])], 0).holds(plain)
    assert not chooser.exact([lane(gdec=[50] * 9)], 2).holds(plain)
    assert not chooser.exact([lane(gdec=[50] * 9), lane(cdec=[50])], 0).holds(plain)
    fewer = GraphShape((LaneShape(device=PagedShape(16, 16, 0, 64, 1)),))
    splits = GraphShape((LaneShape(device=PagedShape(16, 16, 0, 64, 2)),))
    assert splits.holds(fewer)
    assert not fewer.holds(splits)


def test_a_roomy_graph_serves_until_another_has_paid_for_itself() -> None:
    chooser, known = shapes(), set()

    def choose(num_tokens: int) -> GraphShape:
        shape = chooser.choose([lane(gdec=[50], gprf=[(0, num_tokens)])], 0, known)
        known.add(shape)
        return shape

    first = choose(290)
    assert first.num_rows == 512
    assert choose(500) == first
    own, uses = choose(100), 1
    while own == first:
        own, uses = choose(100), uses + 1
    assert own.num_rows == 128
    assert uses == CAPTURE_ROWS // (512 - 128 + 1) + 1
    assert choose(100) == own
    assert choose(200) == first
    assert len(known) == 2


@settings(deadline=None)
@given(
    num_gdec=st.integers(0, 24),
    prompts=st.sampled_from([(0, 0), (300, 0), (0, 300), (200, 300), (900, 0), (0, 900)]),
    num_visiting=st.integers(0, 8),
)
def test_usual_steps_find_a_graph(num_gdec, prompts, num_visiting) -> None:
    chooser = shapes()
    on_device, on_host = prompts
    if not num_visiting and (not (on_host or on_device) or (on_host and on_device)):
        return  # decodes have graphs of their own; both kinds of prompts mostly come with rotations
    step = lane(
        gdec=[500] * num_gdec,
        gprf=[(0, on_device)] if on_device else [],
        cprf=[(0, on_host)] if on_host else [],
    )
    usual = usual_shapes(rotates=True)
    assert len(set(usual)) == len(usual)
    found = chooser.choose([step], num_visiting, usual)
    assert found in usual
    if on_device + on_host > 512:
        assert found.num_rows <= 1024


@given(num_gdec=st.integers(0, 24), num_visiting=st.integers(1, 8), start=st.sampled_from([0, 500]))
@settings(deadline=None)
def test_prompts_beside_a_rotation_fill_usual_graphs(num_gdec, num_visiting, start) -> None:
    chooser = shapes()
    usual = usual_shapes(rotates=True)
    for num_rows in (256, 512, 1024) if start else (256, 384, 512, 1024):
        room = prompt_room(num_rows, num_gdec, num_visiting)
        step = lane(gdec=[500] * num_gdec, cprf=[(start, room)])
        found = chooser.choose([step], num_visiting, usual)
        assert found in usual
        assert found.num_rows == num_rows
        assert bool(found.num_prefix) == bool(start)  # nobody waits for what is not there


def test_decodes_beside_a_rotation_keep_to_few_rows() -> None:
    usual = usual_shapes(rotates=True)
    decodes = [shape for shape in usual if shape.num_visitors and shape.num_rows < 64]
    assert max(shape.num_rows for shape in decodes) == 32
    assert max(shape.lanes[0].device.num_decodes for shape in decodes) == 24


def test_a_graph_of_few_rows_pays_for_itself_sooner() -> None:
    def uses(num_known: int, num_decodes: int) -> int:
        chooser, count = shapes(), 1
        step = lane(gdec=[500] * num_decodes)
        rows = PagedShape(num_known, num_known, 0, 64, 8)
        known = [GraphShape((LaneShape(device=rows, num_entering=4),), 4)]
        while chooser.choose([step], 4, known) in known:
            count += 1
        return count

    assert uses(32, 24) < uses(24, 16) / 4


def test_usual_graphs_of_engines_that_do_not_rotate() -> None:
    plain = usual_shapes(rotates=False)
    assert {shape.num_visitors for shape in plain} == {0}
    assert set(plain) < set(usual_shapes(rotates=True))
    largest = shapes().largest.lanes[0]
    for shape in usual_shapes(rotates=True):
        for name, (size, _) in shape.lanes[0].arrays().items():
            assert size <= largest.arrays()[name][0], name


@given(num_layers=st.integers(1, 80), max_num_seqs=st.integers(1, 300))
def test_a_segment_has_room_for_the_visitors_of_its_layers(num_layers, max_num_seqs) -> None:
    longest = max(len(segment) for segment in rotation_segments(num_layers))
    most = most_visitors(num_layers, max_num_seqs)
    assert most >= 8
    assert most * longest <= segment_rows(num_layers, max_num_seqs)
    assert segment_rows(num_layers, max_num_seqs) >= max_num_seqs


def test_steps_that_only_decode_have_graphs_of_their_own() -> None:
    chooser, known = shapes(), set()
    for num_rows in (24, 20, 9, 1):
        known.add(chooser.choose([lane(gdec=[50] * num_rows)], 0, known))
    assert sorted(shape.num_rows for shape in known) == [1, 16, 24]


@pytest.mark.parametrize("lengths", [[(0, 2000)], [(4000, 100)]])
def test_what_is_too_long_has_no_shape(lengths) -> None:
    assert not shapes().fits(lane(cprf=lengths))
