"""Policy gradient on the student's own samples, at temperature 1.

With a constant advantage A it is REINFORCE (Williams 1992, Machine Learning 8) for one sample of each token's action,
without a ratio: at the step that sampled it the ratio is 1.

    value = -A log Q(token),   gradient with respect to the logits = A (Q - onehot(token)).

With the teacher's advantage it is MiniLLM (Gu et al. 2023, arXiv 2306.08543), the gradient of the reverse KL between
whole texts. The reward of a token is log P(token) - log Q(token), and what comes after token t is worth R_t, the sum of
the later tokens' rewards. What the token itself is worth need not be sampled: its expectation is a reverse KL.

    value of token t = KL(Q || P) at t - R_t log Q(token),   R_t detached.

The published form takes for R_t the mean of the later rewards (`length_normalize`), so that long texts weigh no more,
and clips the ratio to the sampler. Texts that student and teacher drew together (the source `mixed`) are weighed token
by token (`gkd.objectives.returns`). Its regulariser is a `cross_entropy` on the data set's rows, a term beside it.

With rewards it is GRPO's (arXiv 2402.03300): A is what a text earned beside its prompt's other samples,
(r - mean) / (std + 1e-6), the same for all of its tokens, and the ratio to the sampler is clipped. Without the division
(`normalize_std: false`), as Dr. GRPO has it (2503.20783), prompts whose samples all but agree weigh no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from gkd.objectives.terms.base import Term

if TYPE_CHECKING:
    from gkd.objectives.row_losses import LabelLoss, OfSequences, Part

_OPTIONS = {
    "constant": {"constant"},
    "teacher": {"single_step", "length_normalize", "clip_range"},
    "reward": {"normalize_std", "clip_range"},
}


class PolicyGradient(Term):
    """-A log Q(token) of tokens that the student sampled.

    With A = -1 for all of them it lowers whatever was sampled: the control that asks how much of on-policy distillation
    by the reverse KL, whose advantages are mostly negative, needs no teacher.
    """

    on_policy_only: ClassVar[bool] = True
    is_nonnegative: ClassVar[bool] = False

    advantage: Literal["constant", "teacher", "reward"] = Field(
        "constant", description="where a token's advantage comes from"
    )
    constant: float = Field(-1.0, description="advantage: constant: that of every token")
    single_step: Literal["exact", "sampled"] = Field(
        "exact", description="advantage: teacher: a token's own reward as its mean, the reverse KL, or as sampled"
    )
    length_normalize: bool = Field(True, description="advantage: teacher: the mean of the later rewards, not their sum")
    normalize_std: bool = Field(
        True, description="advantage: reward: divided by the deviation of the prompt's samples' rewards"
    )
    clip_range: float | None = Field(
        None, gt=0.0, lt=1.0, description="teacher, reward: clips the ratio to the sampler at 1 - and 1 + this"
    )

    @model_validator(mode="after")
    def _options_are_of_the_advantage(self) -> PolicyGradient:
        others = {key for options in _OPTIONS.values() for key in options} - _OPTIONS[self.advantage]
        for key in sorted(others):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: has no meaning with advantage: {self.advantage}; leave it out")
        return self

    @property
    def _is_by_teacher(self) -> bool:
        return self.advantage == "teacher"

    @property
    def _is_by_reward(self) -> bool:
        return self.advantage == "reward"

    @property
    def needs_own_sequences(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._is_by_reward

    @property
    def needs_groups(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._is_by_reward

    @property
    def needs_teacher(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # an option decides
        return self._is_by_teacher

    @property
    def whole_teacher_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._is_by_teacher

    @property
    def needs_sequences(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._is_by_teacher

    @property
    def weighs_mixed(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._is_by_teacher

    @property
    def at_temperature_one(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._is_by_teacher

    def loss(self, values: Mapping[str, float], temperature: float) -> LabelLoss:
        from gkd.objectives.row_losses import LabelLoss

        return LabelLoss(self.constant)

    def sequence_weights(self) -> tuple[OfSequences, ...]:
        from gkd.objectives.returns import MixedImportance

        own = super().sequence_weights()
        return (*own, MixedImportance()) if self._is_by_teacher else own

    def parts(self, values: Mapping[str, float], temperature: float) -> tuple[Part, ...]:
        from gkd.objectives.divergence import Divergence
        from gkd.objectives.returns import CostToGo, RewardCost
        from gkd.objectives.row_losses import LabelLoss, Part

        if self._is_by_reward:
            return (Part(LabelLoss(-1.0), RewardCost(self.normalize_std, self.clip_range)),)
        if not self._is_by_teacher:
            return super().parts(values, temperature)
        is_sampled = self.single_step == "sampled"
        later = CostToGo(is_sampled, self.length_normalize, self.clip_range)
        sampled = Part(LabelLoss(-1.0), later)  # log Q(token) x the cost, which may be below 0
        return (sampled,) if is_sampled else (Part(Divergence("reverse_kl")), sampled)
