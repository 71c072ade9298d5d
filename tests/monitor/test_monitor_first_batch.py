"""The first batch: what is scored can be told by eye, and its text cannot do anything."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from gkd.monitor import clean, first_batch_text, render_first_batch
from gkd.monitor.first_batch import SOURCE_STYLES
from gkd.types import Prompt, PromptDraw, Rollout

VOCABULARY = ["<|start|>", "user", "\n", " hi", "<|end|>", "[bold]", "\x1b[31m", "", " there", "\\", ":smile:"]


def decode(ids: list[int]) -> str:
    assert len(ids) == 1, "one token at a time"
    return VOCABULARY[ids[0]]


def rollout(
    completion: tuple[int, ...], source: str = "student", index: int = 0, prompt: tuple[int, ...] = (0, 1, 2, 3, 4)
) -> Rollout:
    version = 7 if source == "student" else None
    return Rollout(PromptDraw(Prompt(index, prompt, "hi"), 0), source, completion, weights_version=version)


def styled(text: Text, source: str) -> list[str]:
    """The pieces of the text that are coloured for a source, the legend's first."""
    return [text.plain[span.start : span.end] for span in text.spans if span.style in SOURCE_STYLES[source]]


def test_scored_tokens_are_coloured_by_source_one_by_one() -> None:
    text = render_first_batch([rollout((3, 8, 4)), rollout((1, 4), "teacher", 1)], decode)
    assert styled(text, "student") == [" scored, student ", " hi", " there", "<|end|>"]
    assert styled(text, "teacher") == [" scored, teacher ", "user", "<|end|>"]
    assert styled(text, "dataset") == []
    assert "<|start|>user\N{RETURN SYMBOL} hi<|end|> hi there<|end|>" in text.plain
    assert "prompt 0 sample 0 (student), weights v7: 5 prompt + 3 completion tokens" in text.plain


def test_neighbours_differ_in_style() -> None:
    text = render_first_batch([rollout((3, 8, 4))], decode)
    styles = [span.style for span in text.spans if span.style in SOURCE_STYLES["student"]][1:]
    assert styles[0] == styles[2] != styles[1]


def test_the_plain_view_puts_scored_tokens_in_brackets() -> None:
    text = first_batch_text([rollout((3, 5, 9, 7, 4))], decode)
    assert text.splitlines()[-1] == "<|start|>user\N{RETURN SYMBOL} hi<|end|>[ hi][\\[bold\\]][\\\\][<7>][<|end|>]"


def test_a_mistake_in_the_mask_shows() -> None:
    mask = [[False, False, False, False, True, True, False]]  # one early: the classic shift
    text = first_batch_text([rollout((3, 4))], decode, scored=mask)
    assert text.splitlines()[-1] == "<|start|>user\N{RETURN SYMBOL} hi[<|end|>][ hi]<|end|>"
    assert styled(render_first_batch([rollout((3, 4))], decode, scored=mask), "student")[1:] == ["<|end|>", " hi"]
    with pytest.raises(ValueError, match="a mask of 2 for 7 tokens"):
        first_batch_text([rollout((3, 4))], decode, scored=[[True, True]])


def test_nothing_in_a_text_acts() -> None:
    text = render_first_batch([rollout((5, 6, 10, 7))], decode)
    file = io.StringIO()
    Console(file=file, force_terminal=False, width=200).print(text)
    assert "[bold][31m:smile:<7>" in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_long_texts_lose_their_middle() -> None:
    text = first_batch_text([rollout((8,) * 50 + (4,), prompt=(1,) * 9)], decode, max_tokens=5)
    line = text.splitlines()[-1]
    assert (
        line == "user" * 3 + " ... 4 tokens ... " + "user" * 2 + "[ there]" * 3 + " ... 46 tokens ... [ there][<|end|>]"
    )


def test_each_source_is_seen_before_a_second_of_any() -> None:
    rollouts = [rollout((3,), index=0), rollout((3,), index=1), rollout((3,), "dataset", 2), rollout((3,), index=3)]
    text = render_first_batch(rollouts, decode, max_rows=2).plain
    assert "prompt 0" in text and "prompt 2 sample 0 (dataset)" in text and "prompt 1" not in text
    assert "prompt 1" in render_first_batch(rollouts, decode, max_rows=3).plain


def test_an_empty_completion_and_an_empty_batch() -> None:
    assert "0 completion tokens" in first_batch_text([rollout(())], decode)
    assert render_first_batch([], decode).plain == "first batch: not scored"


def test_cleaning() -> None:
    assert clean("a\r\nb\rc\x0bd\u2028e\tf") == "a\nb\nc\nd\ne    f"
    assert clean("\x1b]0;title\x07\x9b31m\u202ereversed\ud800\x00\ufeff") == "]0;title31mreversed"
    assert (
        clean("\U0001f468\u200d\U0001f469 na\u00efve \u65e5\u672c")
        == "\U0001f468\u200d\U0001f469 na\u00efve \u65e5\u672c"
    )
