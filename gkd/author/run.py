"""From an input's rows to an output's: blocks of rows go through the steps, several at once, and come out in order."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from gkd.author.authors import open_authors, store_path
from gkd.author.authors.kept import AnswerStore, Budget, KeptAuthor
from gkd.author.card import write_card
from gkd.author.contamination import Contamination
from gkd.author.made import Made
from gkd.author.output import Output, check_new, open_output
from gkd.author.page import write_page
from gkd.author.progress import Progress
from gkd.author.prompts import Prompt
from gkd.author.recipe import Recipe
from gkd.author.records import Drop, RowState, Tally
from gkd.author.shown import ShownRows
from gkd.author.turns import Turns
from gkd.data.sources import stream_objects
from gkd.errors import RunInterruptedError

_ROWS_ON_THEIR_WAY = 4  # for each request that may be: what is slow holds nothing up
_ROWS_OF_SERVERS = 16  # a block of rows that servers alone answer
_STOPPED_BY = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
HELDOUT_STEP = "--heldout"


class AuthorRun:
    """One recipe, one input, one output. `check` before `run`."""

    def __init__(
        self,
        recipe: Recipe,
        data: str,
        out: Path,
        *,
        split: str = "train",
        heldout: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        store: Path | None = None,
    ) -> None:
        """`transport` stands in the place of the network; `store` is where answers are kept, else in $GKD_CACHE."""
        self.recipe, self._split = recipe, split
        self._transport, self._store = transport, store or store_path()
        names = [operator.where.rpartition(": ")[2] for operator in recipe.operators]
        form = recipe.form
        self.made = Made(recipe, data, out, heldout, Tally([*names, HELDOUT_STEP]), ShownRows(form.seed))
        self._budget = Budget(self.made.spent, form.budget.tokens, form.budget.money)
        self._contamination: Contamination | None = None

    def check(self) -> None:
        """Everything that can be found wrong without a model. Raises InputError."""
        made = self.made
        check_new(made.out)
        made.rows = self.recipe.check_rows(made.data, self._split)
        if made.heldout is not None:
            self._contamination = Contamination(made.heldout, self._split, self.recipe.form.contamination.ngram)

    def try_models(self) -> None:
        """Asks every server what it serves, and looks at every model here. Raises InputError."""
        asyncio.run(self._try())

    def run(self) -> None:
        """Makes the output, its card and its page.

        Raises RunInterruptedError for a signal or a budget that is spent, TeacherError for a server that stays silent:
        what was answered is kept, and the same call goes on.
        """
        with open_output(self.made.out) as output:
            asyncio.run(self._make(output))
            write_card(self.made)
            write_page(self.made)
            output.finish()

    def first_question(self) -> Prompt | None:
        """What the first step asks about the first row. Raises DataError."""
        return self.recipe.first_question(self.made.data, self._split)

    async def _try(self) -> None:
        authors = await self._open()
        for author in authors.values():
            await author.close()

    async def _open(self, store: AnswerStore | None = None) -> dict[str, KeptAuthor]:
        store = store or AnswerStore(self._store)
        authors = await open_authors(self.recipe.form, self.recipe.origin, self._budget, store, self._transport)
        self.recipe.use(authors)
        return authors

    async def _make(self, output: Output) -> None:
        store = AnswerStore(self._store)
        authors: dict[str, KeptAuthor] = {}
        with ExitStack() as stack:
            stack.callback(store.close)
            self._stop_by_signals(stack)
            try:
                authors = await self._open(store)
                await self._go(authors, output, Progress(self.made.rows))
            finally:
                for author in authors.values():
                    await author.close()

    def _stop_by_signals(self, stack: ExitStack) -> None:
        """The first one ends the run after what is on its way, a second one at once."""
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            self._budget.ended_by = RunInterruptedError(
                f"{number.name}; every answer is kept, and the same command goes on"
            )
            for each in _STOPPED_BY:
                loop.remove_signal_handler(each)

        for number in _STOPPED_BY:
            try:
                loop.add_signal_handler(number, stop, number)
            except (ValueError, RuntimeError):  # not the main thread: whoever runs us there stops us
                return
            stack.callback(loop.remove_signal_handler, number)

    async def _go(self, authors: dict[str, KeptAuthor], output: Output, progress: Progress) -> None:
        size, window = _at_once(self.recipe, authors)
        turns = Turns([op.index for op in self.recipe.operators if op.goes_in_order])
        waiting: deque[asyncio.Task[tuple[Sequence[RowState], Tally]]] = deque()
        try:
            for number, block in enumerate(_blocks(self.made.data, self._split, size)):
                waiting.append(asyncio.create_task(self._through(number, block, turns)))
                if len(waiting) == window:
                    self._write(*await waiting.popleft(), output)
                    progress.tell(self.made.tally, self.made.spent)
            while waiting:
                self._write(*await waiting.popleft(), output)
                progress.tell(self.made.tally, self.made.spent)
        except BaseException as error:  # noqa: BLE001  it goes on below
            self._budget.ended_by = self._budget.ended_by or error
            await asyncio.gather(*waiting, return_exceptions=True)  # what is paid for arrives, and is kept
            raise self._budget.ended_by from None
        finally:
            progress.tell(self.made.tally, self.made.spent, is_last=True)

    async def _through(self, number: int, rows: Sequence[RowState], turns: Turns) -> tuple[Sequence[RowState], Tally]:
        """A block through all steps, and what it adds to the tally."""
        tally = Tally(self.made.tally.names)
        try:
            for operator in self.recipe.operators:
                if operator.goes_in_order:
                    await turns.wait(operator.index, number)
                await operator.apply(rows, tally)
                if operator.goes_in_order:
                    turns.end(operator.index, number)
        finally:
            turns.end_all(number)
        return rows, tally

    def _write(self, rows: Sequence[RowState], tally: Tally, output: Output) -> None:
        totals = self.made.tally
        totals.add(tally)
        for row in rows:
            written = 0
            for made in row.written:
                if self._is_clean(made, row):
                    output.write(made)
                    self.made.shown.add(row.origin, made)
                    written += 1
            totals.rows += 1
            totals.written += written
            totals.rows_without += written == 0

    def _is_clean(self, made: dict[str, Any], row: RowState) -> bool:
        if self._contamination is None:
            return True
        step = len(self.recipe.operators)
        try:
            self._contamination.check(made)
        except Drop as drop:
            self.made.tally.drop(step, drop, row.origin, made)
            self.made.tally.passed(step, 1, 0)
            return False
        self.made.tally.passed(step, 1, 1)
        return True


def _at_once(recipe: Recipe, authors: dict[str, KeptAuthor]) -> tuple[int, int]:
    """Rows of a block, and how many blocks are on their way. A model in this process answers one block after the other,
    so that what is asked together does not depend on time."""
    if not authors or any(author.is_here for author in authors.values()):
        return recipe.form.block_rows, 1
    requests = sum(recipe.form.models[name].max_concurrency for name in authors)
    return _ROWS_OF_SERVERS, 1 + _ROWS_ON_THEIR_WAY * requests // _ROWS_OF_SERVERS


def _blocks(data: str, split: str, size: int) -> Iterator[list[RowState]]:
    rows = enumerate(stream_objects(data, split, key="--data"))
    while block := [RowState(index, origin, [record]) for index, (origin, record) in islice(rows, size)]:
        yield block
