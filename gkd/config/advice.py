"""What published work says about values that a config sets. One line each: what, the source, the key.

Only what was written out, and not as the default has it, is spoken of; only where the source's own case is the run's;
and where sources contradict one another there is no advice. docs/choosing.md lists them all.
"""

from __future__ import annotations

from gkd.config.config import Config
from gkd.config.sections import OptimConfig
from gkd.objectives.terms.base import Term
from gkd.objectives.terms.cross_entropy import CrossEntropy
from gkd.objectives.terms.divergence import DivergenceTerm

HINTON = "Hinton et al., arXiv 1503.02531"
MINITRON = "Sreenivas et al., arXiv 2408.11796"
MINILLM = "Gu et al., arXiv 2306.08543"
CAPACITY = "Zhang et al., arXiv 2311.07052"

_CUT_LR = 1e-4  # of pruned students there
_ON_POLICY_LR = 5e-6  # of fine-tuned students there
_FAR = 5.0  # times more or less than a source's value is worth a word
_BEST_SHARE = 0.4  # of its teacher, of the best students there: teachers of 2.5 times their size
_SMALL_SHARE = 0.05


def advice(config: Config) -> list[str]:
    """Lines for `--dry-run`; none of most configs."""
    lines = [_labels_against_soft_targets(config), _temperature(config), _hard_share(config), _learning_rate(config)]
    return [line for line in lines if line is not None]


def advice_on_share(student_parameters: int, teacher_parameters: int) -> str | None:
    """Of a student that is much smaller than its teacher."""
    share = student_parameters / teacher_parameters
    if share >= _SMALL_SHARE:
        return None
    return (
        f"advice: the student has {share:.1%} of its teacher's parameters; a smaller teacher often makes a better "
        f"student of that size, at best one of {1 / _BEST_SHARE:g} times its size there ({CAPACITY}): teacher.model, "
        "or stages between them with gkd chain"
    )


def _labels_against_soft_targets(config: Config) -> str | None:
    """The gradient of soft targets falls with 1 / T^2, that of labels does not. A rule over the weights may help."""
    temperature = _temperature_set(config)
    soft, hard = _soft_and_hard(config)
    unscaled = [index for index, term in soft if not term.scale_by_temperature_squared]
    if temperature is None or temperature == 1.0 or not hard or not unscaled or config.objective.weights is not None:
        return None
    key = f"{_key(config, unscaled[0])}.scale_by_temperature_squared"
    return (
        f"advice: at temperature {temperature:g} soft targets weigh about 1/{temperature**2:.3g} of what they do "
        f"beside labels; multiply by T^2 ({HINTON}, section 2): {key}"
    )


def _temperature(config: Config) -> str | None:
    """Sharpened targets are what nobody recommends; above 1 it is for and against, so nothing is said."""
    temperature = _temperature_set(config)
    if temperature is None or temperature >= 1.0 or _samples_student(config) or not _soft_and_hard(config)[0]:
        return None
    return (
        f"advice: temperature {temperature:g} sharpens the teacher's distribution, and distillation off policy is done "
        f"at 1 or above ({HINTON}, section 2): objective.temperature"
    )


def _hard_share(config: Config) -> str | None:
    soft, hard = _soft_and_hard(config)
    terms = [term for _, term in (*soft, *hard)]
    weights = [term.weight for term in terms if isinstance(term.weight, int | float)]
    is_set = any("weight" in term.model_fields_set for term in terms)
    if _samples_student(config) or not soft or not hard or len(weights) < len(terms) or not is_set:
        return None
    share = sum(weights[len(soft) :]) / sum(weights)
    if share <= 0.5:
        return None
    return (
        f"advice: labels have {share:.0%} of the weight; best results were with considerably less on them than on soft "
        f"targets ({HINTON}, section 2): {_key(config, hard[0][0])}.weight"
    )


def _learning_rate(config: Config) -> str | None:
    """Of a cut student and of one that is fine-tuned on its own samples; adapters have rates of their own."""
    rate = config.optim.lr
    if rate == OptimConfig.model_fields["lr"].default or config.student.lora is not None:
        return None
    if config.student.init is not None and rate < _CUT_LR / _FAR:
        return (
            f"advice: {rate:g} is little for a student that was cut out of a model; {_CUT_LR:g} at the peak retrained "
            f"pruned ones ({MINITRON}): optim.lr"
        )
    if config.student.init is None and config.mixture.uses("student") and rate > _ON_POLICY_LR * _FAR**2:
        return (
            f"advice: {rate:g} is much for a whole student that learns from its own samples; {_ON_POLICY_LR:g} was "
            f"taken from 120 M to 13 B parameters ({MINILLM}): optim.lr"
        )
    return None


def _temperature_set(config: Config) -> float | None:
    """The objective's, if it was written out as a number."""
    temperature = config.objective.temperature
    is_set = "temperature" in config.objective.model_fields_set
    return temperature if is_set and isinstance(temperature, int | float) else None


def _samples_student(config: Config) -> bool:
    """Whether anything is trained on that came from the student."""
    return any(config.mixture.uses(name) for name in config.mixture.shares if name not in ("teacher", "dataset"))


def _soft_and_hard(config: Config) -> tuple[list[tuple[int, DivergenceTerm]], list[tuple[int, Term]]]:
    """Places and terms of divergences, and of labels."""
    terms = list(enumerate(config.objective.terms))
    soft = [(index, term) for index, term in terms if isinstance(term, DivergenceTerm)]
    return soft, [(index, term) for index, term in terms if isinstance(term, CrossEntropy)]


def _key(config: Config, index: int) -> str:
    return "objective" if len(config.objective.terms) == 1 else f"objective.terms.{index}"
