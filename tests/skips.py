"""A pytest plugin: what was skipped, by reason, at the end; --strict-skips fails a run that could have run it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

# Only another machine can take these away.
MACHINE = re.compile(r"CUDA device|GPU|^this processor has no |^this kernel |^no IPv6$|^no /dev/full$")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail if anything but this machine causes a skip")


def reasons(reports: list[pytest.TestReport]) -> Counter[str]:
    """How often each reason was given. A module that skips itself is one."""
    found: Counter[str] = Counter()
    for report in reports:
        assert isinstance(report.longrepr, tuple)
        found[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
    return found


def avoidable(found: Counter[str]) -> list[str]:
    return sorted(reason for reason in found if not MACHINE.search(reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reasons(reporter.stats.get("skipped", []))
    if session.config.option.strict_skips and avoidable(skipped) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = reasons(terminalreporter.stats.get("skipped", []))
    if not skipped:
        return
    terminalreporter.section(f"{skipped.total()} skipped")
    for reason, count in skipped.most_common():
        terminalreporter.line(f"{count:5}  {reason}")
    if config.option.strict_skips and avoidable(skipped):
        terminalreporter.line(
            f"--strict-skips: this machine could run {', '.join(map(repr, avoidable(skipped)))}", red=True
        )
