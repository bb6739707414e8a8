"""Which prompts a step computes, and where new requests go.

The first waiting request that fits nowhere holds back the others. The device is preferred; the host
takes a request if the policy wants more there, or if no device pool could ever hold it.
"""

from engine.request import Placement, Request
from engine.scheduling.step_view import StepView
from engine.step_plan import ScheduledRequest, SubBatch


def take_prompts(
    view: StepView, budget: int, max_num_seqs: int, *, with_host: bool
) -> tuple[SubBatch, list[tuple[Request, Placement]]]:
    """Spend a budget on prompts: those begun first, then waiting ones, in order of arrival.

    Args:
        view: What there is.
        budget: Tokens.
        max_num_seqs: Most requests that run at once.
        with_host: Host-resident prompts may go on, and new ones may go to the host.

    Returns:
        The `gprf` and `cprf` rows, and the requests that start, with their places.
    """
    sub_batch = SubBatch()
    for request in view.prefilling:
        if with_host or request.placement is Placement.DEVICE:
            budget -= _add_chunk(sub_batch, request, request.placement, budget)
    admitted: list[tuple[Request, Placement]] = []
    if not view.can_admit:
        return sub_batch, admitted
    device_free, host_free, host_room = view.device_free, view.host_free, view.host_room
    outlook = view.outlook() if view.outlook is not None and view.waiting else None
    for request in view.waiting:
        if budget <= 0 or view.num_running + len(admitted) >= max_num_seqs:
            break
        if request.num_pending_tokens:
            break  # preempted while a step in flight sampled for it: its tokens are not all known
        num_blocks = -(-request.num_tokens // view.block_size)
        if num_blocks <= device_free and (outlook is None or outlook.admit(request)):
            placement, device_free = Placement.DEVICE, device_free - num_blocks
        elif (
            with_host
            and num_blocks <= host_free
            and (host_room > 0 or num_blocks > view.device_total)
        ):
            placement, host_free = Placement.HOST, host_free - num_blocks
            host_room -= 1
        else:
            break
        admitted.append((request, placement))
        budget -= _add_chunk(sub_batch, request, placement, budget)
    return sub_batch, admitted


def _add_chunk(sub_batch: SubBatch, request: Request, placement: Placement, budget: int) -> int:
    num_tokens = min(request.num_uncomputed_tokens, budget)
    if num_tokens <= 0:
        return 0
    rows = sub_batch.gprf if placement is Placement.DEVICE else sub_batch.cprf
    rows.append(ScheduledRequest(request, request.num_computed_tokens, num_tokens))
    return num_tokens
