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

DOCS = Path(__file__).parent.parent / "docs"


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


def test_the_readme_shows_the_recorded_quickstart() -> None:
    import json

    root = DOCS.parent
    readme = (root / "README.md").read_text()
    summary = json.loads((root / "benchmarks" / "results" / "quickstart.json").read_text())["summary"]
    for name, label in (("forward_kl", "forward KL"), ("reverse_kl", "reverse KL"), ("jsd", "JSD")):
        before, after = summary[f"heldout_{name}_before"], summary[f"heldout_{name}_after"]
        assert re.search(rf"{label} +{before:.3f} +{after:.3f} +{100 * after / before:.1f} %", readme), label
    minutes, seconds = divmod(round(summary["wall_s"]), 60)
    assert f"{summary['steps']} steps in {minutes}m{seconds:02d}s" in readme
    assert summary["heldout_forward_kl_after"] <= 0.3 * summary["heldout_forward_kl_before"]


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/serving.md"])
def test_tables_are_those_of_the_recorded_results(page: str) -> None:
    root = DOCS.parent
    command = [sys.executable, "benchmarks/tables.py", "--check", page]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_quick_tours_snippet_runs() -> None:
    namespace: dict[str, Any] = {}
    (snippet,) = snippets("index.md")
    exec(snippet, namespace)
    assert namespace["student_logits"].grad.abs().sum() > 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does: a link to nowhere, or an API name that is gone, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
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
