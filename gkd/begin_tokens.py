"""What a tokenizer puts before a text. Asked by those who encode, and by those who compare two sides."""

from __future__ import annotations

from typing import Any


def begin_ids(tokenizer: Any) -> list[int]:
    """Ids that it puts before a text by itself. What it puts behind one would end a prompt before its answer."""
    bare: list[int] = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    framed: list[int] = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    starts = (i for i in range(len(framed) - len(bare) + 1) if framed[i : i + len(bare)] == bare)
    return framed[: next(starts, 0)]
