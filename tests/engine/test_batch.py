"""A step plan as tensors: each row's token, position, slot and table, against plain loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import BatchBuilder
from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledRequest, StepPlan

BLOCK_SIZE = 16
SHARES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 59), st.integers(1, 60), st.integers(0, 5)),
    max_size=6,
)


def make_plan(pool: BlockPool, decodes: list, prefills: list) -> StepPlan:
    """Make shares of `(num_prompt, start, num_tokens, num_output)`, cut to what there is."""
    plan = StepPlan()
    for number, (num_prompt, start, num_tokens, num_output) in enumerate(decodes + prefills):
        request = Request(
            request_id=str(number),
            prompt_token_ids=[1000 * number + i for i in range(num_prompt)],
            params=SamplingParams(),
            max_total_tokens=100,
            output_token_ids=[1000 * number + num_prompt + i for i in range(num_output)],
        )
        is_decode = number < len(decodes)
        start = request.num_tokens - 1 if is_decode else min(start, request.num_tokens - 1)
        num_tokens = min(num_tokens, request.num_tokens - start)
        request.num_computed_tokens = start
        pool.grow(request.request_id, request.num_tokens)
        share = ScheduledRequest(request, start, 1 if is_decode else num_tokens)
        (plan.decodes if is_decode else plan.prefills).append(share)
    return plan


@settings(deadline=None)
@given(decodes=SHARES, prefills=SHARES)
def test_every_token_is_where_it_belongs(decodes, prefills) -> None:
    if not decodes and not prefills:
        return
    pool = BlockPool(100, BLOCK_SIZE)
    plan = make_plan(pool, decodes, prefills)
    batch = BatchBuilder(torch.device("cpu"), pool).build(plan)
    ids, positions, slots, logits_rows = [], [], [], []
    for item in plan.scheduled:
        table = pool.block_table(item.request.request_id)
        for position in range(item.start, item.end):
            ids.append(1000 * int(item.request.request_id) + position)
            positions.append(position)
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        if item.end == item.request.num_tokens:
            logits_rows.append(len(ids) - 1)
    assert batch.input_ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.slot_mapping.tolist() == slots
    assert len(set(slots)) == len(slots)
    assert batch.logits_rows.tolist() == logits_rows
    assert batch.num_decodes == len(decodes)
    assert batch.seq_lens.tolist() == [item.end for item in plan.scheduled]
    assert list(batch.context_lens) == batch.seq_lens.tolist()
    starts = [0]
    for item in plan.prefills:
        starts.append(starts[-1] + item.num_tokens)
    assert batch.prefill_cu_seqlens_q.tolist() == starts
    for row, item in enumerate(plan.scheduled):
        num_blocks = -(-item.end // BLOCK_SIZE)
        table = batch.block_tables[row].tolist()
        assert table[:num_blocks] == pool.block_table(item.request.request_id)[:num_blocks]
        assert not any(table[num_blocks:])


def test_types_are_what_the_kernels_take() -> None:
    pool = BlockPool(10, BLOCK_SIZE)
    plan = make_plan(pool, [(3, 0, 1, 1)], [(20, 4, 16, 0)])
    batch = BatchBuilder(torch.device("cpu"), pool).build(plan)
    for tensor in (batch.input_ids, batch.positions, batch.slot_mapping, batch.logits_rows):
        assert tensor.dtype == torch.int64
    for tensor in (batch.seq_lens, batch.block_tables, batch.prefill_cu_seqlens_q):
        assert tensor.dtype == torch.int32
    assert all(t.is_contiguous() for t in (batch.block_tables, batch.seq_lens, batch.positions))
