"""Blocks of rows overtake one another, except at steps whose result depends on what came before."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence


class Turns:
    """Whose turn it is at each of such steps: the blocks' numbers in order, from 0."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._next = dict.fromkeys(steps, 0)
        self._ended: dict[int, set[int]] = {step: set() for step in steps}
        self._waiting: dict[tuple[int, int], asyncio.Future[None]] = {}

    async def wait(self, step: int, number: int) -> None:
        if self._next[step] != number:
            future = self._waiting[step, number] = asyncio.get_running_loop().create_future()
            await future

    def end(self, step: int, number: int) -> None:
        """The block is through, or will never come."""
        if number < self._next[step]:
            return
        ended = self._ended[step]
        ended.add(number)
        while self._next[step] in ended:
            ended.remove(self._next[step])
            self._next[step] += 1
        waiting = self._waiting.pop((step, self._next[step]), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def end_all(self, number: int) -> None:
        for step in self._next:
            self.end(step, number)
