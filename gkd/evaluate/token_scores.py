"""What a student is worth on given completions, token by token: exact divergences from the teacher, and surprisal.

Legend: B rows, T positions, N scored tokens of a micro-batch, n_i tokens of completion i, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from gkd.data import pack
from gkd.data.order import longest_first
from gkd.measures.heldout import COMPARED
from gkd.ops.pass_job import LABEL_LOGPROB
from gkd.ops.token_logprobs import token_logprobs
from gkd.train.module import StudentModule, token_measures
from gkd.types import AlignedScores, HiddenScores, Rollout, TeacherScores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "top1_agreement")
_ALIGNED = {"top1_agreement": "aligned_top1"} | {name: f"aligned_{name}" for name in DIVERGENCES[:3]}
NLL = "nll"

TokenScores = dict[str, np.ndarray]  # name -> [n_i] float64, in nats


@dataclass(frozen=True)
class ScoringSettings:
    """How a student is run: as the held-out measure of a training run does it."""

    micro_batch_size: int
    pad_token_id: int
    valid_vocab: int
    dtype: torch.dtype
    device: torch.device
    chunk_mib: int | None = None

    @property
    def chunk_bytes(self) -> int | None:
        return None if self.chunk_mib is None else self.chunk_mib << 20


@torch.no_grad()
def student_scores(
    model: PreTrainedModel,
    rollouts: Sequence[Rollout],
    teacher: Sequence[TeacherScores] | None,
    settings: ScoringSettings,
) -> list[TokenScores]:
    """Of each rollout NLL and, if the teacher scored the rollouts, DIVERGENCES; all at temperature 1.

    The teacher's scores are whole distributions, with one head. Of one with another tokenizer the divergences are those
    of the outcomes that both have; a token that it has nothing for has 0.
    """
    module = StudentModule(model, settings.valid_vocab, settings.dtype)
    results: list[TokenScores] = [{}] * len(rollouts)
    order = longest_first([len(rollout.token_ids) for rollout in rollouts])
    for start in range(0, len(order), settings.micro_batch_size):
        rows = order[start : start + settings.micro_batch_size]
        given = None if teacher is None else [teacher[i] for i in rows]
        chosen = [rollouts[i] for i in rows]
        (batch,) = pack(
            chosen, given, micro_batch_size=len(rows), pad_token_id=settings.pad_token_id, reduction="token_mean"
        )
        values = _score_batch(module, batch, settings)
        for i, scores in zip(rows, _split(values, [len(r.completion_ids) for r in chosen]), strict=True):
            results[i] = scores
    return results


@torch.no_grad()
def teacher_nll(
    rollouts: Sequence[Rollout], scores: Sequence[TeacherScores], settings: ScoringSettings
) -> list[TokenScores]:
    """NLL of each rollout under the teacher, from what it said of them."""
    results: list[TokenScores] = []
    for rollout, said in zip(rollouts, scores, strict=True):
        assert isinstance(said, HiddenScores | AlignedScores)
        labels = said.labels if isinstance(said, AlignedScores) else torch.tensor(rollout.completion_ids)
        labels = labels.to(said.states.device, torch.int64)
        logprobs = token_logprobs(said.states, said.head, labels, chunk_bytes=settings.chunk_bytes)
        if isinstance(said, AlignedScores):
            logprobs = _by_students_tokens(said, logprobs)
        results.append({NLL: _as_array(-logprobs)})
    return results


def _by_students_tokens(scores: AlignedScores, logprobs: torch.Tensor) -> torch.Tensor:
    """[n_i] of what the teacher says of its own tokens: each span's shared out evenly."""
    spans = scores.student_spans
    totals = torch.zeros(scores.span_count).index_add_(0, scores.spans, logprobs.float().cpu())
    lengths = torch.bincount(spans[spans >= 0], minlength=scores.span_count)
    return torch.where(spans >= 0, torch.cat([totals / lengths, torch.zeros(1)])[spans], 0.0)


def _score_batch(module: StudentModule, batch: TokenBatch, settings: ScoringSettings) -> TokenScores:
    """The JSD is the loss of the pass, the others are its by-products: one pass for all."""
    if batch.teacher is None:
        return {NLL: _as_array(-module(batch.to(settings.device), None))}
    objective = replace(COMPARED, chunk_bytes=settings.chunk_bytes)
    (measured,) = token_measures(module, [batch], objective, settings.device)
    names = _ALIGNED if isinstance(batch.teacher, AlignedScores) else {name: name for name in DIVERGENCES}
    return {name: _as_array(measured[own]) for name, own in names.items()} | {NLL: _as_array(-measured[LABEL_LOGPROB])}


def _as_array(values: torch.Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _split(values: TokenScores, lengths: Sequence[int]) -> list[TokenScores]:
    cuts = np.cumsum(lengths)[:-1]
    parts = {name: np.split(array, cuts) for name, array in values.items()}
    return [{name: arrays[i] for name, arrays in parts.items()} for i in range(len(lengths))]
