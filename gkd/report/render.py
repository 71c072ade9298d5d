"""The page: everything that can be text is written here, the script only draws the curves.

What comes from models, configs and folder names is escaped by the template and cleaned of control characters; in the
JSON no `<` is left. The page's policy allows the one script and the one style sheet that this module put there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from gkd.config import describe_keys
from gkd.files import flatten, write_atomically
from gkd.measures.answer_tokens import AnswerToken
from gkd.monitor.text import clean, format_duration, format_rate, format_value
from gkd.monitor.titles import DIVERGENCE_TITLES, PHASE_TITLES
from gkd.report.charts import COLOURS, Chart, chart_sections, heldout_charts, run_payload
from gkd.report.data import RunData
from gkd.report.tokens import MAX_TOKENS, level_titles, strip_maximum, strip_payload, strips, token_payload, token_spans

_OUTSIDE = "load, evaluate, save"
_NAMES = {"run.name", "run.dir"}  # differ between any two runs
_OUTLINE = {"learning rate": "optim.lr", "batch": "optim.batch_size", "sampler": "rollout.engine"}
_ABSENT = "–"
_SCRIPTS = ("numbers.js", "report.js", "tokens.js")  # of one script element, in this order


class Fact(NamedTuple):
    """A figure of a run for its head: value large, note small."""

    title: str
    value: str
    note: str


class HeldoutRow(NamedTuple):
    divergence: str
    run: str
    colour: int
    before: str
    after: str
    left: str
    percent: float | None


class TimePart(NamedTuple):
    """A phase of a run; `start` and `width` in percent of the longest run."""

    title: str
    colour: int
    seconds: float
    share: float
    start: float
    width: float


@dataclass(frozen=True)
class Answer:
    who: str
    text: str
    kind: str  # teacher, before or after: how it is coloured
    tokens: tuple[AnswerToken, ...] = ()  # if the run scored them


class ConfigRow(NamedTuple):
    """`default` is empty where it is what the run used."""

    key: str
    value: str
    default: str
    meaning: str


class BatchToken(NamedTuple):
    text: str
    scored: bool


def write_report(runs: Sequence[RunData], path: Path, version: str = "") -> None:
    """Writes the page in one step; `version` is that of gkd. Raises OSError that names the path."""
    write_atomically(path, render_report(runs, version).encode("utf-8"))


def render_report(runs: Sequence[RunData], version: str = "") -> str:
    """The whole page for one run or several."""
    script, style = "".join(map(_file, _SCRIPTS)), style_sheet()
    heldout, sections = heldout_charts(runs), chart_sections(runs)
    charts = [*heldout, *(chart for members in sections.values() for chart in members)]
    samples = sample_groups(runs)
    early = [(run.label, groups) for run in runs if (groups := early_answers(run))]
    groups = [*samples, *(group for _, members in early for group in members)]
    answers = [answer for _, members in groups for answer in members]  # in the order of the page
    number = count()  # in the order of `charts`
    return (
        page_environment()
        .from_string(_file("template.html"))
        .render(
            policy=page_policy(script, style),
            script=script,
            style=style,
            data=_script_json(_payload(runs, charts, answers)),
            runs=runs,
            title=" · ".join(run.label for run in runs),
            version=version,
            outlines=[outline(run) for run in runs],
            facts=[facts(run) for run in runs],
            heldout=heldout_rows(runs),
            heldout_charts=[(next(number), chart) for chart in heldout],
            sections={heading: [(next(number), chart) for chart in members] for heading, members in sections.items()},
            times=time_parts(runs),
            samples=samples,
            early=early,
            answer_number=count().__next__,  # as in the data: of the answers that have tokens
            has_tokens=any(answer.tokens for answer in answers),
            levels=level_titles(),
            max_tokens=MAX_TOKENS,
            strips=strips(runs),
            strip_maximum=f"{strip_maximum(runs):.3g}",
            batches=[list(batch_tokens(run.first_batch)) for run in runs],
            differences=config_differences(runs),
            configs=[config_rows(run) for run in runs],
            environments=[[(key, _shown(value)) for key, value in flatten(run.environment).items()] for run in runs],
            colours=COLOURS,
        )
    )


_WIDTH = "student.init.width."


def outline(run: RunData) -> str:
    """`teacher → student · objective · ...`, as far as the config says."""
    config = flatten(run.config)
    layers, choose = config.get("student.init.layers"), config.get("student.init.choose", "even")
    by = "" if choose == "even" else f" by {choose}"
    width = [f"{name.rpartition('.')[2]} {size}" for name, size in config.items() if size and _WIDTH in name]
    cut = [f"{layers} of its layers{by}"] * bool(layers) + width
    student = config.get("student.model") or ", ".join(cut)
    parts = [" → ".join(str(model) for model in (config.get("teacher.model"), student) if model)]
    terms = [term for term in config.get("objective.terms") or () if isinstance(term, dict)]
    parts.append(" + ".join(str(term.get("name") or term.get("kind")) for term in terms))
    parts += [f"{name} {config[key]}" for name, key in _OUTLINE.items() if config.get(key) is not None]
    return " · ".join(part for part in parts if part)


def facts(run: RunData) -> list[Fact]:
    """What a reader wants first."""
    tokens, in_steps = run.tokens[-1], run.seconds[-1]
    loss = [value for value in run.metrics.get("loss", []) if value is not None]
    steps = f"{run.steps_done}" if run.finished else f"{run.steps_done} of {run.total_steps}"
    wall = run.wall_s if run.wall_s >= in_steps else in_steps  # a resumed run's is that of the last session only
    return [
        _heldout_fact(run),
        Fact("loss", f"{format_value(loss[0])} → {format_value(loss[-1])}" if loss else _ABSENT, "first and last step"),
        Fact("steps", steps, "finished" if run.finished else "not finished"),
        Fact("tokens scored", format_rate(tokens) if tokens else _ABSENT, "over all steps and ranks"),
        Fact("tokens a second", format_rate(tokens / in_steps) if tokens and in_steps else _ABSENT, "scored, mean"),
        Fact(
            "wall time",
            format_duration(wall) if wall else _ABSENT,
            f"{format_duration(in_steps)} of it in steps" if wall > in_steps else "in steps, all sessions",
        ),
    ]


def heldout_rows(runs: Sequence[RunData]) -> list[HeldoutRow]:
    """One row a divergence and run. A run that goes on shows the latest figure."""
    names = dict.fromkeys(name for run in runs for name in run.heldout)
    rows = []
    for name in names:
        short = name.removeprefix("heldout/")
        for place, run in enumerate(runs):
            if (curve := run.heldout.get(name)) is None:
                continue
            before = _ABSENT if curve.before is None else format_value(curve.before)
            latest = curve.values[-1] if len(curve.values) > (curve.before is not None) else None
            after = _ABSENT if latest is None else format_value(latest)
            left = 100 * latest / curve.before if curve.before and latest is not None else None
            shown = _ABSENT if left is None else f"{left:.1f} %"
            title = DIVERGENCE_TITLES.get(short, short.replace("_", " "))
            rows.append(HeldoutRow(title, run.label, place % COLOURS, before, after, shown, left))
    return rows


def time_parts(runs: Sequence[RunData]) -> list[list[TimePart]]:
    """For each run where its time went, phases in order; all bars on one scale."""
    seconds = []
    for run in runs:
        parts = {title: run.time_s.get(phase, 0.0) for phase, title in PHASE_TITLES.items()}
        parts[_OUTSIDE] = max(0.0, run.wall_s - run.seconds[-1])
        seconds.append(parts)
    longest = max(sum(parts.values()) for parts in seconds) or 1.0
    titles = [title for title in seconds[0] if any(parts[title] for parts in seconds)]
    rows = []
    for parts in seconds:
        start, whole = 0.0, sum(parts.values()) or 1.0
        row = []
        for colour, (title, value) in enumerate(parts.items()):
            if title not in titles:
                continue
            row.append(TimePart(title, colour, value, 100 * value / whole, start, 100 * value / longest))
            start += 100 * value / longest
        rows.append(row)
    return rows


def sample_groups(runs: Sequence[RunData]) -> list[tuple[str, list[Answer]]]:
    """(prompt, answers) with the answers of all runs to it side by side; the same text by the same is there once."""
    groups: dict[str, dict[Answer, list[str]]] = {}
    for run in runs:
        for sample in run.samples:
            groups.setdefault(sample.prompt, {})
    for place, kind in enumerate(("teacher", "before", "after"), start=1):
        for run in runs:
            for number, sample in enumerate(run.samples):
                answer = _answer(run, kind, number, sample[place])
                groups[sample.prompt].setdefault(answer, []).append(run.label)
    alone = len(runs) == 1
    return [
        (prompt, [answer if alone else _named(answer, labels) for answer, labels in found.items()])
        for prompt, found in groups.items()
    ]


def early_answers(run: RunData) -> list[tuple[str, list[Answer]]]:
    """(prompt, the student's answer before the first step), for a run that has not ended."""
    if run.samples:
        return []
    scored = [answer.prompt for answer in run.answer_tokens.get("before", ())]
    prompts = scored or [f"held-out prompt {number}" for number in range(1, len(run.early_answers) + 1)]
    return [
        (prompt, [_answer(run, "before", number, text)])
        for number, (prompt, text) in enumerate(zip(prompts, run.early_answers, strict=False))
    ]


def config_rows(run: RunData) -> list[ConfigRow]:
    """Every key of a run's resolved config."""
    known = {key: (default, meaning) for key, default, meaning in describe_keys()}
    rows = []
    for key, value in flatten(run.config).items():
        default, meaning = known.get(key, ("required", ""))
        # JSON has made lists of tuples
        is_default = default in ("required", repr(value), repr(tuple(value)) if isinstance(value, list) else None)
        rows.append(ConfigRow(key, _shown(value), "" if is_default else default, meaning))
    return rows


def config_differences(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(key, value of each run) for the keys in which the runs differ."""
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NAMES)
    rows = [(key, [_shown(config[key]) if key in config else _ABSENT for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def batch_tokens(text: str) -> Iterator[BatchToken]:
    """The pieces of a samples/first_batch.txt, the inverse of `first_batch_text`: scored tokens stand in brackets."""
    body = text.partition("\n\n")[2]
    for bracketed, bare in re.findall(r"\[((?:\\.|[^\\\]])*)\]|((?:\\.|[^\\\[])+)", body, flags=re.DOTALL):
        yield BatchToken(re.sub(r"\\(.)", r"\1", bracketed or bare), bool(bracketed))


def _answer(run: RunData, kind: str, number: int, text: str) -> Answer:
    scored = run.answer_tokens.get(kind, ())
    tokens = scored[number].tokens if number < len(scored) else ()
    return Answer("teacher" if kind == "teacher" else f"student {kind}", text, kind, tokens)


def _named(answer: Answer, labels: Sequence[str]) -> Answer:
    return replace(answer, who=f"{answer.who}, {' and '.join(labels)}")


def page_environment() -> Environment:
    """Of templates of pages: everything is escaped, and `clean` is at hand."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        clean=lambda value: clean(str(value)), duration=format_duration, spans=token_spans, value=format_value
    )
    return environment


def _heldout_fact(run: RunData) -> Fact:
    row = next(iter(heldout_rows([run])), None)
    if row is None:
        return Fact("held-out divergence", _ABSENT, "not measured")
    note = f"{row.left} left" if run.finished else "so far"
    return Fact(f"held-out {row.divergence}", f"{row.before} → {row.after}", f"nats a token, {note}")


def _payload(runs: Sequence[RunData], charts: Sequence[Chart], answers: Sequence[Answer]) -> dict[str, Any]:
    return {
        "runs": [run_payload(run) for run in runs],
        "charts": [asdict(chart) for chart in charts],
        "strips": strip_payload(runs),
        "answers": [token_payload(answer.tokens) for answer in answers if answer.tokens],
    }


def _script_json(value: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: nothing in it opens or closes one."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_policy(script: str, style: str) -> str:
    """A Content-Security-Policy: no request to anywhere, no code and no style but this page's own."""
    sources = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (script, style)
    ]
    return f"default-src 'none'; script-src {sources[0]}; style-src {sources[1]}; base-uri 'none'; form-action 'none'"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def style_sheet() -> str:
    """The one style of all pages."""
    return _file("report.css")


def _file(name: str) -> str:
    return resources.files("gkd.report").joinpath(name).read_text(encoding="utf-8")
