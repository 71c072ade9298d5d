"""The loss by tasks: each that of its rows alone, by float64, however the batch is split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_job import BATCH, ragged_rollouts

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.data.tasks import named_tasks
from gkd.models import load_causal_lm, use_packed_attention
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.types import NoScores, Prompt, PromptDraw, Rollout

LABEL, WHY = "label", "why_so"
OBJECTIVE = {"kind": "cross_entropy", "weight": 0.5}


def rollouts_of_tasks() -> list[Rollout]:
    """Of two tasks, and some of none, with weights of rows, which the metric leaves out."""
    found = []
    for place, rollout in enumerate(ragged_rollouts()):
        prompt = rollout.draw.prompt
        task = (f'"{LABEL}"', f'"{WHY}"', None)[place % 3]
        prompt = Prompt(prompt.index, prompt.token_ids, "", weight=0.5 + place, task=task)
        found.append(Rollout(PromptDraw(prompt, 0), "dataset", rollout.completion_ids))
    return found


def stepped(student: Path, tasks: Sequence[str], **size: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics of a step, and the weights after it."""
    distributed.initialize(Launch())
    model: Any = load_causal_lm(str(student), "float32")
    if "micro_batch_tokens" in size:
        use_packed_attention(model, "optim.micro_batch_tokens")
    training = TrainingSettings.model_validate(
        {"objective": OBJECTIVE, "optim": {"batch_size": BATCH, "lr": 1e-3, "warmup_steps": 0, **size}}
    )
    engine = StudentEngine(model.train(), training, Launch(), valid_vocab=259, tasks=tasks)
    rollouts = rollouts_of_tasks()
    batches = pack(
        rollouts, [NoScores(len(rollout.completion_ids)) for rollout in rollouts],
        micro_batch_size=training.optim.micro_batch_size, micro_batch_tokens=training.optim.micro_batch_tokens,
        pad_token_id=0, reduction="token_mean",
    )  # fmt: skip
    return engine.step(batches, 0), [tensor.clone() for _, tensor in engine.weights()]


def by_hand(student: Path) -> dict[str, float]:
    """In float64, a sequence at a time."""
    model: Any = load_causal_lm(str(student), "float32").double()
    sums = {name: [0.0, 0] for name in (LABEL, WHY)}
    for rollout in rollouts_of_tasks():
        if (name := rollout.draw.prompt.task_name) is None:
            continue
        ids = torch.tensor(rollout.token_ids)
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        sums[name][0] -= 0.5 * logprobs[len(rollout.draw.prompt.token_ids) - 1 :].sum().item()
        sums[name][1] += len(rollout.completion_ids)
    return {
        f"task/{name}/{key}": value
        for name, (total, n) in sums.items()
        for key, value in (("loss", total / n), ("tokens", n))
    }


@pytest.mark.parametrize(
    "size", [{"micro_batch_size": BATCH}, {"micro_batch_size": 1}, {"micro_batch_tokens": 64}], ids=str
)
def test_each_task_has_the_loss_of_its_own_rows(tiny_student: Path, size: dict[str, int]) -> None:
    metrics, weights = stepped(tiny_student, [LABEL, WHY], **size)
    found = {name: value for name, value in metrics.items() if name.startswith("task/")}
    assert found == pytest.approx(by_hand(tiny_student), rel=1e-5)
    assert found["task/label/tokens"] + found["task/why_so/tokens"] < metrics["tokens/scored"], "some rows have none"
    plain, same = stepped(tiny_student, [], **size)
    assert not any(name.startswith("task/") for name in plain) and plain["loss"] == metrics["loss"]
    assert all(torch.equal(one, other) for one, other in zip(weights, same, strict=True))


def prompts(*tasks: str | None) -> list[Prompt]:
    return [Prompt(index, (1,), "", task=task) for index, task in enumerate(tasks)]


def test_a_name_is_a_task_that_metrics_know(caplog: pytest.LogCaptureFixture) -> None:
    assert named_tasks(
        prompts('"b"', None, '{"answer": 1}', '"a"', '"b"', '"two words"', '"a/b"', "3", '""'), None
    ) == ["a", "b"]
    caplog.set_level("INFO", logger="gkd")
    assert named_tasks(prompts(*(f'"t{i}"' for i in range(17))), None) == ()
    assert "task has 17 names" in caplog.text


def test_an_environments_tasks_are_its_own() -> None:
    class Kind:
        kind = "any"

        def check_task(self, data: object) -> None: ...

    assert named_tasks(prompts('"a"'), Kind()) == ()  # pyright: ignore[reportArgumentType]
