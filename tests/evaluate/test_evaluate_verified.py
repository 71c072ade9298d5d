"""Tasks with a verifier, and the bridge to lm-eval where it is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gkd.errors import ConfigError
from gkd.evaluate.figures import Figure
from gkd.evaluate.lm_harness import _metrics, _rows, check_lm_eval
from gkd.evaluate.verified import load_tasks


def test_the_seed_decides_the_problems() -> None:
    (first,), (again,), (other,) = (load_tasks(["chain_sum"], 5, seed) for seed in (1, 1, 2))
    assert first.questions == again.questions != other.questions
    assert len(set(first.questions)) == 5


def test_only_full_marks_count() -> None:
    (task,) = load_tasks(["chain_sum"], 4, 0)
    right = [problem["answer"] for problem in task._problems]
    assert task.solved(right) == [True] * 4
    assert task.solved([f" {text}\n" for text in right]) == [True] * 4
    assert task.solved([f"Let me see. <answer>{text}</answer>" for text in right]) == [True] * 4
    assert task.solved([f"perhaps {text}" for text in right]) == [False] * 4, "partial credit is no accuracy"
    assert task.solved(["", "no", "<answer></answer>", "1e9"]) == [False] * 4


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ConfigError, match=r"eval\.tasks: .*'chain_sums'; did you mean chain_sum\?"):
        load_tasks(["chain_sum", "chain_sums"], 4, 0)


def test_without_reasoning_gym_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('not here')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from gkd.errors import ConfigError\nfrom gkd.evaluate.verified import load_tasks\n"
        "assert load_tasks([], 4, 0) == []\n"
        "try:\n    load_tasks(['chain_sum'], 4, 0)\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("eval.tasks: needs reasoning-gym") and "pip install 'gkd[eval]'" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named() -> None:
    check_lm_eval([])
    with pytest.raises(ConfigError, match=r"eval\.lm_eval: .*gkd\[lm-eval\]"):
        check_lm_eval(["hellaswag"])


def test_results_of_lm_eval_become_rows() -> None:
    """The form is what lm-eval 0.4.13 returned for a task of twelve questions."""
    results = {
        "fruit": {
            "name": "fruit", "alias": "fruit", "sample_len": 12,
            "acc,none": 0.75, "acc_stderr,none": 0.1, "exact,strict": 0.5, "exact_stderr,strict": "N/A",
        }
    }  # fmt: skip
    scores = dict(_metrics(results))
    assert scores["fruit exact (strict)"] == Figure(0.5)
    rows = _rows("fruit", {"teacher": scores, "student_after": "lm-eval: out of reach"})
    assert [row.name for row in rows] == ["lm_eval_fruit_acc", "lm_eval_fruit_exact_(strict)"]
    accuracy = rows[0].cells["teacher"]
    assert (
        isinstance(accuracy, Figure) and accuracy.low == pytest.approx(0.554) and accuracy.high == pytest.approx(0.946)
    )
    assert rows[0].cells["student_after"] == "lm-eval: out of reach"
    (row,) = _rows("tasks/fruit.yaml", {"teacher": "lm-eval: no such file"})
    assert row.title == "fruit" and row.cells == {"teacher": "lm-eval: no such file"}
