"""Two columns: what both have stands on one line, what one has alone is marked."""

from __future__ import annotations

from gkd.monitor.side_by_side import side_by_side


def test_what_differs_is_marked() -> None:
    left = "system\nBe long.\nuser\n2 + 2?\nend"
    right = "system\nBe short.\nuser\nThe solution is 4.\n2 + 2?"
    title, *lines = side_by_side(left, right, ("student", "teacher"))
    assert title.split() == ["student", "teacher"] and title.index("teacher") == 59
    assert [(line[:56].strip(), line[57:58].strip(), line[59:]) for line in lines] == [
        ("system", "", "system"),
        ("Be long.", "|", "Be short."),
        ("user", "", "user"),
        ("", ">", "The solution is 4."),
        ("2 + 2?", "", "2 + 2?"),
        ("end", "<", ""),
    ]


def test_long_lines_are_wrapped_and_nothing_acts_on_the_terminal() -> None:
    lines = side_by_side("a " * 60 + "\n\n\x1b[31mred", "b", ("one", "other"))
    assert all(len(line) <= 56 + 3 + 56 for line in lines) and not any("\x1b" in line for line in lines)
    assert [line[57:58] for line in lines[1:]] == ["|", "<", "<", "<", "<"]
