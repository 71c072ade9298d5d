"""Pages whose snippets are promised to run, do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import EXECUTABLE, Chromium

from gkd.config import load_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def library_page() -> dict[str, Any]:
    """The namespace after all snippets of library.md were run, one after another."""
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for snippet in snippets("library.md"):
        exec(snippet, namespace)
    return namespace


def test_library_snippets_give_gradients(library_page: dict[str, Any]) -> None:
    gradient = library_page["student_logits"].grad
    assert gradient[:, :7].abs().sum() > 0 and gradient[:, 7:].abs().sum() == 0
    assert library_page["student_hidden"].grad.isfinite().all() and library_page["student_head"].grad is not None
    assert library_page["teacher_head"].grad is None


def test_the_loop_of_ones_own_works(library_page: dict[str, Any], tiny_student: Path, tiny_teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_student, tiny_teacher))
    input_ids = torch.randint(3, 259, (2, 9))
    labels = input_ids.clone()
    labels[:, :4] = -100
    loss = library_page["distillation_loss"](student, teacher, input_ids, labels)
    assert loss > 0
    assert library_page["distillation_loss"](student, student, input_ids, labels).abs() < 1e-6


def test_the_whole_run_is_what_the_config_says(
    library_page: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run itself is tested end to end; here the snippet's calls are checked against the real names."""
    import gkd

    seen: list[Any] = []

    class Summary:
        heldout = {"heldout_forward_kl": (2.0, 1.0)}  # noqa: RUF012

    def train(distiller: gkd.Distiller) -> Summary:
        seen.append(distiller.config)
        return Summary()

    monkeypatch.chdir(DOCS.parent)
    monkeypatch.setattr(gkd.Distiller, "train", train)
    library_page["distil"]()
    assert seen[0].run.steps == 10 and seen[0].run.name == "ten"
    assert capsys.readouterr().out == "(2.0, 1.0)\n"


PAGES_WITH_TABLES = [
    f"docs/{name}.md" for name in ("benchmarks", "objectives", "recipes", "scaling", "serving", "table", "text")
]


@pytest.mark.parametrize("page", PAGES_WITH_TABLES)
def test_tables_are_those_of_the_recorded_results(page: str) -> None:
    command = [sys.executable, "-m", "benchmarks.figures.tables", "--check", page]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert page.removeprefix("docs/") in (ROOT / "Makefile").read_text()


def recipe_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / "recipes.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", recipe_blocks("yaml"), ids=lambda block: re.search(r"name: (\w+)", block)[1])
def test_every_recipe_is_a_config(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    config = load_config(path)
    assert config.run.name in block and config.optim.batch_size % 8 == 0


def recipe_commands() -> list[list[str]]:
    """Everything from the config's name on, of each run of the page; what `gkd shape` wrote is not there."""
    blocks = [block for block in recipe_blocks("") if "gkd shape" not in block]
    lines = [line.split(" #")[0].split() for block in blocks for line in block.splitlines()]
    starts = [(words, index) for words in lines for index, word in enumerate(words) if word.endswith(".yaml")]
    return [words[index:] for words, index in starts]


@pytest.mark.parametrize("words", recipe_commands(), ids=" ".join)
def test_every_command_of_a_recipe_has_its_config(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path, *options = words
    if path == "mine.yaml":  # the block above it
        (tmp_path / path).write_text(block_before(" ".join(words)))
        path = str(tmp_path / path)
    load_config(path, [option for option in options if not option.startswith("--")])


def block_before(command: str) -> str:
    page = (DOCS / "recipes.md").read_text()
    return re.findall(r"```yaml\n(.*?)```", page[: page.rindex(command)], flags=re.DOTALL)[-1]


def test_every_config_that_recipes_link_to_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    linked = re.findall(r"\(\.\./(configs/[^/\s]+\.yaml)\)", (DOCS / "recipes.md").read_text())
    assert {"configs/quickstart.yaml", "configs/served.yaml", "configs/lora.yaml"} <= set(linked)
    for path in linked:
        load_config(path)


@pytest.mark.parametrize(
    ("page", "name"), [("index.md", "student_logits"), ("paths.md", "student_logits"), ("../README.md", "student_head")]
)
def test_a_pages_snippet_runs(page: str, name: str) -> None:
    namespace: dict[str, Any] = {}
    (snippet,) = snippets(page)
    exec(snippet, namespace)
    assert namespace[name].grad.abs().sum() > 0


def test_every_test_that_reliability_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (DOCS / "reliability.md").read_text())
    assert named
    for path, function in named:
        assert f"def {function}" in (ROOT / path).read_text(), f"{path}::{function}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does: a link to nowhere, or an API name that is gone, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=DOCS.parent, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_the_api_and_every_config_key(site: Path) -> None:
    from gkd.config import describe_keys

    losses = (site / "api" / "losses" / "index.html").read_text()
    assert all(name in losses for name in ("linear_divergence", "topk_divergence", "generalized_jsd_loss"))
    keys = (site / "api" / "config" / "index.html").read_text()
    assert all(f"<code>{key}</code>" in keys for key, _, _ in describe_keys())


def test_the_site_asks_nobody_else_for_anything(site: Path) -> None:
    loaded = r"""<(?:script|img|link)[^>]*?(?:src|href)=["']?(https?://[^"'>\s]+)"""
    assert not [found for page in site.rglob("*.html") for found in re.findall(loaded, page.read_text())]


@pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on this machine (apt-get install chromium)")
def test_no_page_is_wider_than_a_phone(site: Path, tmp_path: Path) -> None:
    """Tables and code scroll within themselves."""
    with Chromium(tmp_path) as browser:
        for page in sorted(site.rglob("index.html")):
            browser.open(page, width=390, height=844, mobile=True)
            assert browser.evaluate("document.documentElement.scrollWidth") <= 390, page
