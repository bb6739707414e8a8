"""The largest step there can be, so that what it takes of the device's memory can be measured."""

from engine.kv_blocks import BlockPool
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step_plan import ScheduledRequest, SubBatch

_TOKEN_ID = 0


def make_worst_step(
    num_tokens: int, max_model_len: int, block_size: int
) -> tuple[BlockPool, SubBatch]:
    """Return prompts that fill a step, and a pool that holds no more than them.

    Args:
        num_tokens: Most tokens of a step.
        max_model_len: Most tokens of a request.
        block_size: Tokens of a block.
    """
    lengths = [max_model_len] * (num_tokens // max_model_len)
    if num_tokens % max_model_len:
        lengths.append(num_tokens % max_model_len)
    pool = BlockPool(sum(-(-length // block_size) for length in lengths), block_size)
    sub_batch = SubBatch()
    for number, length in enumerate(lengths):
        request = Request(
            request_id=f"worst-{number}",
            prompt_token_ids=[_TOKEN_ID] * length,
            params=SamplingParams(top_p=0.5),
            max_total_tokens=length,
        )
        pool.grow(request.request_id, length)
        sub_batch.gprf.append(ScheduledRequest(request, 0, length))
    return pool, sub_batch
