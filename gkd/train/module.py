"""The student and its objective as one module, so that sharded parameters are gathered where they are used.

Legend: B rows, T positions, N scored tokens, H hidden size, V vocabulary, K terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from gkd.models import StateReader, backbone_of, output_head, packed_inputs
from gkd.models.compiled import only_in_training
from gkd.models.layer_states import Source
from gkd.objectives.measures import SequenceMeasures
from gkd.objectives.mismatch import log_ratios, mismatch_sums
from gkd.objectives.objective import ActiveTerm, Objective
from gkd.objectives.reduction import weigh
from gkd.ops.aligned_terms import aligned_terms
from gkd.ops.linear_terms import TermScores, linear_terms
from gkd.ops.pass_job import ALIGNED_MEASURES, KL_MEASURES, LABEL_LOGPROB, TOPK_MEASURES, WeightedLoss
from gkd.ops.token_logprobs import token_logprobs
from gkd.registry import SOURCES
from gkd.train.batch_terms import sequence_vectors
from gkd.train.state_terms import StateTerms
from gkd.types import AlignedScores, HiddenScores, NoScores, OutputHead, TeacherScores, TokenBatch, TopkScores


class ObjectiveSums(NamedTuple):
    """Of the scored tokens of one micro-batch. A tuple, as ZeRO-3 looks for tensors in nothing else."""

    loss: torch.Tensor  # scalar: sum over terms and tokens of weight x value, differentiable
    values: torch.Tensor  # [K, N] each term's value of each token, before any weight; 0 where it does not act
    acts: torch.Tensor  # [K, N] bool: where it acts
    measures: torch.Tensor  # [len(measure_names(teacher)), N]: by-products of each token
    measured: torch.Tensor  # [len(measure_names(teacher)), N] bool: where they were measured
    mismatch: torch.Tensor  # [len(MismatchSums._fields)] float64: sums over the tokens sampled from the student
    largest_log_ratio: torch.Tensor  # scalar float64: their largest |log(p_trainer / p_sampler)|
    state_values: torch.Tensor | None = None  # see `StateSums.values`; None where nothing is trained


def measure_names(teacher: TeacherScores) -> tuple[str, ...]:
    """Of the rows of `ObjectiveSums.measures`. What is known of a teacher decides which there are."""
    return (*_MEASURES[type(teacher)], LABEL_LOGPROB)


_MEASURES: dict[type[TeacherScores], tuple[str, ...]] = {
    HiddenScores: KL_MEASURES,
    AlignedScores: ALIGNED_MEASURES,
    TopkScores: TOPK_MEASURES,
    NoScores: (),
}


class ObjectiveHead(nn.Module):
    """The output head together with the objective.

    It holds the head's parameters itself, though they are the model's: ZeRO-3 gathers a module's own parameters
    around its forward and backward, and the logits never exist outside.
    """

    def __init__(self, head: OutputHead, valid_vocab: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self._head = head
        self.valid_vocab = valid_vocab
        self._dtype = dtype

    def forward(
        self, hidden: torch.Tensor, batch: TokenBatch, objective: Objective | None, dtype: torch.dtype | None = None
    ) -> ObjectiveSums | torch.Tensor:
        """`hidden` is [N, H]; see `StudentModule.forward`. `dtype`: of log-probabilities, other than the module's."""
        if objective is None:
            return self._logprobs(hidden, batch.labels, dtype)
        assert batch.teacher is not None
        acts = objective.acts(batch.sources, batch.completion_lengths, batch.sequence_rewards)
        parts = self._weighted_parts(hidden, batch, objective)
        if isinstance(batch.teacher, AlignedScores):
            acts = _where_aligned(acts, parts, batch.teacher)
        scores = self._terms(hidden, batch, objective, parts, acts)
        return ObjectiveSums(
            scores.loss,
            _term_values(scores, parts, len(objective.terms)),
            acts.to(hidden.device),
            *_stacked(scores, measure_names(batch.teacher)),
            *_mismatch(scores, batch),
        )

    def _terms(
        self,
        hidden: torch.Tensor,
        batch: TokenBatch,
        objective: Objective,
        parts: Sequence[_WeightedPart],
        acts: torch.Tensor,
    ) -> TermScores:
        """`acts` [K, N] of the objective's terms."""
        losses = [part.loss for part in parts]
        options: dict[str, Any] = {
            "acts": acts[[part.term for part in parts]],
            "labels": torch.where(batch.labels < self.valid_vocab, batch.labels, -1),  # -1: from the padding
            "valid_vocab": self.valid_vocab,
            "temperature": objective.temperature,
            "reference": batch.reference,
            "compute_dtype": self._dtype,
            "chunk_bytes": objective.chunk_bytes,
        }
        assert batch.teacher is not None
        if isinstance(batch.teacher, AlignedScores):
            return aligned_terms(hidden, self.own_head(), batch.teacher, losses, **options)
        return linear_terms(hidden, self.own_head(), batch.teacher, losses, **options)

    def _weighted_parts(self, hidden: torch.Tensor, batch: TokenBatch, objective: Objective) -> list[_WeightedPart]:
        sequences = self._sequence_measures(hidden, batch, objective) if objective.of_sequences else None
        return [part for index, term in enumerate(objective.terms) for part in _parts_of(index, term, batch, sequences)]

    def _sequence_measures(self, hidden: torch.Tensor, batch: TokenBatch, objective: Objective) -> SequenceMeasures:
        """What is needed of whole sequences before the loss: one more product with a head, or one a side."""
        teacher = None
        if any(number.needs_teacher_logprobs for number in objective.of_sequences):
            assert isinstance(batch.teacher, HiddenScores)
            teacher = token_logprobs(batch.teacher.states, batch.teacher.head, batch.labels)
        return SequenceMeasures(
            student_logprobs=self._logprobs(hidden, batch.labels),
            teacher_logprobs=teacher,
            sampler_logprobs=batch.sampler_logprobs,
            sequence_index=batch.sequence_index,
            sequences=len(batch.sample_ids),
            teacher_share=batch.teacher_share,
            rewards=None if batch.rewards is None else hidden.new_tensor(batch.rewards, dtype=torch.float64),
        )

    def own_head(self) -> OutputHead:
        return replace(self._head, weight=self.weight, bias=self.bias)

    def _logprobs(self, hidden: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Natural log-probabilities [N] of `labels` [N], over the student's whole vocabulary."""
        return token_logprobs(hidden, self.own_head(), labels, compute_dtype=dtype or self._dtype)


@dataclass(frozen=True)
class _WeightedPart:
    """A part of a term, as the pass over the vocabulary takes it."""

    term: int  # its number
    loss: WeightedLoss
    factor: torch.Tensor | None  # [N] of the term's value; None is 1. It is among the loss's weights, too


def _parts_of(
    index: int, term: ActiveTerm, batch: TokenBatch, sequences: SequenceMeasures | None
) -> list[_WeightedPart]:
    weights = batch.weights if term.weight == 1.0 else batch.weights * term.weight
    for sequence_weight in term.sequence_weights:
        assert sequences is not None
        weights = weights * sequence_weight.of_sequences(sequences)
    row_weights = tuple(weight.of_rows for weight in term.row_weights)
    parts: list[_WeightedPart] = []
    for part in term.parts:
        factor = None
        if part.factor is not None:
            assert sequences is not None
            factor = part.factor.of_sequences(sequences)
        own = weights if factor is None else weights * factor
        parts.append(_WeightedPart(index, WeightedLoss(part.loss, own, row_weights, term.kind), factor))
    return parts


def _where_aligned(acts: torch.Tensor, parts: Sequence[_WeightedPart], teacher: AlignedScores) -> torch.Tensor:
    """Of terms that compare with the teacher, only tokens that it has something for."""
    acts = acts.clone()
    acts[[part.term for part in parts if part.loss.needs_teacher]] &= teacher.student_spans >= 0
    return acts


def _term_values(scores: TermScores, parts: Sequence[_WeightedPart], terms: int) -> torch.Tensor:
    """[terms, N]: what the parts of each term add up to, before weights."""
    if len(parts) == terms and all(part.factor is None for part in parts):
        return scores.values
    values = scores.values.new_zeros(terms, scores.values.shape[1])
    for part, value in zip(parts, scores.values, strict=True):
        values[part.term] += weigh(value, part.factor)
    return values


def _stacked(scores: TermScores, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The by-products [len(names), N], and where they were measured."""
    device = scores.loss.device
    acts, compared = scores.acts.to(device), scores.compared.to(device)
    return (
        torch.stack([scores.measures[name] for name in names]),
        torch.stack([acts if name == LABEL_LOGPROB else compared for name in names]),
    )


def _mismatch(scores: TermScores, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two of ObjectiveSums, from the trainer's log-probabilities [N] of the labels."""
    device = batch.sampler_logprobs.device
    is_new = torch.tensor([SOURCES.drawn(source).in_step for source in batch.sources], dtype=torch.bool)  # [S]
    fresh = is_new.repeat_interleave(torch.tensor(batch.completion_lengths, dtype=torch.int64)).to(device)
    sampled = fresh & ~batch.sampler_logprobs.isnan() & scores.acts.to(device)
    log_ratio = torch.where(sampled, log_ratios(scores.measures[LABEL_LOGPROB], batch.sampler_logprobs), 0.0)
    largest = log_ratio.abs().max() if len(log_ratio) else log_ratio.sum()
    return torch.stack(mismatch_sums(log_ratio, sampled)), largest


def _without_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keeps a frozen head out of checkpoints under all of its names; DeepSpeed leaves out the first."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


class StudentModule(nn.Module):
    """`forward` is the only entrance: what shards parameters hooks it."""

    def __init__(self, model: Any, valid_vocab: int, dtype: torch.dtype, state_terms: StateTerms | None = None) -> None:
        super().__init__()
        self.model = model
        self.state_terms = state_terms
        self._reader = None if state_terms is None else StateReader(model, "student.model")
        self.objective_head = ObjectiveHead(output_head(model), valid_vocab, dtype)
        self.register_state_dict_post_hook(_without_frozen)

    def forward(
        self,
        batch: TokenBatch,
        objective: Objective | None,
        *,
        is_exact: bool = False,
        only_vectors: bool = False,
        only_states: bool = False,
        vector_gradients: torch.Tensor | None = None,
    ) -> ObjectiveSums | torch.Tensor:
        """The sums of an objective, or with None the scored tokens' log-probabilities [N]; `is_exact`: those in
        float32, of float32 weights. `only_states`: the last ones, [B, T, H]. `only_vectors`: of the sequences, [S, H],
        and `vector_gradients` [S, H] is what the loss's gradient gets of them, and its value does not."""
        if is_exact:
            with torch.autocast(batch.input_ids.device.type, enabled=False):
                return self.objective_head(self._states(batch, None)[0], batch, None, torch.float32)
        scored, every, states = self._states(batch, objective)
        if only_states:
            self.objective_head(
                scored, batch, None
            )  # of no token: ZeRO-3 has sent for its weights, and waits for its use
            return every
        if only_vectors:
            return sequence_vectors(scored, batch)
        result = self.objective_head(scored, batch, objective)
        if objective is None or not torch.is_grad_enabled():
            return result
        if vector_gradients is not None:
            of_vectors = (sequence_vectors(scored, batch) * vector_gradients).sum()
            result = result._replace(loss=result.loss + (of_vectors - of_vectors.detach()))
        if self.state_terms is not None:
            of_states = self.state_terms(states, every, batch, objective)
            result = result._replace(loss=result.loss + of_states.loss, state_values=of_states.values)
        return result

    def _states(
        self, batch: TokenBatch, objective: Objective | None
    ) -> tuple[torch.Tensor, torch.Tensor, Mapping[Source, torch.Tensor]]:
        """The last ones where tokens are scored [N, H], and everywhere [B, T, H]; those of the layers that the
        objective's terms compare."""
        packed = {} if batch.sequence_lengths is None else packed_inputs(batch.sequence_lengths, batch.input_ids.device)
        backbone = backbone_of(self.model)
        states: Mapping[Source, torch.Tensor] = {}
        if self._reader is None or self.state_terms is None or objective is None:
            with only_in_training():
                last = backbone(input_ids=batch.input_ids, use_cache=False, **packed).last_hidden_state
        else:
            sources = self.state_terms.sources(objective)
            last, states = self._reader.call(backbone, sources, input_ids=batch.input_ids, **packed)
        return last.flatten(0, 1)[batch.score_index], last, states


_PREFIXES: dict[type, str] = {TopkScores: "topk_", AlignedScores: "aligned_"}  # of what is no divergence of tokens


def token_measures(
    forward: Callable[..., Any], micro_batches: Sequence[TokenBatch], objective: Objective, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """For each micro-batch {name: [N]} of its `measure_names` and of the objective's terms, on `device`.

    `forward` is a StudentModule, or what wraps it. From a teacher's top k a term is that of K + 1 outcomes, and its
    name begins with "topk_"; against another tokenizer it begins with "aligned_".
    """
    measured = []
    for micro_batch in micro_batches:
        assert micro_batch.teacher is not None
        result: ObjectiveSums = forward(micro_batch.to(device), objective)
        names = [f"{_PREFIXES.get(type(micro_batch.teacher), '')}{term.name}" for term in objective.terms]
        terms = dict(zip(names, result.values, strict=True))
        measured.append(terms | dict(zip(measure_names(micro_batch.teacher), result.measures, strict=True)))
    return measured
