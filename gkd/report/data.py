"""A run folder as plain data: finished, still going on, cut short or resumed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gkd.errors import RunFolderError
from gkd.measures.answer_tokens import Answer, AnswerTokens
from gkd.monitor.sinks import read_metrics
from gkd.monitor.summary import HeldoutSample, time_totals
from gkd.run_files import RunFiles

Column = list[float | None]  # one value a record; None: not finite, or not in that record
_POSITION_MEANS = ("forward_kl", "reverse_kl", "jsd")
_FENCE = re.compile(r"(`{3,})text")


@dataclass(frozen=True, kw_only=True)
class HeldoutCurve:
    """One held-out divergence: before the first step, in between, after the last.

    `steps[i]` counts the optimizer steps done when `values[i]` was measured. `after` is None until the run has ended.
    """

    steps: list[int]
    values: list[float]
    before: float | None
    after: float | None

    @property
    def left(self) -> float | None:
        """`after` as a share of `before`."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True, kw_only=True)
class PositionProfile:
    """Held-out divergences by position in the completion, after `steps_done` optimizer steps.

    Bucket i holds the tokens i * bucket_tokens + 1 to (i + 1) * bucket_tokens; `tokens[i]` of them were measured.
    """

    steps_done: int
    bucket_tokens: int
    tokens: list[int]
    means: dict[str, Column]  # forward_kl and so on, in nats


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run folder tells. `steps` and each column of `metrics` have one entry a record, oldest first.

    `samples` are there once the run has ended; `early_answers` are the student's before the first step, and there
    from then on. `answer_tokens` has the student's answers "before" and "after", in the samples' order, as far as the
    run wrote them. `time_s` is keyed by phase, in seconds, over all sessions of a resumed run.
    """

    folder: Path
    label: str
    steps: list[int]
    metrics: dict[str, Column]
    config: dict[str, Any]
    environment: dict[str, Any]
    heldout: dict[str, HeldoutCurve]
    time_s: dict[str, float]
    wall_s: float
    finished: bool
    samples: tuple[HeldoutSample, ...] = ()
    early_answers: tuple[str, ...] = ()
    positions: tuple[PositionProfile, ...] = ()  # oldest first
    answer_tokens: Mapping[str, tuple[Answer, ...]] = field(default_factory=dict)
    first_batch: str = ""

    @property
    def total_steps(self) -> int:
        """Steps that the config asks for; those done, if it does not say."""
        return _run_steps(self.config) or self.steps_done

    @property
    def steps_done(self) -> int:
        return self.steps[-1] + 1

    @property
    def seconds(self) -> list[float]:
        """Time in steps up to the end of each record's step."""
        return _running_sum(self.metrics.get("time/step_s"), len(self.steps))

    @property
    def tokens(self) -> list[float]:
        """Tokens scored up to the end of each record's step."""
        return _running_sum(self.metrics.get("tokens/scored"), len(self.steps))


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in these folders, with labels that tell them apart.

    Raises RunFolderError for a folder that is missing, holds no recorded step, is named twice, or has a damaged file.
    """
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if resolved[place] in resolved[:place]:
            raise RunFolderError(f"{folder}: this run is named twice")
    runs = [read_run(folder) for folder in folders]
    labels = [run.label for run in runs]
    return [replace(run, label=f"{run.label} ({run.folder})") if labels.count(run.label) > 1 else run for run in runs]


def read_run(folder: Path) -> RunData:
    """One run. Raises RunFolderError as `read_runs` does."""
    files = RunFiles(folder)
    records = _read_records(files)
    config, before, summary = (read_object(path) for path in (files.config, files.before, files.summary))
    finished = is_finished(summary, config, records[-1]["step"] + 1)
    summary = summary if finished else {}  # it would be that of the steps before a resume
    answers = before.get("answers")
    return RunData(
        folder=folder,
        label=str(_run_section(config).get("name") or folder.resolve().name),
        steps=[record["step"] for record in records],
        metrics=_columns(records),
        config=config,
        environment=read_object(files.environment),
        heldout=_heldout_curves(records, before, summary),
        time_s={key.removeprefix("time/").removesuffix("_s"): value for key, value in time_totals(records).items()},
        wall_s=_number(summary.get("wall_s")) or 0.0,
        finished=finished,
        samples=parse_samples(_text(files.samples)) if finished else (),
        early_answers=tuple(map(str, answers)) if isinstance(answers, list) else (),
        positions=_read_positions(files.positions),
        answer_tokens={
            moment: _read_answer_tokens(path)
            for moment, path in (("before", files.tokens_before), ("after", files.tokens_after))[: 1 + finished]
        },
        first_batch=_text(files.first_batch),
    )


def is_finished(summary: Mapping[str, Any], config: Mapping[str, Any], steps_done: int) -> bool:
    """Whether `summary` tells of the run as it stands now.

    A run that was resumed for more steps keeps the summary of the steps before until it ends again.
    """
    expected = summary.get("steps")
    return isinstance(expected, int) and steps_done >= expected and _run_steps(config) in (None, expected)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. Raises RunFolderError if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise RunFolderError(f"{path}: not a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: not a JSON object")
    return value


def parse_samples(markdown: str) -> tuple[HeldoutSample, ...]:
    """The samples of a samples.md, the inverse of `RunSummary.samples_markdown`; what is incomplete is left out."""
    lines = iter(markdown.split("\n"))
    texts: list[str] = []
    for line in lines:
        if opening := _FENCE.fullmatch(line):
            block: list[str] = []
            for inner in lines:
                if inner == opening[1]:
                    texts.append("\n".join(block))
                    break
                block.append(inner)
    width = len(HeldoutSample._fields)
    whole = len(texts) - len(texts) % width
    return tuple(HeldoutSample(*texts[start : start + width]) for start in range(0, whole, width))


def _read_records(files: RunFiles) -> list[dict[str, Any]]:
    folder, path = files.path, files.metrics
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder")
    try:
        records = read_metrics(path)
    except FileNotFoundError:
        raise RunFolderError(f"{folder}: not a run folder, or no step is done yet ({path.name} is missing)") from None
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}") from error
    if not records:
        raise RunFolderError(f"{path}: no step is recorded yet")
    return records


def _read_positions(path: Path) -> tuple[PositionProfile, ...]:
    """What was measured last after each number of steps, all with the same buckets; () for a run without the file."""
    if not path.is_file():
        return ()
    profiles: dict[int, PositionProfile] = {}
    for record in read_metrics(path):
        try:
            profile = _position_profile(record)
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{path}: the record of step {record['step']} is damaged ({error!r})") from error
        profiles[profile.steps_done] = profile
    if len({(profile.bucket_tokens, len(profile.tokens)) for profile in profiles.values()}) > 1:
        raise RunFolderError(f"{path}: its records have different buckets")
    return tuple(profiles[step] for step in sorted(profiles))


def _position_profile(record: Mapping[str, Any]) -> PositionProfile:
    """Raises KeyError, TypeError or ValueError for a record that is not one."""
    tokens = [int(count) for count in record["tokens"]]
    means = {name: [_number(mean) for mean in record[name]] for name in _POSITION_MEANS}
    if not tokens or any(len(column) != len(tokens) for column in means.values()):
        raise ValueError("columns of different lengths")
    return PositionProfile(
        steps_done=record["step"], bucket_tokens=int(record["bucket_tokens"]), tokens=tokens, means=means
    )


def _read_answer_tokens(path: Path) -> tuple[Answer, ...]:
    """() for a run without the file."""
    if not path.is_file():
        return ()
    try:
        return AnswerTokens.model_validate_json(path.read_bytes()).answers
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunFolderError(
            f"{path}: not the tokens of answers ({place + ': ' if place else ''}{first['msg']})"
        ) from None


def _columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Every numeric metric, in the order of first appearance."""
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    columns = {name: [_number(record.get(name)) for record in records] for name in names}
    return {name: column for name, column in columns.items() if any(value is not None for value in column)}


def _heldout_curves(
    records: Sequence[Mapping[str, Any]], before: Mapping[str, Any], summary: Mapping[str, Any]
) -> dict[str, HeldoutCurve]:
    first = before.get("heldout")
    first = first if isinstance(first, dict) else {}
    names = [name for record in records for name in record if name.startswith("heldout/")]
    curves = {}
    for name in dict.fromkeys([*first, *names]):
        start, end = _number(first.get(name)), _number(summary.get(f"{name.replace('/', '_')}_after"))
        points = [(0, start)] if start is not None else []
        points += [(r["step"] + 1, value) for r in records if (value := _number(r.get(name))) is not None]
        if end is not None and points[-1:] != [(records[-1]["step"] + 1, end)]:
            points.append((records[-1]["step"] + 1, end))
        steps, values = [step for step, _ in points], [value for _, value in points]
        curves[name] = HeldoutCurve(steps=steps, values=values, before=start, after=end)
    return curves


def _running_sum(column: Column | None, count: int) -> list[float]:
    return list(accumulate(value or 0.0 for value in column)) if column else [0.0] * count


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _run_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    section = config.get("run")
    return section if isinstance(section, dict) else {}


def _run_steps(config: Mapping[str, Any]) -> int | None:
    steps = _run_section(config).get("steps")
    return steps if isinstance(steps, int) else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
