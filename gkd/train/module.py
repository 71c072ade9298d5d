"""The student and its loss as one module, so that sharded parameters are gathered where they are used.

Legend: B rows, T positions, N scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from gkd.config import ObjectiveConfig
from gkd.models import backbone_of, output_head, packed_inputs
from gkd.objectives.divergence import Divergence
from gkd.objectives.mismatch import importance_weights, log_ratios, mismatch_sums
from gkd.ops import linear_divergence
from gkd.ops.linear_topk import TOPK_BYPRODUCTS, linear_topk_divergence
from gkd.ops.token_logprobs import token_logprobs
from gkd.types import HiddenScores, OutputHead, TeacherScores, TokenBatch, TopkScores

# By-products of the loss against a whole distribution: the objective's own divergence and what
# `gkd.objectives.byproducts` measures beside it, and the student's log-probability of the label.
BYPRODUCTS = (
    "divergence",
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "top1_agreement",
    "label_logprob",
)


class DivergenceSums(NamedTuple):
    """Of the scored tokens of one micro-batch. A tuple, as ZeRO-3 looks for tensors in nothing else."""

    loss: torch.Tensor  # scalar: sum of weight x loss, differentiable
    byproducts: torch.Tensor  # [len(byproduct_names(teacher)), N]: of each token, detached
    mismatch: torch.Tensor  # [len(MismatchSums._fields)] float64: sums over the tokens sampled from the student
    largest_log_ratio: torch.Tensor  # scalar float64: their largest |log(p_trainer / p_sampler)|


def byproduct_names(teacher: TeacherScores) -> tuple[str, ...]:
    """Of the rows of `DivergenceSums.byproducts`. A teacher's top k allow other measures than all of it."""
    return BYPRODUCTS if isinstance(teacher, HiddenScores) else TOPK_BYPRODUCTS


class DivergenceHead(nn.Module):
    """The output head together with the divergence.

    It holds the head's parameters itself, though they are the model's: ZeRO-3 gathers a module's own parameters
    around its forward and backward, and the logits never exist outside.
    """

    def __init__(self, head: OutputHead, objective: ObjectiveConfig, valid_vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self._head = head
        self._objective = objective
        self._valid_vocab = valid_vocab
        self._dtype = dtype

    def forward(
        self, hidden: torch.Tensor, batch: TokenBatch, objective: ObjectiveConfig | None
    ) -> DivergenceSums | torch.Tensor:
        """`hidden` is [N, H]; see `StudentModule.forward`."""
        teacher, objective = batch.teacher, objective or self._objective
        if teacher is None:
            return self._logprobs(hidden, batch.labels)
        weights = self._weights(hidden, batch, objective)
        if isinstance(teacher, HiddenScores):
            loss, byproducts = self._divergence(hidden, batch, teacher, weights, objective)
        else:
            loss, byproducts = self._topk_divergence(hidden, batch, teacher, weights, objective)
        measured = torch.stack([byproducts[name] for name in byproduct_names(teacher)])
        return DivergenceSums(loss, measured, *_mismatch(byproducts["label_logprob"], batch))

    def _weights(self, hidden: torch.Tensor, batch: TokenBatch, objective: ObjectiveConfig) -> torch.Tensor:
        """The batch's [N], by importance where the objective asks for it."""
        if objective.importance_weights == "none":
            return batch.weights
        log_ratio = log_ratios(self._logprobs(hidden, batch.labels), batch.sampler_logprobs)
        level, cap, sequences = objective.importance_weights, objective.importance_cap, len(batch.sample_ids)
        return batch.weights * importance_weights(log_ratio, batch.sequence_index, sequences, level, cap)

    def _shared_labels(self, batch: TokenBatch) -> torch.Tensor:
        """[N], -1 where a sampler drew a token from the padding of the vocabulary."""
        return torch.where(batch.labels < self._valid_vocab, batch.labels, -1)

    def _divergence(
        self,
        hidden: torch.Tensor,
        batch: TokenBatch,
        teacher: HiddenScores,
        weights: torch.Tensor,
        objective: ObjectiveConfig,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hard, head = objective.hard_label_weight, teacher.head
        return linear_divergence(
            hidden,
            self.weight,
            teacher.states,
            head.weight,
            objective.kind,
            beta=objective.beta,
            alpha=objective.alpha,
            temperature=objective.temperature,
            weights=weights,
            reduction="sum",
            student_bias=self.bias,
            teacher_bias=head.bias,
            student_softcap=self._head.softcap,
            teacher_softcap=head.softcap,
            student_logit_scale=self._head.logit_scale,
            teacher_logit_scale=head.logit_scale,
            valid_vocab=self._valid_vocab,
            labels=self._shared_labels(batch),
            hard_label_weight=batch.hard_label * hard if hard else None,
            scale_by_temperature_squared=objective.scale_by_temperature_squared,
            normalize_jsd=objective.normalize_jsd,
            compute_dtype=self._dtype,
            chunk_bytes=_chunk_bytes(objective),
            byproducts=True,
        )

    def _topk_divergence(
        self,
        hidden: torch.Tensor,
        batch: TokenBatch,
        teacher: TopkScores,
        weights: torch.Tensor,
        objective: ObjectiveConfig,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        divergence = Divergence(
            objective.kind, objective.beta, objective.alpha, normalize_jsd=objective.normalize_jsd
        )  # the teacher was asked at temperature 1
        return linear_topk_divergence(
            hidden,
            self._own_head(),
            teacher,
            divergence,
            weights=weights,
            labels=self._shared_labels(batch),
            valid_vocab=self._valid_vocab,
            compute_dtype=self._dtype,
            chunk_bytes=_chunk_bytes(objective),
        )

    def _own_head(self) -> OutputHead:
        return replace(self._head, weight=self.weight, bias=self.bias)

    def _logprobs(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Natural log-probabilities [N] of `labels` [N], over the student's whole vocabulary."""
        return token_logprobs(hidden, self._own_head(), labels, compute_dtype=self._dtype)


def _chunk_bytes(objective: ObjectiveConfig) -> int | None:
    return None if objective.chunk_mib is None else objective.chunk_mib << 20


def _mismatch(logprobs: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two of DivergenceSums, from the trainer's log-probabilities [N] of the labels."""
    sampled = ~batch.sampler_logprobs.isnan()
    log_ratio = log_ratios(logprobs, batch.sampler_logprobs)
    largest = log_ratio.abs().max() if len(log_ratio) else log_ratio.sum()
    return torch.stack(mismatch_sums(log_ratio, sampled)), largest


def _without_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keeps a frozen head out of checkpoints under all of its names; DeepSpeed leaves out the first."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


class StudentModule(nn.Module):
    """`forward` is the only entrance: what shards parameters hooks it."""

    def __init__(self, model: Any, objective: ObjectiveConfig, valid_vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.divergence_head = DivergenceHead(output_head(model), objective, valid_vocab, dtype)
        self.register_state_dict_post_hook(_without_frozen)

    def forward(self, batch: TokenBatch, objective: ObjectiveConfig | None = None) -> DivergenceSums | torch.Tensor:
        """Divergence sums against the batch's teacher, or without one the scored tokens' log-probabilities [N].

        `objective` None means the run's own.
        """
        packed = {} if batch.sequence_lengths is None else packed_inputs(batch.sequence_lengths, batch.input_ids.device)
        backbone = backbone_of(self.model)
        states = backbone(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state  # [B, T, H]
        hidden = states.flatten(0, 1)[batch.score_index]  # [N, H]
        return self.divergence_head(hidden, batch, objective)


def token_divergences(
    forward: Callable[..., Any], micro_batches: Sequence[TokenBatch], objective: ObjectiveConfig, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """For each micro-batch {name: [N]} of its `byproduct_names`, on `device`; `divergence` and `topk_divergence` are
    those of `objective`.

    `forward` is a StudentModule, or what wraps it.
    """
    measured = []
    for micro_batch in micro_batches:
        assert micro_batch.teacher is not None
        result: DivergenceSums = forward(micro_batch.to(device), objective)
        measured.append(dict(zip(byproduct_names(micro_batch.teacher), result.byproducts, strict=True)))
    return measured
