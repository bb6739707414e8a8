"""The step whose memory is measured: as large as allowed, and no request longer than allowed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worst_step import make_worst_step


@settings(deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([16, 32, 64]))
def test_worst_step_fills_the_limits_and_keeps_them(
    num_tokens: int, max_model_len: int, block_size: int
) -> None:
    pool, sub_batch = make_worst_step(num_tokens, max_model_len, block_size)
    assert sub_batch.num_tokens == num_tokens
    assert all(0 < item.end <= max_model_len for item in sub_batch.gprf)
    assert all(item.samples for item in sub_batch.gprf)
    assert pool.num_free == 0
    pool.check_integrity()
