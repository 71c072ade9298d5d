"""A report shows all that a run recorded, as text that cannot act, in one file that asks for nothing."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chromium import EXECUTABLE, Chromium
from run_folders import FIRST_BATCH, HOSTILE, SAMPLES, make_positions, make_record, make_run, write_json, write_tokens

from gkd.errors import RunFolderError
from gkd.monitor import METRICS, HeldoutSample, RunSummary
from gkd.monitor.text import clean
from gkd.report import charts as chart_module
from gkd.report import read_runs, render_report, write_figures, write_report
from gkd.report.charts import chart_sections, heldout_charts, run_payload
from gkd.report.data import is_finished, parse_samples, read_run
from gkd.report.render import batch_tokens, config_differences, config_rows, facts, heldout_rows, time_parts
from gkd.report.tokens import LEVELS, MAX_TOKENS, level_titles, strips, token_spans, visible

CROOKED = {"step": 0, "bucket_tokens": 1, "tokens": [1], "forward_kl": [1], "reverse_kl": [1], "jsd": []}
REPORT_FOLDER = Path(chart_module.__file__).parent


class Page(HTMLParser):
    """A page's elements and the text in them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.scripts and not self.lasttag_closed():
            self.scripts[-1] += data
        else:
            self.text += data

    def lasttag_closed(self) -> bool:
        return self.cdata_elem is None

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def payload(self) -> dict[str, Any]:
        def refuse(constant: str) -> Any:
            raise AssertionError(constant)

        return json.loads(self.scripts[0], parse_constant=refuse)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "one")


# ---- reading -----------------------------------------------------------------------------------------------------


def test_a_finished_run(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.finished and run.label == "one" and (run.steps_done, run.total_steps) == (40, 40)
    assert run.samples == tuple(HeldoutSample(*map(clean, sample)) for sample in SAMPLES)
    curve = run.heldout["heldout/forward_kl"]
    assert curve.steps == [0, 10, 20, 30, 40] and (curve.before, curve.after) == (8.45, pytest.approx(8.45 * 0.22))
    assert curve.left == pytest.approx(0.22)
    assert run.seconds[-1] == pytest.approx(run.time_s["step"]) and run.wall_s > run.seconds[-1]


def test_a_run_that_goes_on_has_a_torn_last_line_and_no_end(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "half", 12, total_steps=40)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "loss": 3.')
    run = read_run(folder)
    assert not run.finished and run.steps_done == 12 and len(run.metrics["loss"]) == 12
    assert run.heldout["heldout/jsd"].after is None and run.samples == () and run.early_answers
    page = Page(render_report([run]))
    assert SAMPLES[0].prompt in page.text and run.answer_tokens.keys() == {"before"}
    assert "12 of 40" in page.text and "not finished" in page.text and "before the first step" in page.text


def test_a_resumed_run_does_not_show_the_end_of_the_steps_before(run_folder: Path) -> None:
    config = json.loads((run_folder / "config.resolved.json").read_text())
    config["run"]["steps"] = 80
    write_json(run_folder / "config.resolved.json", config)
    run = read_run(run_folder)
    assert not run.finished and run.samples == () and run.wall_s == 0
    assert is_finished({"steps": 40}, {}, 40) and not is_finished({"steps": 40}, {}, 20) and not is_finished({}, {}, 9)


def test_metrics_alone_are_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": null, "note": "text", "new/metric": 2}\n')
    run = read_run(tmp_path)
    assert run.label == tmp_path.name and run.metrics == {"new/metric": [2.0]}
    assert list(chart_sections([run])) == ["Other"]
    assert "not measured" in Page(render_report([run])).text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "not a run folder, or no step is done yet (metrics.jsonl is missing)"),
        ({"metrics.jsonl": ""}, "metrics.jsonl: no step is recorded yet"),
        ({"metrics.jsonl": '{"step": '}, "metrics.jsonl: no step is recorded yet"),
        ({"metrics.jsonl": '{"loss": 1}\n{"step": 1}\n'}, "metrics.jsonl:1: not a metrics record"),
        ({"metrics.jsonl": '{"step": 0}\n', "summary.json": "{"}, "summary.json: not a JSON object"),
        ({"metrics.jsonl": '{"step": 0}\n', "before.json": "[]"}, "before.json: not a JSON object"),
        ({"metrics.jsonl": '{"step": 0}\n', "heldout_positions.jsonl": '{"step": 7}\n'}, "step 7 is damaged"),
        (
            {"metrics.jsonl": '{"step": 0}\n', "heldout_positions.jsonl": json.dumps(CROOKED) + "\n"},
            "columns of different lengths",
        ),
        (
            {"metrics.jsonl": '{"step": 0}\n', "samples/tokens_before.json": "{"},
            "not the tokens of answers (Invalid JSON",
        ),
        (
            {"metrics.jsonl": '{"step": 0}\n', "samples/tokens_before.json": '{"format": 2, "answers": []}'},
            "tokens_before.json: not the tokens of answers (format: ",
        ),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    with pytest.raises(RunFolderError) as error:
        read_runs([folder])
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_runs_are_told_apart(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", 2, name="same"), make_run(tmp_path / "b", 2, name="same")
    labels = [run.label for run in read_runs([first, second])]
    assert labels == [f"same ({first})", f"same ({second})"]
    with pytest.raises(RunFolderError, match="named twice"):
        read_runs([first, tmp_path / "b" / ".." / "a"])


def test_samples_come_back_as_they_were_written() -> None:
    hostile = "```\n````text\nnot a fence\n```text\n" + HOSTILE
    samples = (HeldoutSample("a", hostile, "", "\n\nb\n"), HeldoutSample(hostile, "**Prompt**", "```text\n```", "x"))
    markdown = RunSummary(name="x", steps=1, wall_s=1, heldout={}, samples=samples).samples_markdown()
    assert parse_samples(markdown) == tuple(HeldoutSample(*map(clean, sample)) for sample in samples)
    assert len(parse_samples(markdown[: len(markdown) * 2 // 3])) <= 1, "a sample that was cut off is left out"
    assert parse_samples("") == parse_samples("```text\nnever closed") == ()


def test_the_first_batch_comes_back_token_by_token() -> None:
    tokens = list(batch_tokens(FIRST_BATCH))
    assert [token.text for token in tokens if token.scored] == ["1", ".", " A", " mel", "on", " [x]", "<b>"]
    assert "List [five] signs" in tokens[0].text and not tokens[0].scored


# ---- what is shown -----------------------------------------------------------------------------------------------


def test_every_metric_that_was_recorded_is_drawn_once(tmp_path: Path) -> None:
    names = {name.replace("*", "some") for name in METRICS}
    record = dict.fromkeys(names, 1.0) | {"step": 0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record | {"step": step}) + "\n" for step in (0, 1)))
    run = read_run(tmp_path)
    sections = chart_sections([run])
    assert "Other" not in sections
    charts = [*heldout_charts([run]), *(chart for members in sections.values() for chart in members)]
    drawn = [line.name for chart in charts for line in chart.lines]
    assert sorted(drawn) == sorted(names - chart_module._LEFT_OUT)
    payload = run_payload(run)
    assert payload["metrics"].keys() == set(drawn), "and nothing is sent that is not drawn"
    assert all(payload["axes"][line.axes] for chart in charts for line in chart.lines)
    assert payload["metrics"]["rollout/staleness"] == [1, 1]


def test_staleness_is_as_recorded_or_by_the_weights_versions(tmp_path: Path) -> None:
    versions = [0, 0, 1, 1]
    for name, record in (("recorded", {"rollout/staleness": 0.5}), ("not", {})):
        lines = [{"step": step, "weights_version": version, **record} for step, version in enumerate(versions)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs([tmp_path / "recorded", tmp_path / "not"])
    payloads = [run_payload(run)["metrics"]["rollout/staleness"] for run in runs]
    assert payloads == [[0.5] * 4, [0, 1, 1, 2]]
    for chosen in (runs, runs[:1], runs[1:]):
        (chart,) = chart_sections(chosen)["Mixture and weights"]
        assert chart.title.startswith("Staleness of the sampler's weights") and len(chart.lines) == len(chosen)


def test_several_runs_are_laid_over_one_another(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", 20), make_run(tmp_path / "b", 30, seed=1, optim={"lr": 1e-4})]
    runs = read_runs(folders)
    sections = chart_sections(runs)
    loss = sections["Loss and divergence"][0]
    assert loss.by_run and [(line.run, line.label) for line in loss.lines] == [(0, "a"), (1, "b")]
    assert [chart.title for chart in sections["Time of a step"]] == ["Time by phase: a", "Time by phase: b"]
    assert [key for key, _ in config_differences(runs)] == ["run.steps", "optim.lr"]
    widths = [sum(part.width for part in parts) for parts in time_parts(runs)]
    assert widths[1] == pytest.approx(100) and 50 < widths[0] < 80
    page = Page(render_report(runs))
    assert len(page.payload["runs"]) == 2 and "2 runs" in page.text and "student before, a and b" in page.text


def test_the_facts_of_a_run(run_folder: Path) -> None:
    run = read_run(run_folder)
    shown = {fact.title: (fact.value, fact.note) for fact in facts(run)}
    assert shown["held-out forward KL"] == ("8.450 → 1.859", "nats a token, 22.0 % left")
    assert shown["steps"] == ("40", "finished")
    assert [row.left for row in heldout_rows([run])] == ["22.0 %"] * 3
    assert sum(part.share for part in time_parts([run])[0]) == pytest.approx(100)
    changed = {row.key: row.default for row in config_rows(run) if row.default}
    assert changed.keys() <= {"run.name", "run.dir", "run.steps", "student.model", "data.train", "teacher.model"}
    assert any("learning rate" in row.meaning for row in config_rows(run) if row.key == "optim.lr")


def test_a_strip_has_a_row_a_measure_and_one_scale(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 12, total_steps=40)]
    first, second = strips(read_runs(folders))
    assert first.rows == ["before", "step 10", "step 20", "step 30", "after"] and second.rows == ["before", "step 10"]
    assert (first.columns, first.last_token, len(first.cells)) == (24, 48, 5 * 24)
    assert max(cell.opacity for strip in (first, second) for cell in strip.cells) == 1
    assert first.figures[1].tokens == "3 to 4" and first.ends == ["before", "after"]
    lines = (folders[0] / "heldout_positions.jsonl").read_text().splitlines()
    assert first.figures[1].means == [json.loads(lines[place])["forward_kl"][1] for place in (0, -1)]
    page = Page(render_report(read_runs(folders)))
    assert sum("data-strip" in attributes for _, attributes in page.tags) == 2


def test_a_strip_of_many_measures_shows_some_of_them_and_the_newest_of_a_step(run_folder: Path) -> None:
    with (run_folder / "heldout_positions.jsonl").open("w") as file:
        for record in [*(make_positions(step) for step in range(0, 1000, 5)), make_positions(40, seed=9)]:
            file.write(json.dumps(record | {"jsd": [None] * 24}) + "\n")
    run = read_run(run_folder)
    assert len(run.positions) == 200 and run.positions[8].means["forward_kl"] == make_positions(40, 9)["forward_kl"]
    (strip,) = strips([run])
    assert len(strip.rows) == 16 and (strip.rows[0], strip.rows[-1]) == ("before", "step 995")


def test_tokens_are_shown_with_their_levels(run_folder: Path) -> None:
    run = read_run(run_folder)
    for moment, sample_text in (("before", SAMPLES[0].student_before), ("after", SAMPLES[0].student_after)):
        tokens = run.answer_tokens[moment][0].tokens
        assert "".join(token.text for token in tokens) == sample_text
        for token, span in zip(tokens, token_spans(tokens), strict=True):
            assert span.level is not None and token.forward_kl is not None
            assert (span.level == 0 or token.forward_kl >= LEVELS[span.level - 1]) and span.level <= 6
            assert span.level == 6 or token.forward_kl < LEVELS[span.level]
    assert len(level_titles()) == len(LEVELS) + 1
    page = Page(render_report([run]))
    spans = [a for tag, a in page.tags if tag == "span" and (a.get("class") or "").startswith("token ")]
    shown = sum(len(answer.tokens) for answers in run.answer_tokens.values() for answer in answers)
    assert len(spans) == shown + len(level_titles()) and len(page.payload["answers"]) == 3, "one answer is empty"
    assert sum(map(len, page.payload["answers"])) == shown


def test_what_cannot_be_seen_is_marked() -> None:
    shown = {
        " the": " the",
        " ": "·",
        "  ": "··",
        "\n\n": "⏎\n⏎\n",
        "\n a": "⏎\n a",
        "": "<7>",
        "\x1b": "<7>",
        "\t": "····",
    }
    assert {text: visible(text, 7) for text in shown} == shown


def test_an_answer_without_end_is_cut(run_folder: Path) -> None:
    write_tokens(run_folder / "samples" / "tokens_after.json", [("p", "word " * 2000)], seed=0)
    page = Page(render_report([read_run(run_folder)]))
    assert f"… and {2000 + 1 - MAX_TOKENS} more tokens" in page.text
    assert max(map(len, page.payload["answers"])) == MAX_TOKENS


def test_runs_without_tokens_and_positions_are_shown_as_text(run_folder: Path) -> None:
    for name in ("heldout_positions.jsonl", "samples/tokens_before.json", "samples/tokens_after.json"):
        (run_folder / name).unlink()
    page = Page(render_report([read_run(run_folder)]))
    assert SAMPLES[0].student_after in page.text and "nats of forward" not in page.text
    assert not any("data-strip" in attributes or "data-answer" in attributes for _, attributes in page.tags)


def test_long_runs_keep_their_peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart_module, "MAX_POINTS", 20)
    lines = [{"step": step, "loss": 100.0 if step == 437 else -5.0 if step == 438 else 1.0} for step in range(1000)]
    lines[900]["loss"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line).replace("NaN", "null") + "\n" for line in lines))
    payload = run_payload(read_run(tmp_path))
    loss, steps = payload["metrics"]["loss"], payload["axes"]["steps"]["step"]
    assert len(loss) == len(steps) == 20 and steps == sorted(steps) and (steps[0], steps[-1]) == (0, 999)
    assert loss[8:10] == [100, -5], "in the order in which they came"


def test_ten_thousand_steps_stay_small(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(make_record(step)) + "\n" for step in range(10_000)))
    assert len(render_report([read_run(tmp_path)])) < 2_500_000


# ---- the file ----------------------------------------------------------------------------------------------------


def hostile_run(folder: Path) -> Path:
    """A run that tries to act wherever text from outside is shown."""
    make_run(folder, 12, samples=(HeldoutSample(HOSTILE, HOSTILE, HOSTILE, HOSTILE),))
    config = json.loads((folder / "config.resolved.json").read_text())
    config["run"]["name"] = config["data"]["train"] = config["teacher"]["model"] = HOSTILE
    config[HOSTILE] = HOSTILE
    write_json(folder / "config.resolved.json", config)
    write_json(folder / "environment.json", {HOSTILE: [HOSTILE]})
    (folder / "samples" / "first_batch.txt").write_text(f"first batch\n\n{HOSTILE}\n[{HOSTILE}]")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make_record(12) | {HOSTILE: 1.0}) + "\n")
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_no_text_can_act(tmp_path: Path, count: int) -> None:
    folders = [hostile_run(tmp_path / "x"), make_run(tmp_path / "<script>alert(3)<")][:count]
    html = render_report(read_runs(folders))
    page = Page(html)
    assert page.count("script") == 2 and page.count("img") == 0, "its data and its own code"
    assert html.count("<script") == html.count("</script") == 2
    assert clean(HOSTILE) in page.text and "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in html and "\u202e" not in html
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert clean(page.payload["runs"][0]["label"]).startswith(clean(HOSTILE))


def test_the_page_asks_for_nothing(run_folder: Path) -> None:
    html = render_report([read_run(run_folder)])
    page = Page(html)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links == [] and not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy


def test_headings_tables_and_names(run_folder: Path) -> None:
    page = Page(render_report([read_run(run_folder)]))
    assert page.count("h1") == 1 and page.count("h2") >= 6
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels)), "none is left out"
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_the_files_of_the_page_are_packaged() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["gkd.report"]
    packaged = {path.name for pattern in patterns for path in REPORT_FOLDER.glob(pattern)}
    assert packaged == {path.name for path in REPORT_FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = read_runs([make_run(tmp_path / "a_$x$", 20, name="a"), make_run(tmp_path / "b", 1)])
    paths = write_figures(runs, tmp_path / "out.html")
    assert [path.name for path in paths] == ["out.loss.png", "out.time.png", "out.positions.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert write_figures(runs[1:], tmp_path / "out.html") == paths
    (tmp_path / "b" / "heldout_positions.jsonl").unlink()
    assert write_figures(read_runs([tmp_path / "b"]), tmp_path / "out.html") == paths[:2]


# ---- in a browser ------------------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def open_report(browser: Chromium, folders: list[Path], **options: Any) -> None:
    path = folders[0] / "report.html"
    write_report(read_runs(folders), path)
    browser.console.clear()
    browser.requests.clear()
    browser.open(path, **options)


FIGURES = "document.querySelectorAll('figure.chart').length"
DRAWN = "[...document.querySelectorAll('svg.plot')].filter(s => s.clientWidth && s.querySelector('path[d^=M]')).length"
LOSS = "[...document.querySelectorAll('figure.chart')].find(f => f.querySelector('h3').textContent.startsWith('Loss'))"


@in_browser
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_every_chart_is_drawn(browser: Chromium, tmp_path: Path, steps: int) -> None:
    open_report(browser, [make_run(tmp_path / "run", steps)])
    assert browser.evaluate(FIGURES) == browser.evaluate(DRAWN) > 8
    assert "NaN" not in browser.evaluate("document.querySelector('main').innerHTML")
    assert browser.console == [] and len(browser.requests) == 1, "the page itself"


@in_browser
def test_hostile_text_is_only_shown(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, [hostile_run(tmp_path / "x"), make_run(tmp_path / "<script>alert(3)<")])
    assert browser.console == [] and len(browser.requests) == 1
    assert browser.evaluate("document.body.innerText").count("<script>alert(1)</script>") > 5
    assert browser.evaluate("document.images.length") == 0


@in_browser
def test_the_policy_stops_what_would_be_put_in(browser: Chromium, run_folder: Path) -> None:
    path = run_folder / "report.html"
    page = render_report([read_run(run_folder)]).replace("</main>", "<script>window.acted = 1</script></main>")
    path.write_text(page)
    browser.open(path)
    assert browser.evaluate("window.acted") is None
    assert any("Content Security Policy" in line for line in browser.console)


@in_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_no_width_scrolls_sideways(browser: Chromium, tmp_path: Path, width: int, mobile: bool, dark: bool) -> None:
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / ("a-name-without-an-end" * 6), seed=1)]
    open_report(browser, folders, width=width, mobile=mobile, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.settle()
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == dark
    shot = tmp_path / "page.png"
    browser.screenshot(shot)
    assert shot.stat().st_size > 20_000 and browser.console == []


CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    if (e.closest('script, .toolbar')) continue;
    const style = getComputedStyle(e), ink = parse(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([e.tagName, e.className.baseVal ?? e.className, e.textContent]);
  }
  return poor;
})()"""


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(browser: Chromium, run_folder: Path, dark: bool) -> None:
    open_report(browser, [run_folder], dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate(CONTRAST) == []


@in_browser
def test_the_mouse_reads_off_and_zooms(browser: Chromium, run_folder: Path) -> None:
    open_report(browser, [run_folder])
    run = read_run(run_folder)
    box = browser.evaluate(
        f"(() => {{ const s = ({LOSS}).querySelector('svg'); s.scrollIntoView({{block: 'center'}});"
        " const b = s.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
    )
    left, middle = box[0] + 50, box[1] + box[3] / 2
    browser.mouse("mouseMoved", left + (box[2] - 58) * 10 / 39, middle)
    browser.settle()
    assert browser.evaluate(f"({LOSS}).querySelector('.at').textContent") == "step 10"
    shown = float(browser.evaluate(f"({LOSS}).querySelector('.legend b').textContent"))
    assert shown == pytest.approx(run.metrics["loss"][10], abs=1e-3)
    browser.mouse("mousePressed", left + 100, middle, "left")
    browser.mouse("mouseMoved", left + 200, middle, "left")
    browser.mouse("mouseReleased", left + 200, middle, "left")
    browser.settle()
    assert browser.evaluate("document.getElementById('unzoom').classList.contains('hidden')") is False
    browser.evaluate("document.getElementById('unzoom').click()")
    assert browser.evaluate(FIGURES) == browser.evaluate(DRAWN) and browser.console == []


@in_browser
def test_keys_read_off(browser: Chromium, run_folder: Path) -> None:
    open_report(browser, [run_folder])
    press = "new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true})"
    browser.evaluate(f"({LOSS}).querySelector('svg').dispatchEvent({press})")
    browser.settle()
    assert browser.evaluate(f"({LOSS}).querySelector('.at').textContent") == "step 38"
    assert browser.evaluate("document.getElementById('spoken').textContent").startswith("step 38: Loss ")


TOKENS = "[...document.querySelectorAll('.answer.after .token')]"
POPUP = "document.getElementById('popup')"


def center(browser: Chromium, element: str) -> list[float]:
    """Of an element, once it is in view."""
    return browser.evaluate(
        f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}});"
        " const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )


def press(browser: Chromium, selector: str, key: str) -> None:
    event = f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}})"
    browser.evaluate(f"document.querySelector('{selector}').dispatchEvent({event})")
    browser.settle()


@in_browser
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_a_token_tells_its_numbers(browser: Chromium, run_folder: Path, width: int, mobile: bool) -> None:
    open_report(browser, [run_folder], width=width, mobile=mobile)
    token = read_run(run_folder).answer_tokens["after"][0].tokens[2]
    assert browser.evaluate(f"{POPUP}.hidden")
    if mobile:  # one after the other
        browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
        for group in ("before", "after"):
            touch = dict(
                zip("xy", center(browser, f"[...document.querySelectorAll('.{group} .token')][2]"), strict=True)
            )
            browser.call("Input.synthesizeTapGesture", **touch)
    else:
        browser.mouse("mouseMoved", *center(browser, f"{TOKENS}[2]"))
    browser.settle()
    shown = browser.evaluate(f"{POPUP}.innerText")
    assert token.text in shown and f"forward KL {float(f'{token.forward_kl:.4g}'):.3f}" in shown
    assert "<b>" in shown and "50.0 %" in shown and browser.evaluate(f"{POPUP}.querySelectorAll('td').length") == 10
    left, right = browser.evaluate(
        f"(() => {{ const b = {POPUP}.getBoundingClientRect(); return [b.left, b.right]; }})()"
    )
    assert 0 <= left < right <= width
    if not mobile:
        browser.mouse("mouseMoved", 1, 1)
        browser.settle()
        assert browser.evaluate(f"{POPUP}.hidden")
    assert browser.console == []


@in_browser
def test_keys_go_from_token_to_token_and_through_a_strip(browser: Chromium, run_folder: Path) -> None:
    open_report(browser, [run_folder])
    tokens = read_run(run_folder).answer_tokens["after"][0].tokens
    for key, expected in (("ArrowRight", tokens[0]), ("ArrowRight", tokens[1]), ("End", tokens[-1])):
        press(browser, ".answer.after .tokens", key)
        assert browser.evaluate(f"{POPUP}.querySelector('b').textContent") == expected.text
    assert "the teacher's most likely" in browser.evaluate("document.getElementById('spoken').textContent")
    press(browser, ".answer.after .tokens", "Escape")
    assert browser.evaluate(f"{POPUP}.hidden")
    for key, title in (
        ("ArrowRight", "before, tokens 1 to 2"),
        ("ArrowDown", "step 10, tokens 1 to 2"),
        ("ArrowUp", "before, tokens 1 to 2"),
        ("ArrowUp", "before, tokens 1 to 2"),
        ("End", "after, tokens 47 to 48"),
    ):
        press(browser, "[data-strip]", key)
        assert browser.evaluate(f"{POPUP}.querySelector('b').textContent") == title
    assert "mean of 41 tokens" in browser.evaluate(f"{POPUP}.innerText")
    assert browser.console == []


@in_browser
def test_leaving_an_answer_late_keeps_the_popup_of_another(browser: Chromium, run_folder: Path) -> None:
    open_report(browser, [run_folder])
    browser.evaluate("document.querySelector('.answer.before .tokens').focus()")
    press(browser, ".answer.before .tokens", "ArrowRight")
    browser.mouse("mouseMoved", *center(browser, f"{TOKENS}[2]"))
    browser.evaluate("document.activeElement.blur()")
    browser.settle()
    assert not browser.evaluate(f"{POPUP}.hidden")
    current = browser.evaluate("[...document.querySelectorAll('.current')].map(token => token.textContent)")
    assert current == [read_run(run_folder).answer_tokens["after"][0].tokens[2].text]


@in_browser
def test_hostile_tokens_are_only_shown(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, [hostile_run(tmp_path / "x")])
    press(browser, ".tokens", "ArrowRight")
    assert browser.evaluate(f"{POPUP}.querySelector('b').textContent") == "<script>alert(1)</script>"
    assert browser.evaluate("document.querySelectorAll('.tokens script, .popup script, .popup img').length") == 0
    assert browser.console == [] and len(browser.requests) == 1


@in_browser
def test_buttons_switch_scales_axes_and_runs(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, [make_run(tmp_path / "a", 200), make_run(tmp_path / "b", 150, seed=1)])
    lines = f"({LOSS}).querySelectorAll('path.line:not(.faint)').length"
    path = f"({LOSS}).querySelector('path.line').getAttribute('d')"
    assert browser.evaluate(lines) == 2
    linear = browser.evaluate(path)
    browser.evaluate(f"({LOSS}).querySelector('.tool').click()")
    assert browser.evaluate(path) != linear
    browser.evaluate("document.querySelectorAll('.chip')[1].click()")
    assert browser.evaluate(lines) == 1
    assert browser.evaluate("document.querySelectorAll('figure.chart.hidden').length") == 1, "the time of run b"
    for axis in ("seconds", "tokens"):
        browser.evaluate(
            f"(() => {{ const s = document.querySelector('select'); s.value = '{axis}';"
            " s.dispatchEvent(new Event('change')); })()"
        )
        assert browser.evaluate(DRAWN) == browser.evaluate(FIGURES) - 1
    assert browser.console == []


@in_browser
def test_ten_thousand_steps_are_drawn_with_few_points(browser: Chromium, tmp_path: Path) -> None:
    open_report(browser, [make_run(tmp_path / "long", 10_000, eval_every=500)])
    assert browser.evaluate(FIGURES) == browser.evaluate(DRAWN)
    longest = browser.evaluate(
        "Math.max(...[...document.querySelectorAll('path')].map(p => p.getAttribute('d').length))"
    )
    assert longest < 50_000, "four points a pixel at most"
    assert browser.console == []
