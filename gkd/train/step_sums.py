"""What the micro-batches of a step add up to, and the metrics of the global batch that come of it.

Legend: N scored tokens of a micro-batch, K terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from gkd.objectives.mismatch import MismatchSums, mismatch_means
from gkd.objectives.objective import Objective
from gkd.ops.pass_job import ALIGNED_MEASURES, KL_MEASURES, TOPK_MEASURES
from gkd.train.batch_terms import BatchGradients
from gkd.train.distributed import max_over_ranks, sum_over_ranks
from gkd.train.module import ObjectiveSums, measure_names
from gkd.types import TokenBatch

# By-product -> metric. Each is a mean over the tokens on which it was measured; the KLs are plain ones, whatever the
# conventions of a term.
_METRICS = {
    "forward_kl": "divergence/forward_kl",
    "reverse_kl": "divergence/reverse_kl",
    "topk_forward_kl": "divergence/topk_forward_kl",
    "topk_reverse_kl": "divergence/topk_reverse_kl",
    "aligned_forward_kl": "divergence/aligned_forward_kl",
    "aligned_reverse_kl": "divergence/aligned_reverse_kl",
    "aligned_top1": "agreement/aligned_top1",
    "student_entropy": "entropy/student",
    "teacher_entropy": "entropy/teacher",
    "top1_agreement": "agreement/top1",
}
_FIRST = tuple(name for name in _METRICS if name.endswith("_kl"))  # also of first tokens alone
_NAMES = tuple(dict.fromkeys([*KL_MEASURES, *TOPK_MEASURES, *ALIGNED_MEASURES]))


class StepSums:
    """No synchronisation until `metrics`."""

    def __init__(self, objective: Objective, device: torch.device, tasks: Sequence[str] = ()) -> None:
        """`tasks`: names of those that the loss is told apart by, the same on all ranks."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._terms = [term.name for term in objective.terms]
        self._term_weights = [term.weight for term in objective.terms]
        self._tasks = list(tasks)
        self._of_tasks = zeros(2, len(self._tasks))  # sums, and of how many tokens
        self.loss = zeros(1)
        self._measures = zeros(2, len(_NAMES))  # sums, and of how many tokens
        self._first = zeros(2, len(_FIRST))  # likewise, of the first tokens of completions
        self._values = zeros(2, len(self._terms))  # likewise
        self._state_terms = [term.name for term in objective.state_terms]
        self._state_values = zeros(2, len(self._state_terms))
        self._batch_values: dict[str, float] = {}
        self._mismatch = zeros(len(MismatchSums._fields))
        self._largest_log_ratio = zeros(1)

    def add(self, sums: ObjectiveSums, batch: TokenBatch) -> None:
        assert batch.teacher is not None
        self.loss += sums.loss.detach().double()
        first = _first_tokens(batch).to(sums.measures.device)
        for row, name in enumerate(measure_names(batch.teacher)):
            values, is_measured = sums.measures[row].double(), sums.measured[row]
            if name in _NAMES:
                self._measures[0, _NAMES.index(name)] += values.sum()
                self._measures[1, _NAMES.index(name)] += is_measured.sum()
            if name in _FIRST:
                self._first[0, _FIRST.index(name)] += values[first].sum()
                self._first[1, _FIRST.index(name)] += is_measured[first].sum()
        self._values[0] += sums.values.double().sum(1)
        self._values[1] += sums.acts.sum(1)
        if self._tasks:
            self._add_tasks(sums.values, batch)
        if sums.state_values is not None:
            self._state_values += sums.state_values
        self._mismatch += sums.mismatch
        self._largest_log_ratio = torch.maximum(self._largest_log_ratio, sums.largest_log_ratio)

    def _add_tasks(self, values: torch.Tensor, batch: TokenBatch) -> None:
        """`values` [K, N]: each token's part of the loss, but for weights of rows and tokens, is its task's."""
        weights = torch.tensor(self._term_weights, dtype=torch.float64, device=values.device)
        losses = weights @ values.double()  # [N]
        places = [self._tasks.index(name) if name in self._tasks else -1 for name in batch.tasks]
        task = torch.tensor(places, dtype=torch.int64, device=values.device)[
            batch.sequence_index.to(values.device)
        ]  # [N]
        for place in range(len(self._tasks)):
            own = task == place
            self._of_tasks[0, place] += losses[own].sum()
            self._of_tasks[1, place] += own.sum()

    def add_batch(self, found: BatchGradients, share: float) -> None:
        """`share` is what this rank counts of the loss of the batch, which all ranks know."""
        self.loss += found.loss * share
        self._batch_values = found.values

    def metrics(self, denominator: float) -> dict[str, float]:
        """Of the global batch: collective."""
        parts = [
            self.loss, self._measures, self._first, self._values, self._state_values, self._mismatch, self._of_tasks
        ]  # fmt: skip
        joined = sum_over_ranks(torch.cat([part.flatten() for part in parts])).cpu()
        loss, measures, first, values, state_values, mismatch_sums, of_tasks = (
            part.reshape(like.shape).tolist()
            for part, like in zip(joined.split([part.numel() for part in parts]), parts, strict=True)
        )
        mismatch = mismatch_means(*mismatch_sums)
        if mismatch:
            mismatch["max_abs_log_ratio"] = max_over_ranks(self._largest_log_ratio.item())
        return {
            "loss": loss[0] / max(denominator, 1e-30),
            **_means([_METRICS[name] for name in _NAMES], *measures),
            **_means([f"divergence/first_token_{name}" for name in _FIRST], *first),
            **_means([f"objective/{name}/loss" for name in self._terms], *values),
            **_means([f"objective/{name}/loss" for name in self._state_terms], *state_values),
            **{f"objective/{name}/loss": value for name, value in self._batch_values.items()},
            **{f"mismatch/{name}": value for name, value in mismatch.items()},
            **_means([f"task/{name}/loss" for name in self._tasks], *of_tasks),
            **{f"task/{name}/tokens": tokens for name, tokens in zip(self._tasks, of_tasks[1], strict=True)},
        }


def _first_tokens(batch: TokenBatch) -> torch.Tensor:
    """int64 into N, of every completion that has one."""
    starts = accumulate((0, *batch.completion_lengths[:-1]))
    pairs = zip(starts, batch.completion_lengths, strict=False)  # of an idle micro-batch: none
    return torch.tensor([start for start, length in pairs if length], dtype=torch.int64)


def _means(names: Sequence[str], sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """By metric; none where nothing was measured."""
    return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
