"""An author whose answers are kept: what was answered once is not asked again, by this run or the next."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd.author.questions import Answer, Author, Digester, Outcome, PromptKind, Question
from gkd.errors import MachineError, RunInterruptedError
from gkd.seeding import derive_seed

_BUSY_S = 60.0  # how long another process may write
_AT_ONCE = 500  # keys of one look-up
_COLUMNS = "text, finish_reason, prompt_tokens, completion_tokens, mean_logprob"


class AnswerStore:
    """Answers by their digests, in one SQLite file: as large as it gets, it takes no memory, and what was added is
    there whenever the process ends."""

    def __init__(self, path: Path) -> None:
        """Raises MachineError for a file that cannot be used."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the newest answers, no others
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (digest BLOB PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT "
                "NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, mean_logprob REAL) "
                "WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def find(self, digests: Sequence[bytes]) -> dict[bytes, Answer]:
        """Those that are there."""
        found: dict[bytes, Answer] = {}
        try:
            for start in range(0, len(digests), _AT_ONCE):
                part = digests[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = self._database.execute(f"SELECT digest, {_COLUMNS} FROM answers WHERE digest IN ({marks})", part)
                found |= {digest: Answer(*values) for digest, *values in rows}
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        return found

    def add(self, answers: Iterable[tuple[bytes, Answer]]) -> None:
        """All of them, or, if the process ends meanwhile, none. What is there already stays."""
        rows = [
            (key, a.text, a.finish_reason, a.prompt_tokens, a.completion_tokens, a.mean_logprob) for key, a in answers
        ]
        try:
            if len(rows) > 1:
                self._database.execute("BEGIN")
            self._database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)
            if len(rows) > 1:
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        self._database.close()

    def _unusable(self, error: sqlite3.Error) -> MachineError:
        return MachineError(f"{self._path}: {error}; it holds answers of models: remove it, or set GKD_CACHE elsewhere")


@dataclass
class Spent:
    """What the answers of one file have cost, kept ones at what they cost once."""

    asked: int = 0  # in this session
    found: int = 0  # kept from before
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0


@dataclass
class Budget:
    """What all authors of a recipe may cost together, and what else has stopped them."""

    spent: Spent
    tokens: int | None = None
    money: float | None = None
    ended_by: BaseException | None = None  # a signal, or what another block of rows met

    def check(self) -> None:
        """To be called before every request. Raises RunInterruptedError if it is spent, or what else has ended it."""
        if self.ended_by is not None:
            raise self.ended_by
        used = self.spent.prompt_tokens + self.spent.completion_tokens
        for key, limit, value in (("tokens", self.tokens, used), ("money", self.money, self.spent.money)):
            if limit is not None and value >= limit:
                raise RunInterruptedError(
                    f"budget.{key}: {value:,.6g} of {limit:,.6g} are spent; every answer is kept: raise it, and the "
                    "same command goes on"
                )


class KeptAuthor:
    """Answers from the store, and of `author` those that it lacks."""

    def __init__(
        self, author: Author, store: AnswerStore, seed: int, budget: Budget, prices: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """`prices` of a token that it reads and of one that it writes."""
        self._author, self._store, self._budget, self._prices = author, store, budget, prices
        self._digester, self._seed = Digester(author.identity, seed), seed
        self._waited_for: dict[bytes, asyncio.Future[Outcome]] = {}

    @property
    def is_here(self) -> bool:
        return self._author.is_here

    def refusal(self, kind: PromptKind) -> str | None:
        return self._author.refusal(kind)

    async def close(self) -> None:
        await self._author.close()

    async def answer(self, questions: Sequence[Question]) -> list[Outcome]:
        """One outcome a question, in order; equal questions are asked once.

        Raises RunInterruptedError before anything is asked that the budget has no room for, and what the author raises.
        """
        digests = [self._digester.digest(question) for question in questions]
        found = self._store.find(digests)
        for answer in found.values():
            self._count(answer)
        self._budget.spent.found += len(found)
        outcomes: dict[bytes, Outcome] = {**found}
        first = dict(zip(digests, questions, strict=True))
        missing = [digest for digest in first if digest not in outcomes]
        others = {digest: self._waited_for[digest] for digest in missing if digest in self._waited_for}
        mine = [(digest, first[digest]) for digest in missing if digest not in others]
        if mine:
            self._budget.check()
            outcomes |= await self._ask(mine)
        for digest, waited in others.items():
            await asyncio.wait([waited])
            if waited.cancelled():  # whoever asked has failed, and says why
                raise RunInterruptedError("a question of another block was not answered")
            outcomes[digest] = waited.result()
        return [outcomes[digest] for digest in digests]

    async def _ask(self, questions: Sequence[tuple[bytes, Question]]) -> dict[bytes, Outcome]:
        loop, outcomes = asyncio.get_running_loop(), dict[bytes, Outcome]()
        waiting = {digest: loop.create_future() for digest, _ in questions}
        self._waited_for |= waiting

        def arrived(portion: Sequence[tuple[int, Outcome]]) -> None:
            found = [(questions[place][0], outcome) for place, outcome in portion]
            self._store.add((digest, outcome) for digest, outcome in found if isinstance(outcome, Answer))
            for digest, outcome in found:
                outcomes[digest] = outcome
                waiting[digest].set_result(outcome)
                self._budget.spent.asked += 1
                if isinstance(outcome, Answer):
                    self._count(outcome)

        try:
            seeds = [derive_seed(self._seed, "author", digest.hex()) for digest, _ in questions]
            await self._author.answer([(q, seed) for (_, q), seed in zip(questions, seeds, strict=True)], arrived)
        finally:
            for digest, future in waiting.items():
                del self._waited_for[digest]
                future.cancel()  # of one that has arrived this does nothing
        return outcomes

    def _count(self, answer: Answer) -> None:
        spent = self._budget.spent
        spent.prompt_tokens += answer.prompt_tokens
        spent.completion_tokens += answer.completion_tokens
        spent.money += answer.prompt_tokens * self._prices[0] + answer.completion_tokens * self._prices[1]
