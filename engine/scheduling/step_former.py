"""Forms the best step without host-resident rows and the best ones with them, and takes the best.

Nothing is reserved here: a draft says what would be computed and admitted; the scheduler commits
the one that is chosen.

What is compared is `tokens_per_s`. A decode token counts 1. A prompt token counts what it costs:
its extra time in a step on the device alone, over the time of one decode token there. So prompts
neither favour nor harm a step merely by being in it, doing more of them in one go is not mistaken
for speed, and a GPU-only engine has the same rate with and without prompts in its steps. (Counting
them 1 would let any prefill outbid any decode.) Host-resident rows are worth their decode tokens,
at the price of the second read of the weights and of whatever wait the pipeline leaves exposed; if
they rotate, the layers that they are through are lost with a step that computes them in one go.
Rotating rows are worth a layer of a token each (see `rotating`).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from engine.cost_model import (
    CostModel,
    SubBatchLoad,
    load_of,
    predict,
    prefix_cost_s,
    rotation_steps,
)
from engine.graph_limits import TILE_ROWS, mixed_rows, prompt_room, whole_tiles
from engine.request import Placement, Request
from engine.scheduling.dealing import (
    Deal,
    dealt_loads,
    hidden_in_one,
    hidden_windows,
    one_load,
    prefix_sums,
)
from engine.scheduling.prompt_admission import take_prompts
from engine.scheduling.rotating import form_rotation, lost_tokens
from engine.scheduling.scheduler_config import FORCED_MODES, SchedulerConfig
from engine.scheduling.steady_state import FEW_TILES
from engine.scheduling.step_view import Choice, Draft, StepView
from engine.step_plan import ScheduledRequest, StepMode, SubBatch

_FULL = 0.5
"""Of the decodes that the device holds: with fewer, prompts are what it lacks."""
_LIMIT_PRECISION = 16
"""Prompt chunks are shrunk to the latency limit to within a 16th of what fits."""


class StepFormer:
    """Forms steps from views.

    Args:
        config: Limits and mode.
        model: Times of the parts.
    """

    def __init__(self, config: SchedulerConfig, model: CostModel) -> None:
        self._config = config
        self._model = model
        self._max_rows = whole_tiles(config.max_num_batched_tokens)
        self._rotating_shares: dict[Request, ScheduledRequest] = {}

    def form(self, view: StepView) -> Choice:
        """Return the step to run; its draft is empty if there is nothing to do."""
        budget = max(0, self._max_rows - len(view.gdec))
        device, admitted = self._prompts(view, budget, with_host=False)
        alone = self._alone(view, device, len(admitted), budget)
        if not view.uses_host:
            return Choice(alone, None if alone.is_empty else alone, "no host-resident requests")
        mixed, _ = take_prompts(
            view, budget - len(view.cdec), self._config.max_num_seqs, with_host=True
        )
        weight = self._prefill_weight(view, mixed if mixed.scheduled else device)
        asymmetric = overlap = None
        if view.rotates is not False:
            overlap = self._best_overlap(view, self._overlap_budget(view, self._max_rows), weight)
        if not view.rotates or (overlap is None and self._config.mode == "auto"):
            drafts = [
                self._best_asymmetric(view, tokens, weight, alone)
                for tokens in self._asymmetric_budgets(view, budget - len(view.cdec))
            ]
            found = [draft for draft in drafts if draft is not None]
            asymmetric = max(found, key=lambda draft: draft.merit, default=None)
        return self._choose(view, alone, asymmetric, overlap)

    def _choose(
        self, view: StepView, gpu_only: Draft, asymmetric: Draft | None, overlap: Draft | None
    ) -> Choice:
        baseline = None if gpu_only.is_empty else gpu_only
        drafts = [draft for draft in (asymmetric, overlap) if draft is not None]
        if not drafts:
            return Choice(gpu_only, baseline, "no host-resident row is ready")
        best = max(drafts, key=lambda draft: draft.merit)
        if baseline is None:
            return Choice(best, None, "nothing to do on the device alone")
        if self._config.mode in FORCED_MODES:
            return Choice(best, baseline, f"mode {self._config.mode}")
        if view.rotates and best.within_limit and best.fills_host:
            return Choice(best, baseline, "prompts for the host")
        if _pays(view, best, baseline):
            better = "within the TPOT limit" if not baseline.within_limit else "higher rate"
            return Choice(best, baseline, better)
        if view.is_due:
            # In one go: where rotating does not pay, nobody knows when it would go on.
            due = best if asymmetric is None else asymmetric
            return Choice(due, baseline, "a host-resident request waited", forced=True)
        worse = "too little gain" if best.within_limit else "beyond the TPOT limit"
        return Choice(gpu_only, baseline, f"with host-resident rows: {worse}")

    def _alone(self, view: StepView, prompts: SubBatch, num_admitted: int, budget: int) -> Draft:
        """Return the step on the device alone.

        Args:
            view: What there is.
            prompts: What the whole budget takes.
            num_admitted: New requests among them.
            budget: Tokens of prompts, at most.
        """
        less = self._small_budget(view, num_admitted, budget)
        if less < budget:
            prompts, _ = self._prompts(view, less, with_host=False)
        weight = self._prefill_weight(view, prompts)
        return self._fit(view, lambda b: self._gpu_only(view, b, weight), less)

    def _small_budget(self, view: StepView, num_admitted: int, budget: int) -> int:
        """Return how many tokens of prompts to compute on the device alone.

        While requests wait for room, it is all the same which of them have it.
        """
        if num_admitted == len(view.waiting):
            return budget
        load = view.mean_load()
        capacity = view.device_total * view.block_size // load.resident_tokens
        if len(view.gdec) <= _FULL * capacity:
            return budget
        return load.small_budget(len(view.gdec), capacity, budget)

    def _best_overlap(self, view: StepView, budget: int, weight: float) -> Draft | None:
        """Return the best step with rotating rows; prompts may go to the host beside them."""
        draft = self._fit(view, lambda b: self._overlap(view, b, weight), budget)
        if draft.fills_host:
            draft = self._cheapest_prompts(view, draft, weight)
        has_rows = any(s.rotating for s in draft.sub_batches)
        begins = bool(view.rotates) and draft.fills_host
        return draft if has_rows or begins else None

    def _cheapest_prompts(self, view: StepView, draft: Draft, weight: float) -> Draft:
        """Return the step beside rotating rows whose prompt tokens cost least.

        While the host attends to many rows, the device has room for some prompt tokens that make
        the step no longer; while it attends to few, more of them share the step's other work.
        """
        bare = self._overlap(view, 0, weight)
        if not bare.rate:
            return draft
        # What the step's decodes would take if there were nothing else to do.
        worth_s = bare.prediction.tokens_per_s * bare.prediction.step_s / bare.rate
        least = view.mean_load().prompt_tokens_beside(bare.rate * bare.prediction.step_s)
        budgets = {self._overlap_budget(view, tiles * TILE_ROWS) for tiles in FEW_TILES}
        budgets.update(accumulate(item.num_tokens for item in draft.prompts if item.samples))
        drafts = [draft]
        for budget in sorted(budgets):
            if least <= budget < draft.num_prompt_tokens:
                drafts.append(self._overlap(view, budget, weight))

        def cost(draft: Draft) -> float:
            return self._prompts_s(draft, worth_s) / max(1, draft.num_prompt_tokens)

        return min(drafts, key=cost)

    def _prompts_s(self, draft: Draft, worth_s: float) -> float:
        """Return what a step's prompts cost, with what is cut off and comes back for the rest.

        Args:
            draft: Of one sub-batch.
            worth_s: What the step would take without them.
        """
        [batch], num_rows = draft.sub_batches, draft.prediction.most_rows
        begun = sum(item.end for item in batch.cprf if not item.samples)
        num_visitors = num_rows - len(batch.gdec) - draft.num_prompt_tokens
        padded = mixed_rows(draft.num_prompt_tokens, len(batch.gdec), num_visitors)
        linear_s = self._model.linear_s(num_rows, rotating=True)
        padding_s = max(0.0, self._model.linear_s(padded, rotating=True) - linear_s)
        longer_s = draft.prediction.step_s - worth_s
        return longer_s + self._model.num_layers * padding_s + prefix_cost_s(self._model, begun)

    def _overlap_budget(self, view: StepView, num_rows: int) -> int:
        """Return the tokens of prompts beside rotating rows, most of which in a layer count.

        Args:
            view: What there is.
            num_rows: Of the step, at most.
        """
        layers = Counter(r.rotation_layer for r in view.cdec if r.rotation_layer is not None)
        num_entering = -(-len(view.cdec) // rotation_steps(self._model))
        most_at_once = max([num_entering, *layers.values()])
        return max(0, prompt_room(num_rows, len(view.gdec), most_at_once))

    def _overlap(self, view: StepView, budget: int, weight: float) -> Draft:
        base, admitted = self._prompts(view, budget, with_host=True)
        base.gdec.extend(_decodes(view.gdec))
        rotation = form_rotation(self._model, view, base, self._rotating_shares)
        base.rotating.extend(rotation.rows)
        load = load_of(self._model, base)
        draft = self._draft(view, [base], admitted, [load], weight)
        full = replace(load, num_rotating=rotation.num_full, rotating_tokens=rotation.full_tokens)
        draft.rotates = True
        draft.rate = self._draft(view, [base], admitted, [full], weight).prediction.tokens_per_s
        token_s = draft.prediction.step_s * rotation_steps(self._model)
        if rotation.rows and token_s > self._config.tpot_limit_s:
            draft.within_limit = False
        return draft

    def _asymmetric_budgets(self, view: StepView, budget: int) -> list[int]:
        """Return numbers of prompt tokens to try: all, and fewer where enough requests wait."""
        if not view.waiting:
            return [budget]
        load, num_decodes = view.mean_load(), len(view.gdec) + len(view.cdec)
        capacity = min(num_decodes + view.host_room, load.num_requests)
        return sorted({budget, load.small_budget(num_decodes, capacity, budget)})

    def _best_asymmetric(
        self, view: StepView, budget: int, weight: float, baseline: Draft
    ) -> Draft | None:
        """Return the best step with host-resident rows.

        Prompts for the host are an investment in later steps: they are part of it if the step is
        no worse than the device alone, even where decodes alone would have a higher rate. They
        stay, too, when somebody has waited long enough: it may be one whose prompt is half done.
        """
        with_prompts = self._fit(view, lambda b: self._asymmetric(view, b, weight, True), budget)
        must = view.is_due or self._config.mode == "asymmetric"
        if must or _pays(view, with_prompts, baseline):
            return with_prompts if with_prompts.mode is StepMode.ASYMMETRIC else None
        without = self._fit(view, lambda b: self._asymmetric(view, b, weight, False), budget)
        drafts = [d for d in (with_prompts, without) if d.mode is StepMode.ASYMMETRIC]
        return max(drafts, key=lambda draft: draft.merit, default=None)

    def _fit(self, view: StepView, build: Callable[[int], Draft], budget: int) -> Draft:
        """Shrink prompt chunks until the step keeps the latency limit, if that helps."""
        draft = build(budget)
        if draft.within_limit or not any(s.gprf or s.cprf for s in draft.sub_batches):
            return draft
        fitting, low, high = build(0), 0, budget
        if not fitting.within_limit or fitting.is_empty:
            return fitting if not fitting.is_empty else build(1)
        while high - low > max(1, low // _LIMIT_PRECISION):
            middle = (low + high) // 2
            draft = build(middle)
            if draft.within_limit:
                low, fitting = middle, draft
            else:
                high = middle
        return fitting

    def _gpu_only(self, view: StepView, budget: int, weight: float) -> Draft:
        sub_batch, admitted = self._prompts(view, budget, with_host=False)
        sub_batch.gdec.extend(_decodes(view.gdec))
        return self._draft(view, [sub_batch], admitted, [load_of(self._model, sub_batch)], weight)

    def _asymmetric(self, view: StepView, budget: int, weight: float, with_host: bool) -> Draft:
        """Try one and two sub-batches with more and fewer host-resident rows; keep the best."""
        base, admitted = self._prompts(view, budget, with_host=with_host)
        base.gdec.extend(_decodes(view.gdec))
        load = load_of(self._model, base)
        prefix = prefix_sums([request.num_tokens for request in view.cdec])
        windows = hidden_windows(self._model, load, prefix)
        hidden = hidden_in_one(self._model, load, prefix)
        lost = lost_tokens(self._model, view.cdec)
        best: Draft | None = None
        marks = {windows.num_second, windows.num_hidden, hidden}
        for num_rows in self._row_counts(view, base, marks):
            deal = windows.deal(num_rows)
            one = one_load(load, prefix, num_rows)
            options = [(one, None), (dealt_loads(load, prefix, deal), deal)]
            for loads, dealt in options if num_rows else options[:1]:
                draft = self._draft(view, [base], admitted, loads, weight)
                if lost[num_rows]:
                    prediction = draft.prediction
                    draft.rate = prediction.tokens_per_s - lost[num_rows] / prediction.step_s
                if best is None or draft.merit > best.merit:
                    best, chosen, rows = draft, dealt, num_rows
        assert best is not None
        best.sub_batches = _with_host_rows(base, view.cdec, rows, chosen)
        return best

    def _row_counts(self, view: StepView, base: SubBatch, marks: Iterable[int]) -> list[int]:
        """Return how many host-resident rows are worth a try."""
        most = len(view.cdec)
        if self._config.mode == "asymmetric":
            return [most]
        counts = {0, most, *marks}
        while most > 1:
            most //= 4
            counts.add(most)
        if view.cdec and (view.is_due or not base.scheduled):
            counts = {max(1, count) for count in counts}
        return sorted(counts)

    def _draft(
        self,
        view: StepView,
        sub_batches: list[SubBatch],
        admitted: list[tuple[Request, Placement]],
        loads: Sequence[SubBatchLoad],
        weight: float,
    ) -> Draft:
        prediction = predict(
            self._model,
            loads,
            swap_tokens=view.swap_tokens,
            arriving_tokens=view.arriving_tokens,
            prefill_weight=weight,
        )
        waits = bool(view.gdec or view.cdec)
        return Draft(
            sub_batches=sub_batches,
            admitted=admitted,
            prediction=prediction,
            within_limit=not waits or prediction.step_s <= self._config.tpot_limit_s,
        )

    def _prompts(
        self, view: StepView, budget: int, *, with_host: bool
    ) -> tuple[SubBatch, list[tuple[Request, Placement]]]:
        return take_prompts(view, budget, self._config.max_num_seqs, with_host=with_host)

    def _prefill_weight(self, view: StepView, prefills: SubBatch) -> float:
        """Return what a prompt token costs on the device alone, in decode tokens."""
        if not prefills.scheduled:
            return 0.0
        decodes = SubBatch(gdec=_decodes(view.gdec))
        load = load_of(self._model, decodes)
        decode_s = predict(self._model, [load]).step_s
        with_prefills = load_of(self._model, prefills)
        with_prefills.num_gdec, with_prefills.gdec_tokens = load.num_gdec, load.gdec_tokens
        with_prefills.copy_out_tokens = with_prefills.copy_in_tokens = 0
        extra_s = predict(self._model, [with_prefills]).step_s - decode_s
        if not view.gdec:
            decode_s = predict(self._model, [SubBatchLoad(num_gdec=1, gdec_tokens=1)]).step_s
        per_decode_s = decode_s / max(1, len(view.gdec))
        return max(0.0, extra_s) / per_decode_s / with_prefills.num_prefill_tokens


def _pays(view: StepView, asymmetric: Draft, gpu_only: Draft) -> bool:
    within_limit, rate = gpu_only.merit
    return asymmetric.merit >= (within_limit, rate * view.least_gain)


def _decodes(requests: Sequence[Request]) -> list[ScheduledRequest]:
    return [ScheduledRequest(request, request.num_computed_tokens, 1) for request in requests]


def _with_host_rows(
    base: SubBatch, cdec: Sequence[Request], num_rows: int, deal: Deal | None
) -> list[SubBatch]:
    rows = _decodes(cdec[:num_rows])
    if deal is None:
        base.cdec.extend(rows)
        return [base]
    base.cdec.extend(rows[deal.first.start : deal.first.stop])
    second = SubBatch()
    for part in deal.second:
        second.cdec.extend(rows[part.start : part.stop])
    return [sub_batch for sub_batch in (base, second) if sub_batch.scheduled]
