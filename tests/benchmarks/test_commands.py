"""Whatever pages, results and benchmarks tell a reader to start is there, and no benchmark lies about unnamed."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.figures.evidence import runs
from benchmarks.records import RESULTS, ROOT

PAGES = [ROOT / "Makefile", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *RESULTS.glob("*.json")]
SOURCES = [path for folder in ("benchmarks", "gkd") for path in (ROOT / folder).rglob("*.py")]


def module_file(name: str) -> Path:
    """Of `python -m name`."""
    path = ROOT / name.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def started_in(text: str) -> list[Path]:
    """As a command line, or as a list of its words."""
    return [module_file(name) for name in re.findall(r"-m[\s\",]+(benchmarks(?:\.\w+)+)", text)]


def test_every_file_and_command_that_is_named_is_there() -> None:
    missing = []
    for path in PAGES + SOURCES:
        text = path.read_text()
        files = re.findall(r"\b(?:benchmarks|gkd/bench)/(?!test_)[\w/]+\.(?:py|json|csv)\b", text)
        named = [ROOT / name for name in files]
        missing += [(path, one) for one in [*named, *started_in(text)] if not one.exists()]
        assert not re.search(r"python benchmarks/", text), f"{path}: benchmarks are modules: python -m"
    assert not missing


def test_every_benchmark_that_can_be_started_is_named_elsewhere() -> None:
    """On a page, by `make`, or by another benchmark."""
    named = {file: {path for path in PAGES + SOURCES if file in started_in(path.read_text())} for file in scripts()}
    for run in runs(Path(), Path()):
        for command in run.commands:
            named.get(module_file(str(command[2])), set()).add(ROOT / "Makefile")
    assert len(named) > 10
    assert not [file for file, places in named.items() if not places - {file}]


def scripts() -> list[Path]:
    return [path for path in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
