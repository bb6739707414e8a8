"""A sub-batch as tensors: each row's token, position, slot and table, against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import PagedRows
from engine.batch_builder import BatchBuilder
from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step_plan import ScheduledRequest, SubBatch

BLOCK_SIZE = 16
SHARES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 59), st.integers(1, 60), st.integers(0, 5)),
    max_size=5,
)
KINDS = ("gdec", "gprf", "cprf", "cdec")


def make_sub_batch(device: BlockPool, host: BlockPool, **shares: list) -> SubBatch:
    """Make shares of `(num_prompt, start, num_tokens, num_output)`, cut to what there is."""
    sub_batch, number = SubBatch(), 0
    for kind in KINDS:
        for num_prompt, start, num_tokens, num_output in shares.get(kind, ()):
            request = Request(
                request_id=str(number),
                prompt_token_ids=[1000 * number + i for i in range(num_prompt)],
                params=SamplingParams(),
                max_total_tokens=100,
                output_token_ids=[1000 * number + num_prompt + i for i in range(num_output)],
            )
            number += 1
            is_decode = kind.endswith("dec")
            start = request.num_tokens - 1 if is_decode else min(start, request.num_tokens - 1)
            num_tokens = 1 if is_decode else min(num_tokens, request.num_tokens - start)
            pool = host if kind.startswith("c") else device
            pool.grow(request.request_id, request.num_tokens)
            getattr(sub_batch, kind).append(ScheduledRequest(request, start, num_tokens))
    return sub_batch


def expected_slots(pool: BlockPool, items: list[ScheduledRequest]) -> list[int]:
    slots = []
    for item in items:
        table = pool.block_table(item.request.request_id)
        for position in range(item.start, item.end):
            slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    return slots


def check_rows(rows: PagedRows, pool: BlockPool, decodes: list, prefills: list) -> None:
    items = [*decodes, *prefills]
    assert rows.slot_mapping.tolist() == expected_slots(pool, items)
    assert rows.num_decodes == len(decodes)
    assert rows.seq_lens.tolist() == [item.end for item in items]
    assert rows.max_decode_len == max((item.end for item in decodes), default=0)
    starts = [len(decodes)]
    for item in prefills:
        starts.append(starts[-1] + item.num_tokens)
    assert rows.prefill_cu_seqlens_q.tolist() == starts
    for row, item in enumerate(items):
        num_blocks = -(-item.end // BLOCK_SIZE)
        table = rows.block_tables[row].tolist()
        assert table[:num_blocks] == pool.block_table(item.request.request_id)[:num_blocks]
        assert not any(table[num_blocks:])


@settings(deadline=None)
@given(gdec=SHARES, gprf=SHARES, cprf=SHARES, cdec=SHARES)
def test_every_token_is_where_it_belongs(**shares: list) -> None:
    device, host = BlockPool(100, BLOCK_SIZE), BlockPool(100, BLOCK_SIZE)
    sub_batch = make_sub_batch(device, host, **shares)
    if not sub_batch.num_tokens:
        return
    batch = BatchBuilder(torch.device("cpu"), device, host).build(sub_batch)
    ids, positions, logits_rows = [], [], []
    for item in sub_batch.scheduled:
        for position in range(item.start, item.end):
            ids.append(1000 * int(item.request.request_id) + position)
            positions.append(position)
        if item.end == item.request.num_tokens:
            logits_rows.append(len(ids) - 1)
    assert batch.input_ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.logits_rows.tolist() == logits_rows
    check_rows(batch.device_rows, device, sub_batch.gdec, sub_batch.gprf)
    assert (batch.host_prefills is not None) == bool(sub_batch.cprf)
    if batch.host_prefills is not None:
        check_rows(batch.host_prefills.rows, host, [], sub_batch.cprf)
    assert (batch.host_decodes is not None) == bool(sub_batch.cdec)
    if batch.host_decodes is not None:
        assert batch.host_decodes.seq_lens.tolist() == [item.end for item in sub_batch.cdec]
    first_host_decode = batch.num_tokens - len(sub_batch.cdec)
    assert batch.host_decode_tokens == slice(first_host_decode, batch.num_tokens)


class StagingBuilder(BatchBuilder):
    """A builder as on a GPU, on the CPU."""

    @property
    def uses_staging(self) -> bool:
        return True


@settings(deadline=None)
@given(cprf=SHARES)
def test_staging_blocks_stand_for_host_blocks(cprf: list) -> None:
    if not cprf:
        return
    device, host = BlockPool(10, BLOCK_SIZE), BlockPool(100, BLOCK_SIZE)
    sub_batch = make_sub_batch(device, host, cprf=cprf)
    prefills = StagingBuilder(torch.device("cpu"), device, host).build(sub_batch).host_prefills
    assert prefills is not None
    assert prefills.written is not None
    staged: dict[int, int] = {}
    for row, item in enumerate(sub_batch.cprf):
        num_blocks = -(-item.end // BLOCK_SIZE)
        table = prefills.rows.block_tables[row].tolist()[:num_blocks]
        for staging, block in zip(table, host.block_table(item.request.request_id), strict=False):
            assert staging not in staged
            staged[staging] = block
    assert sorted(staged) == list(range(prefills.num_staging_blocks))
    copies = [prefills.written] + ([prefills.prefix] if prefills.prefix else [])
    for copy in copies:
        pairs = zip(copy.staging_ids.tolist(), copy.host_ids.tolist(), strict=True)
        assert all(staged[staging] == block for staging, block in pairs)
    written = {slot // BLOCK_SIZE for slot in prefills.rows.slot_mapping.tolist()}
    assert written <= set(prefills.written.staging_ids.tolist())


def test_types_are_what_the_kernels_take() -> None:
    device, host = BlockPool(10, BLOCK_SIZE), BlockPool(10, BLOCK_SIZE)
    sub_batch = make_sub_batch(
        device, host, gdec=[(3, 0, 1, 1)], gprf=[(20, 4, 16, 0)], cdec=[(18, 0, 1, 3)]
    )
    batch = BatchBuilder(torch.device("cpu"), device, host).build(sub_batch)
    rows = batch.device_rows
    for tensor in (batch.input_ids, batch.positions, rows.slot_mapping, batch.logits_rows):
        assert tensor.dtype == torch.int64
    assert batch.host_decodes is not None
    tables = (rows.seq_lens, rows.block_tables, rows.prefill_cu_seqlens_q)
    for tensor in (*tables, batch.host_decodes.block_tables, batch.host_decodes.seq_lens):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


def test_host_rows_need_a_host_pool() -> None:
    device, host = BlockPool(10, BLOCK_SIZE), BlockPool(10, BLOCK_SIZE)
    sub_batch = make_sub_batch(device, host, cdec=[(18, 0, 1, 3)])
    with pytest.raises(AssertionError, match="host pool"):
        BatchBuilder(torch.device("cpu"), device).build(sub_batch)
