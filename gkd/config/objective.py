"""objective: what is minimised. A list of terms, or the keys of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from gkd.chunks import LOSS_CHUNK_BYTES
from gkd.errors import ConfigError
from gkd.objectives.memory import ObjectiveMemory
from gkd.objectives.terms import TERMS, Term
from gkd.objectives.terms.batch import BatchTerm
from gkd.objectives.terms.states import StatesTerm
from gkd.objectives.token_weights import SequenceWeight
from gkd.objectives.weight_rules import WEIGHT_RULES, WeightRule
from gkd.registry import SOURCES, Drawn
from gkd.schedules import MetricRule, Ramp, Schedule, TemperatureSchedule, describe_schedule, largest
from gkd.schema import Section, is_mapping
from gkd.types import ModelShape, StatePair

if TYPE_CHECKING:
    from gkd.objectives.objective import Objective

DEFAULT_KIND = "forward_kl"
_UNJUDGED = frozenset({"teacher", "dataset", "mixed", "speculative"})  # sources whose texts no environment reads


def _as_term(value: Any) -> Any:
    """A mapping by the class of its kind."""
    if not is_mapping(value):
        return value
    kind = value.get("kind", DEFAULT_KIND)
    if kind not in TERMS:
        raise ValueError(f"kind: {TERMS.explain(kind)}")
    return TERMS[kind].model_validate({**value, "kind": kind})


def _as_list(value: Any) -> Any:
    """The form of one term, whose keys stand beside those of the objective, as a list of one."""
    if not is_mapping(value) or "terms" in value:
        return value
    shared = {key: item for key, item in value.items() if key in ObjectiveConfig.model_fields}
    return {**shared, "terms": [{key: item for key, item in value.items() if key not in shared}]}


def _as_rule(value: Any) -> Any:
    """A mapping by the class of its rule."""
    if not is_mapping(value):
        return value
    if "rule" not in value:
        raise ValueError(f"rule: is missing; one of {', '.join(WEIGHT_RULES.names())}")
    if value["rule"] not in WEIGHT_RULES:
        raise ValueError(f"rule: {WEIGHT_RULES.explain(value['rule'])}")
    return WEIGHT_RULES[value["rule"]].model_validate(value)


class ObjectiveConfig(Section):
    """Sum over terms and scored tokens of weight x row weight x token weights x value, by the number of tokens."""

    terms: list[Annotated[SerializeAsAny[Term], BeforeValidator(_as_term)]] = Field(
        min_length=1, description="what is added up; the keys of one term may stand here instead of a list"
    )
    temperature: TemperatureSchedule = Field(
        1.0, description="divides the logits of both sides in every divergence; a number or a schedule"
    )
    weights: Annotated[SerializeAsAny[WeightRule], BeforeValidator(_as_rule)] | None = Field(
        None, description="a rule that moves weight between the terms: {rule: dwa | adaptive, ...}; null: none"
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="mean over the global batch's scored tokens, or of each sequence's mean"
    )
    chunk_mib: int | None = Field(
        None,
        ge=1,
        description="float32 logits of one side in memory at once; "
        f"null: {LOSS_CHUNK_BYTES['cpu'] >> 20} on a CPU, {LOSS_CHUNK_BYTES['cuda'] >> 20} on a GPU",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> ObjectiveConfig:
        name, count = Counter(term.label for term in self.terms).most_common(1)[0]
        if count > 1:
            raise ValueError(f"terms: {count} are called {name!r}; give each a name of its own")
        if all(isinstance(term.weight, (int, float)) and term.weight == 0 for term in self.terms):
            raise ValueError("terms: every weight is 0; nothing would be trained")
        if self.weights is not None and (fault := self.weights.misfit(self.terms)) is not None:
            raise ValueError(f"weights: {fault}")
        bound = next((term.label for term in self.terms if term.at_temperature_one), None)
        if bound is not None and not self._is_at_temperature_one:
            raise ValueError(f"temperature: must be 1, and stay so, for {bound}, which is of what the student samples")
        return self

    @property
    def _is_at_temperature_one(self) -> bool:
        return self.temperature == 1.0 and (self.weights is None or self.weights.keeps_temperature(1.0))

    @property
    def needs_teacher(self) -> bool:
        return any(
            term.needs_teacher or any(w.needs_teacher for w in term.token_weight.values()) for term in self.terms
        )

    @property
    def needs_reference(self) -> bool:
        """The student as it was before training, at some step."""
        return any(term.needs_reference for term in self.terms)

    @property
    def head_products(self) -> tuple[int, int]:
        """Products of hidden states with the student's and the teacher's head before a backward pass.

        One a side for all terms over the vocabulary, and one more a side that terms or token weights need the
        log-probabilities of first. The initial student's head is as large as the student's.
        """
        weights = [w for term in self.terms for w in term.token_weight.values() if isinstance(w, SequenceWeight)]
        of_both = any(term.needs_sequences for term in self.terms)
        of_teacher = of_both or any(weight.needs_teacher_logprobs for weight in weights)
        has_rows = not all(isinstance(term, (StatesTerm, BatchTerm)) for term in self.terms)
        of_student = of_both or bool(weights) or any(term.needs_own_sequences for term in self.terms)
        student_products = has_rows + of_student + self.needs_reference
        return student_products, (has_rows and self.needs_teacher) + of_teacher

    @property
    def needs_groups(self) -> bool:
        """Whether a term goes by what a prompt's samples earned together."""
        return any(term.needs_groups for term in self.terms)

    def check_rewards(self, has_judge: bool, samples_per_prompt: int) -> None:
        """Raises ValueError for a term that goes by rewards where nobody gives any, or none to compare with."""
        for index, term in enumerate(self.terms):
            key = f"objective.terms.{index}"
            if (term.goes_by_reward or term.needs_groups) and not has_judge:
                by = ".advantage: reward" if term.needs_groups else f": {term.label}"
                raise ValueError(f"{key}{by} goes by rewards, which nobody gives; set environment, which judges texts")
            if term.goes_by_reward and term.on is not None and _UNJUDGED.issuperset(term.on):
                raise ValueError(
                    f"{key}.on: {term.label} goes by rewards, and nobody judges the texts of {' and '.join(term.on)}; "
                    "set it to [student], or leave out reward_from and reward_below"
                )
            if term.needs_groups and samples_per_prompt < 2:
                raise ValueError(
                    f"{key}.advantage: reward compares a prompt's samples with one another, and there is one; set "
                    "rollout.samples_per_prompt to 2 or more"
                )

    @property
    def extra_forwards(self) -> int:
        """Without a gradient in a step, of the student or as large: for the vectors of terms about the whole batch, and
        of the student as it was."""
        return any(isinstance(term, BatchTerm) for term in self.terms) + self.needs_reference

    @property
    def state_terms(self) -> dict[str, StatesTerm]:
        """Those that compare states of layers, by their key."""
        return {f"objective.terms.{i}": term for i, term in enumerate(self.terms) if isinstance(term, StatesTerm)}

    def state_pairs(self, student: ModelShape, teacher: ModelShape) -> dict[str, tuple[StatePair, ...]]:
        """What each of these terms compares, by its name. Raises ConfigError for what a model does not have."""
        pairs: dict[str, tuple[StatePair, ...]] = {}
        for key, term in self.state_terms.items():
            try:
                pairs[term.label] = tuple(term.needs_states(student, teacher))
            except ValueError as error:
                raise ConfigError(f"{key}.{error}") from None
        return pairs

    @property
    def metric_rules(self) -> list[MetricRule]:
        schedules: list[Schedule] = [self.temperature, *(s for term in self.terms for s in term.schedules.values())]
        return [schedule for schedule in schedules if isinstance(schedule, MetricRule)]

    @property
    def followed_metrics(self) -> set[str]:
        """Metrics that schedules and the rule over the weights go by."""
        by_rule = self.weights.heldout_metric if self.weights is not None else None
        return {rule.metric for rule in self.metric_rules} | ({by_rule} if by_rule else set())

    def describe(self) -> str:
        """One line for people."""
        text = " + ".join(term.describe() for term in self.terms)
        text += f", weighed by {self.weights.rule}" if self.weights is not None else ""
        return text if self.temperature == 1.0 else f"{text}, temperature {describe_schedule(self.temperature)}"

    def memory(self) -> ObjectiveMemory:
        """That of a run that begins."""
        return ObjectiveMemory(self.metric_rules, self.weights)

    def at(self, step: int, memory: ObjectiveMemory) -> Objective:
        """With the numbers of a step in the place of schedules."""
        from gkd.objectives.objective import objective_at  # torch loads here, not with a config

        chunk_bytes = None if self.chunk_mib is None else self.chunk_mib << 20
        weights, temperature = self.weights_at(step, memory), self._temperature_at(step, memory)
        return objective_at(self.terms, weights, temperature, step, memory.schedules, chunk_bytes)

    def weights_at(self, step: int, memory: ObjectiveMemory) -> dict[str, float]:
        """Of all terms, by their labels."""
        own = {term.label: memory.schedules.value(term.weight, step) for term in self.terms}
        return own if self.weights is None else self.weights.weights_of(memory.rule_state, self.terms, own)

    def rule_metrics(self, memory: ObjectiveMemory) -> dict[str, float]:
        """What is logged of the rule over the weights, beside these."""
        return {} if self.weights is None else self.weights.metrics(memory.rule_state)

    def _temperature_at(self, step: int, memory: ObjectiveMemory) -> float:
        own = memory.schedules.value(self.temperature, step)
        return own if self.weights is None else self.weights.temperature_of(memory.rule_state, own)

    def check_topk(self) -> None:
        """Raises ValueError where a teacher's top k cannot serve a term; the message begins with the key."""
        if not self._is_at_temperature_one:
            raise ValueError(
                "objective.temperature: must be 1, as a top k is told at temperature 1; or use hidden states "
                "(placement: served)"
            )
        for index, term in enumerate(self.terms):
            wants_whole = {"": term.whole_teacher_only}
            wants_whole |= {f".token_weight.{name}": w.needs_whole_teacher for name, w in term.token_weight.items()}
            for key, needs_whole in wants_whole.items():
                if needs_whole:
                    raise ValueError(
                        f"objective.terms.{index}{key}: needs the teacher's whole distribution, not a top k; leave it "
                        "out, or use hidden states (placement: served)"
                    )

    def check_aligned(self, key: str, *, is_ranked: bool) -> None:
        """Raises ValueError where a teacher with another tokenizer cannot serve a term; `key` says that it has one.
        `is_ranked`: of which sorted probabilities are compared."""
        for index, term in enumerate(self.terms):
            place = f"objective.terms.{index}"
            is_known = term.is_divergence or isinstance(term, StatesTerm)  # which `check_states` refuses
            if term.needs_sequences or (term.needs_teacher and not is_known):
                raise ValueError(
                    f"{place}: {term.kind} needs what the teacher says of the student's own tokens, and {key} is of "
                    "another tokenizer; leave it out"
                )
            if is_ranked and term.is_divergence and term.kind != "tvd":
                raise ValueError(
                    f"{place}.kind: {term.kind} is not for {key}: uld, the L1 of sorted probabilities; set it to tvd, "
                    "which is half of that (weight: 2.0 as published)"
                )
            for name, weight in term.token_weight.items():
                if weight.needs_teacher:
                    raise ValueError(
                        f"{place}.token_weight.{name}: needs what the teacher says of the student's own tokens, and "
                        f"{key} is of another tokenizer; leave it out"
                    )

    def check_states(self, fault: str | None) -> None:
        """Raises ValueError if a term compares states of layers where that is at fault."""
        for key, term in self.state_terms.items():
            if fault is not None:
                raise ValueError(f"{key}: {term.kind} compares states of layers, {fault}")

    def check_batch(self, has_other_teachers: bool) -> None:
        """Raises ValueError if vectors of several teachers would be compared with one another."""
        for index, term in enumerate(self.terms):
            if isinstance(term, BatchTerm) and has_other_teachers:
                raise ValueError(
                    f"objective.terms.{index}: {term.kind} compares sequences by the vectors of one teacher; leave out "
                    "other_teachers, or the term"
                )

    def check_sources(self, shares: Mapping[str, float | Ramp]) -> None:
        """Raises ValueError for a term that no text of the mixture could be for; `shares` are the mixture's."""
        trained = [source for source, share in shares.items() if largest(share) > 0]
        for index, term in enumerate(self.terms):
            for source in trained if term.on is None else term.on:
                fault = None
                if source not in shares:
                    fault = f"unknown source {source!r}; known: {', '.join(shares)}"
                elif source not in trained:
                    fault = f"{source}, but mixture.{source} is 0; leave it out, or raise that"
                elif term.on_policy_only and not (
                    (drawn := SOURCES.drawn(source)) is Drawn.BY_STUDENT
                    or (drawn is Drawn.FROM_MIXTURE and term.weighs_mixed)
                ):
                    fault = f"{term.kind} is for the student's own samples, not for {source}; set it to [student]"
                if fault is not None:
                    raise ValueError(f"objective.terms.{index}.on: {fault}")


def default_objective() -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"terms": [{}]})


ObjectiveSection = Annotated[ObjectiveConfig, BeforeValidator(_as_list)]
