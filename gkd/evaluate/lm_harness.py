"""A bridge to EleutherAI's lm-eval: its tasks, prompts and scores, on the same three models.

Its data sets come from the hub, or from files that a task's YAML names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gkd.errors import ConfigError
from gkd.evaluate.figures import COLUMNS, Cell, Row, figure

_NORMAL_95 = 1.96  # standard errors on both sides of a mean that hold 95 % of a normal distribution
_SOURCE = "lm-eval; in brackets 1.96 of its standard errors"

# One model's result of one task: metric -> figure, or why there is none.
_Scores = dict[str, Cell] | str


def check_lm_eval(tasks: Sequence[str]) -> None:
    """Raises ConfigError, naming eval.lm_eval, if tasks are asked for and lm-eval is not installed."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "eval.lm_eval: lm-eval is not installed; run `pip install 'gkd[lm-eval]'`, or leave the list empty"
        )


def lm_eval_rows(
    tasks: Sequence[str],
    folders: Mapping[str, Path],
    dtypes: Mapping[str, str],
    *,
    device: str,
    batch_size: int,
    resamples: int,
    note: Callable[[str], None],
) -> list[Row]:
    """A row for every metric of every task; a task is a name that lm-eval knows, or the path of a YAML file.

    `resamples` are lm-eval's own, for metrics whose standard error has no formula.
    """
    scores: dict[str, dict[str, _Scores]] = {task: {} for task in tasks}
    for column, folder in folders.items():
        model = _load(folder, dtypes[column], device, batch_size)
        for task in tasks:
            note(f"lm-eval: {task} with the {COLUMNS[column]}")
            scores[task][column] = _measure(model, task, resamples)
        del model
    return [row for task in tasks for row in _rows(task, scores[task])]


def _load(folder: Path, dtype: str, device: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    return HFLM(pretrained=str(folder), dtype=dtype, device=device, batch_size=batch_size, trust_remote_code=False)


def _measure(model: Any, task: str, resamples: int) -> _Scores:
    import lm_eval  # pyright: ignore[reportMissingImports]

    try:
        done = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=resamples, log_samples=False)
    except Exception as error:  # noqa: BLE001  a data set out of reach must not lose the other tasks
        return f"lm-eval: {error}"
    return dict(_metrics(done["results"]))


def _metrics(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Cell]]:
    """lm-eval writes "acc,none" and "acc_stderr,none": a metric, then the filter that answers went through."""
    for name, values in results.items():
        for key, value in values.items():
            metric, comma, answer_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{answer_filter}")
            margin = _NORMAL_95 * error if isinstance(error, int | float) else None
            title = f"{name} {metric}" + ("" if answer_filter == "none" else f" ({answer_filter})")
            yield title, figure(value, None if margin is None else (value - margin, value + margin))


def _rows(task: str, scores: Mapping[str, _Scores]) -> list[Row]:
    metrics = dict.fromkeys(metric for found in scores.values() if isinstance(found, dict) for metric in found)
    missing: dict[str, Cell] = {column: found for column, found in scores.items() if isinstance(found, str)}
    titles = list(metrics) or [Path(task).stem]
    return [
        Row(
            "lm_eval_" + title.replace(" ", "_"),
            title,
            "",
            missing | {column: found[title] for column, found in scores.items() if isinstance(found, dict)},
            _SOURCE,
        )
        for title in titles
    ]
