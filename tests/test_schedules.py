"""Values that change during a run."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from gkd.errors import ConfigError
from gkd.registry import Registry
from gkd.schedules import MetricMemory, MetricRule, Ramp, ends_of, largest, value_at
from gkd.schema import Section


def ramp(**options: object) -> Ramp:
    return Ramp.model_validate({"from": 1.0, "to": 3.0, "steps": 4, **options})


def rule(**options: object) -> MetricRule:
    return MetricRule.model_validate(
        {"metric": "loss", "from": 1.0, "to": 0.0, "low": 2.0, "high": 4.0, "smoothing": 0.5, **options}
    )


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, [1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]),
        ({"start": 2}, [1.0, 1.0, 1.0, 1.5, 2.0, 2.5, 3.0]),
        ({"shape": "step"}, [1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0]),
        ({"shape": "cosine"}, [2.0 - math.cos(math.pi * x) for x in (0, 0.25, 0.5, 0.75, 1, 1, 1)]),
        ({"from": 3.0, "to": 1.0}, [3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]),
    ],
)
def test_a_ramp_is_a_function_of_the_step(options: dict[str, object], values: list[float]) -> None:
    made = ramp(**options)
    assert [made.at(step) for step in range(7)] == pytest.approx(values)
    assert largest(made) == 3.0 and sorted(ends_of(made)) == [1.0, 3.0]
    assert value_at(made, 1) == made.at(1) and value_at(0.25, 1) == 0.25


def test_a_rule_follows_the_mean_of_its_metric() -> None:
    memory = MetricMemory([rule()])
    assert memory.value(rule(), 0) == 1.0, "before the metric was logged"
    memory.observe({"loss": 4.0, "other": 100.0})
    assert memory.value(rule(), 1) == 0.0
    memory.observe({"loss": 2.0})  # the mean is 3
    assert memory.value(rule(), 2) == pytest.approx(0.5)
    memory.observe({"loss": float("nan")})
    memory.observe({"lr": 1.0})
    assert memory.value(rule(), 3) == pytest.approx(0.5), "what is no number changes nothing"
    again = MetricMemory([rule()])
    again.means = dict(memory.means)
    assert again.value(rule(), 3) == memory.value(rule(), 3), "means are all that is remembered"
    assert memory.value(ramp(), 2) == 2.0 and memory.value(0.5, 2) == 0.5


def test_rules_with_other_smoothing_have_a_mean_of_their_own() -> None:
    slow, fast = rule(smoothing=0.9), rule(smoothing=0.0)
    memory = MetricMemory([slow, fast])
    for loss in (4.0, 2.0):
        memory.observe({"loss": loss})
    assert memory.value(fast, 2) == 1.0 and memory.value(slow, 2) == pytest.approx(0.1)


@pytest.mark.parametrize("options", [{"low": 4.0}, {"metric": "time/step_s"}, {"smoothing": 1.0}])
def test_rules_that_cannot_be(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        rule(**options)


def test_a_schedule_is_written_as_it_is_read() -> None:
    for made in (ramp(), rule()):
        written = made.model_dump(mode="json")
        assert "from" in written and type(made).model_validate(written) == made


def test_a_registry_takes_a_name_once() -> None:
    table: Registry[type[Section]] = Registry("part", {"ramp": "gkd.schedules:Ramp"})
    assert table["ramp"] is Ramp and "rule" not in table
    table.register("rule", MetricRule)
    table.register("rule", MetricRule)  # a module that is imported twice
    assert table.names() == ("ramp", "rule")
    for name, value in (("rule", Ramp), ("ramp", Ramp), ("No name", Ramp)):
        with pytest.raises(ConfigError, match="part"):
            table.register(name, value)
    assert "did you mean 'rule'" in table.explain("ruel")
