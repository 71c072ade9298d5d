"""The result as JSON, as Markdown and as a table."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from gkd.evaluate.figures import Axis, Evaluation, Figure, Profile, Row, figure
from gkd.evaluate.report import markdown, render

MODELS = {"teacher": "models/big", "student_before": "runs/x/student_init", "student_after": "runs/x/final"}
KL = {"student_before": Figure(8.5417, 8.1, 9.02), "student_after": Figure(0.00001234, 0.0, 0.5)}
ACCURACY = {"teacher": Figure(1.0, 1.0, 1.0), "student_before": "not finite: nan", "student_after": Figure(0.25, 0, 1)}
PROFILE = Profile(
    "forward_kl_by_position",
    "forward KL by position",
    "nats/token",
    "3 prompts",
    buckets=((1, 8), (9, 12)),
    tokens=(24, 7),
    cells={"student_before": (9.0, 8.0), "student_after": (4.0, 3.456)},
)
EVALUATION = Evaluation(
    MODELS,
    {
        "task": Axis(
            rows=(
                Row("forward_kl", "forward KL", "nats/token", KL, "3 prompts"),
                Row("accuracy_a|b", "a|b accuracy", "share", ACCURACY),
            ),
            profiles=(PROFILE,),
            settings={"prompts": 3, "resamples": 200},
        ),
        "efficiency": Axis(not_measured="SamplerError: [bold]vLLM[/bold] is\nmissing"),
        "compression": Axis((Row("bytes", "weights on disk", "bytes", dict.fromkeys(MODELS, Figure(269_060_552))),)),
    },
)


def test_json_and_back() -> None:
    text = json.dumps(EVALUATION.as_json(), allow_nan=False)
    assert Evaluation.from_json(json.loads(text)) == EVALUATION
    values = json.loads(text)
    assert values["task"]["figures"]["forward_kl"]["student_before"] == {"value": 8.5417, "low": 8.1, "high": 9.02}
    assert "teacher" not in values["task"]["figures"]["forward_kl"]
    assert values["efficiency"]["not_measured"].startswith("SamplerError")


def test_what_is_not_finite_is_said_and_never_written_as_a_number() -> None:
    assert figure(float("nan")) == "not finite: nan"
    assert figure(1.0, (0.0, float("inf"))) == "not finite: 1.0"


def test_markdown_has_every_column_in_every_row() -> None:
    lines = markdown(EVALUATION).splitlines()
    table = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert table[0] == "|  | teacher | student before | student after |"
    assert {line.count("|") for line in table} == {5}
    assert "| forward KL, nats/token |  | 8.54 [8.10, 9.02] | 1.2e-05 [0.000, 0.500] |" in table
    assert "| ab accuracy, share | 1.00 [1.00, 1.00] | not measured | 0.250 [0.000, 1.00] |" in table
    assert "| forward KL by position |  | 9.00 8.00 | 4.00 3.46 |" in table
    assert "| weights on disk | 269.1 MB | 269.1 MB | 269.1 MB |" in table
    notes = "\n".join(line for line in lines if line.startswith("- "))
    assert "efficiency not measured: SamplerError: [bold]vLLM[/bold] is missing" in notes
    assert "a|b accuracy (student before): not finite: nan" in notes.replace("\\|", "|")
    assert "prompts 3, resamples 200" in notes and "1-8, 9-12" in notes


def test_the_table_shows_the_same_and_reads_no_markup() -> None:
    stream = io.StringIO()
    render(EVALUATION, Console(file=stream, width=120))
    text = stream.getvalue()
    for part in ("student before", "8.54 [8.10, 9.02]", "269.1 MB", "[bold]vLLM[/bold]", "not measured"):
        assert part in text, part


@pytest.mark.parametrize("only", [("efficiency",), ()])
def test_empty_is_where_nothing_was_measured(only: tuple[str, ...]) -> None:
    axes = {name: EVALUATION.axes[name] for name in only} if only else EVALUATION.axes
    assert Evaluation(MODELS, axes).is_empty == bool(only)
