"""Rules that move weight between terms as the run goes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gkd.config import Config, make_config
from gkd.errors import ConfigError
from gkd.objectives.memory import ObjectiveMemory

TERMS = [{"kind": "forward_kl"}, {"kind": "cross_entropy", "on": ["dataset"], "weight": 0.3}]


def config(weights: dict[str, Any], terms: Any = TERMS, **sections: Any) -> Config:
    return make_config(
        {
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "data": {"train": "d.jsonl", "heldout": "h.jsonl"},
            "mixture": {"student": 0.5, "dataset": 0.5},
            "eval": {"every": 1},
            "objective": {"terms": terms, "temperature": 2.0, "weights": weights},
            **sections,
        }
    )


def step(soft: float, hard: float, **metrics: float) -> dict[str, float]:
    """What is logged of a step's training."""
    losses = {"objective/forward_kl/loss": soft, "objective/cross_entropy/loss": hard}
    return {"tokens/scored": 1e6, **losses, **metrics}


def test_dwa_is_the_published_formula() -> None:
    objective = config({"rule": "dwa", "window": 2, "temperature": 2.0}).objective
    memory = objective.memory()
    for number, losses in enumerate([(4.0, 2.0), (2.0, 2.0), (2.0, 1.0), (1.0, 2.0)]):
        assert objective.weights_at(number, memory) == {"forward_kl": 1.0, "cross_entropy": 0.3}, "two windows first"
        memory.observe(step(*losses))
        memory.observe({"heldout/forward_kl": 9.0, "objective/forward_kl/loss": 1e3})  # not of a step's training
    exponentials = [math.exp(1.5 / 3.0 / 2.0), math.exp(1.5 / 2.0 / 2.0)]
    expected = [2 * e / sum(exponentials) for e in exponentials]
    weights = objective.weights_at(4, memory)
    assert list(weights.values()) == pytest.approx([expected[0], 0.3 * expected[1]], rel=1e-12)
    assert [term.weight for term in objective.at(4, memory).terms] == list(weights.values())
    memory.observe({"tokens/scored": 5.0, "objective/forward_kl/loss": 1.5})  # a window without the other's rows
    memory.observe({"tokens/scored": 5.0, "objective/forward_kl/loss": float("nan")})
    assert objective.weights_at(6, memory)["forward_kl"] == pytest.approx(1.0), "1.5 / 1.5 and, kept, 1.5 / 1.5"


def test_weights_fed_back_tend_to_nothing() -> None:
    """Whatever the losses are."""
    objective = config(
        {"rule": "dwa", "window": 1, "signal": "weights"}, [{**TERMS[0], "weight": 3.0}, TERMS[1]]
    ).objective
    memory, seen = objective.memory(), []
    for number in range(20):
        weights = objective.weights_at(number, memory)
        seen.append(weights["forward_kl"] / 3.0)
        memory.observe(step(1.0 + number, 1.0, **{f"objective/{n}/weight": weight for n, weight in weights.items()}))
    own = [math.exp(3.0 / 2.0), math.exp(0.3 / 2.0)]
    assert seen[:2] == pytest.approx([1.0, 2 * own[0] / sum(own)]) and seen[2] == pytest.approx(
        2 / (1 + math.exp(1.0 - seen[1]))
    )
    assert seen[-1] == pytest.approx(1.0, abs=1e-4)


def test_adaptive_goes_from_soft_to_hard() -> None:
    """Efficiencies of 1.0, 0.5 and 0.2 nats a million tokens; the last one is under 0.3 of the best."""
    rule = {"rule": "adaptive", "window": 1, "share": 0.3, "cooling": 0.6, "shift": 0.25, "stages": 2}
    objective = config(rule).objective
    memory = objective.memory()

    def now() -> tuple[float, ...]:
        made = objective.at(0, memory)
        return (made.temperature, *objective.weights_at(0, memory).values())

    for heldout in (5.0, 4.0, 3.5):
        memory.observe(step(1.0, 1.0))
        memory.observe({"heldout/forward_kl": heldout})
        assert now() == (2.0, 1.0, 0.3)
    memory.observe(step(1.0, 1.0))
    memory.observe({"heldout/forward_kl": 3.3})
    assert now() == pytest.approx((1.2, 0.75, 0.55))
    assert objective.rule_metrics(memory) == pytest.approx(
        {"objective/stage": 1, "objective/transfer_efficiency": 0.2}, rel=1e-9
    )
    for heldout in (3.2, 3.3, 3.3, 3.3):  # a stage has a best of its own; one that gets worse ends at once
        memory.observe(step(1.0, 1.0))
        memory.observe({"heldout/forward_kl": heldout})
    assert now() == pytest.approx((1.0, 0.5, 0.8)), "two stages and no more; cooling ends at 1"


@pytest.mark.parametrize("rule", [{"rule": "dwa", "window": 2}, {"rule": "adaptive", "window": 1}])
def test_what_is_saved_is_all_that_is_remembered(rule: dict[str, Any]) -> None:
    objective = config(rule).objective
    memory, again = objective.memory(), objective.memory()
    logged = [step(4.0, 1.0) | {"heldout/forward_kl": 4.0}, step(1.0, 2.0) | {"heldout/forward_kl": 3.0}] * 3
    for metrics in logged:
        memory.observe(metrics)
    again.restore(json.loads(json.dumps(memory.saved())))
    for metrics in logged[:3]:
        memory.observe(metrics)
        again.observe(metrics)
        assert objective.at(9, again) == objective.at(9, memory)
    assert memory.saved() == again.saved() != objective.memory().saved()


@pytest.mark.parametrize(
    ("rule", "terms", "sections", "message"),
    [
        ({"rule": "dwaa"}, TERMS, {}, r"objective\.weights\.rule: unknown rule 'dwaa'; did you mean 'dwa'\?"),
        ({"window": 3}, TERMS, {}, r"objective\.weights\.rule: is missing; one of dwa, adaptive"),
        ({"rule": "dwa", "windo": 3}, TERMS, {}, r"objective\.weights\.windo: unknown key"),
        ({"rule": "dwa"}, TERMS[:1], {}, r"objective\.weights: dwa weighs terms against each other"),
        (
            {"rule": "dwa"},
            [*TERMS, {"kind": "policy_gradient", "on": ["student"]}],
            {},
            r"but policy_gradient may be negative",
        ),
        ({"rule": "adaptive"}, TERMS[:1], {}, r"objective\.weights: adaptive moves weight from terms"),
        ({"rule": "adaptive", "shift": 0.5}, TERMS, {}, r"more than all the weight there is"),
        ({"rule": "adaptive"}, TERMS, {"eval": {"every": 0}}, r"heldout/forward_kl, which is not measured while"),
        ({"rule": "adaptive"}, TERMS, {"data": {"train": "d.jsonl"}}, r"heldout/forward_kl, which is not measured"),
    ],
)
def test_rules_that_cannot_be(rule: Any, terms: Any, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(rule, terms, **sections)


def test_a_schedule_goes_by_what_is_measured() -> None:
    followed = {"metric": "heldout/jsd", "from": 1.0, "to": 0.0, "low": 0.1, "high": 0.2}
    with pytest.raises(ConfigError, match=r"objective: goes by heldout/jsd, which is not measured"):
        config({"rule": "dwa"}, [{"kind": "jsd", "weight": followed}, TERMS[1]], eval={"every": 0})


def test_without_a_rule_nothing_is_remembered_of_it() -> None:
    assert ObjectiveMemory().saved() == {"metric_means": {}, "weight_rule": {}}
