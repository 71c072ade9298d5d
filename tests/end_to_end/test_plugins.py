"""A user's own divergence, term, token weight, shape of schedule and source of completions, from outside of gkd."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import MakeConfig, check, read_metrics, run_gkd

PLUGIN = '''
from gkd.objectives.closed_forms import Definition, row_sum
from gkd.objectives.row_losses import RowFunction
from gkd.objectives.terms import Term
from gkd.objectives.token_weights import RowWeight
from gkd.plugins import register_divergence, register_shape, register_source, register_term, register_token_weight
from gkd.rollout.sources import Source
from gkd.types import Rollout


def squared(pair, _, with_gradient):
    difference = pair.student - pair.teacher
    value = row_sum(difference * difference, pair)
    slope = 2 * pair.student * difference
    return value, slope - pair.student * slope.sum(-1, keepdim=True) if with_gradient else None


class Confidence(Term):
    """The student's negative entropy."""

    needs_teacher = False

    def loss(self, values, temperature):
        def negative_entropy(student_logits, teacher_logits, labels):
            log_probs = student_logits.log_softmax(-1)
            return (log_probs.exp() * log_probs).sum(-1)

        return RowFunction(negative_entropy, needs_teacher=False)


class Half(RowWeight):
    def of_rows(self, rows):
        return 0.5 * rows.measure("student_entropy") / rows.measure("student_entropy")


class Echo(Source):
    """The prompt's own last tokens."""

    def complete(self, draws, step):
        return [Rollout(draw, self.name, draw.prompt.token_ids[-3:]) for draw in draws]


register_divergence("squared", Definition(squared))
register_term("confidence", Confidence)
register_token_weight("half", Half)
register_shape("quadratic", lambda progress: progress**2)
register_source("echo", Echo)
'''


@pytest.mark.slow
def test_each_is_used_by_its_name(make_run_config: MakeConfig, tmp_path: Path) -> None:
    package = tmp_path / "installed"
    package.mkdir()
    (package / "my_distillation.py").write_text(PLUGIN)
    config = make_run_config(
        "plugged",
        run={"steps": 3},
        mixture={"student": 0.5, "teacher": 0.0, "dataset": 0.0, "echo": 0.5},
        objective={
            "terms": [
                {"kind": "squared", "token_weight": {"half": {}}},
                {"kind": "confidence", "weight": {"from": 0.0, "to": 1.0, "steps": 2, "shape": "quadratic"}},
                {"kind": "forward_kl", "on": ["echo"], "weight": 0.1},
            ]
        },
    )
    config.write_text(f"plugins: [my_distillation]\n{config.read_text()}")
    missing = run_gkd(["train", config])
    assert missing.returncode == 2 and "plugins.0: no module 'my_distillation' is installed" in missing.stderr
    check(run_gkd(["train", config], PYTHONPATH=str(package)))
    records = read_metrics(tmp_path / "plugged")
    assert [record["objective/confidence/weight"] for record in records] == [0.0, 0.25, 1.0]
    assert "objective/confidence/loss" not in records[0], "a term of weight 0 is not computed"
    assert all(-6 < record["objective/confidence/loss"] < 0 for record in records[1:])
    first = records[0]
    assert sum(record["mixture/echo"] for record in records) > 0 and first["mixture/teacher"] == 0
    squared, forward = first["objective/squared/loss"], first["objective/forward_kl/loss"]
    assert 0 < squared < 2 and forward > 0
    echoed = 3 * 8 * first["mixture/echo"] / first["tokens/scored"]  # share of the tokens, 3 of each such sample
    assert first["loss"] == pytest.approx(0.5 * squared + 0.1 * forward * echoed, rel=1e-5)
