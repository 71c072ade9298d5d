"""An author whose answers are kept: what was answered once is not asked again, by this run or the next."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gkd.author.questions import Answer, Author, Outcome, PromptKind, Question, answer_key, question_digest
from gkd.errors import MachineError, RunInterruptedError
from gkd.seeding import derive_seed

_BUSY_S = 60.0  # how long another process may write
_AT_ONCE = 500  # keys of one look-up
_COLUMNS = "text, finish_reason, prompt_tokens, completion_tokens, mean_logprob"


class AnswerStore:
    """Answers by their keys, in one SQLite file: as large as it gets, it takes no memory, and what was added is
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
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT "
                "NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, mean_logprob REAL) "
                "WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """Those that are there."""
        found: dict[bytes, Answer] = {}
        try:
            for start in range(0, len(keys), _AT_ONCE):
                part = keys[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = self._database.execute(f"SELECT key, {_COLUMNS} FROM answers WHERE key IN ({marks})", part)
                found |= {key: Answer(*values) for key, *values in rows}
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
        self._seed = seed
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
        asked = [question_digest(question) for question in questions]
        keys = [answer_key(digest, self._author.identity, self._seed) for digest in asked]
        found = self._store.find(keys)
        for answer in found.values():
            self._count(answer)
        self._budget.spent.found += len(found)
        outcomes: dict[bytes, Outcome] = {**found}
        missing = {key: place for place, key in enumerate(keys) if key not in outcomes}
        others = {key: self._waited_for[key] for key in missing if key in self._waited_for}
        mine = {key: place for key, place in missing.items() if key not in others}
        if mine:
            self._budget.check()
            # the draw is the question's: a server that moves to another address draws the same
            seeds = [derive_seed(self._seed, "author", asked[place].hex()) for place in mine.values()]
            outcomes |= await self._ask(list(mine), [questions[place] for place in mine.values()], seeds)
        for key, waited in others.items():
            await asyncio.wait([waited])
            if waited.cancelled():  # whoever asked has failed, and says why
                raise RunInterruptedError("a question of another block was not answered")
            outcomes[key] = waited.result()
        return [outcomes[key] for key in keys]

    async def _ask(
        self, keys: Sequence[bytes], questions: Sequence[Question], seeds: Sequence[int]
    ) -> dict[bytes, Outcome]:
        loop, outcomes = asyncio.get_running_loop(), dict[bytes, Outcome]()
        waiting = {key: loop.create_future() for key in keys}
        self._waited_for |= waiting

        def arrived(portion: Sequence[tuple[int, Outcome]]) -> None:
            found = [(keys[place], outcome) for place, outcome in portion]
            self._store.add((key, outcome) for key, outcome in found if isinstance(outcome, Answer))
            for key, outcome in found:
                outcomes[key] = outcome
                waiting[key].set_result(outcome)
                self._budget.spent.asked += 1
                if isinstance(outcome, Answer):
                    self._count(outcome)

        try:
            await self._author.answer(list(zip(questions, seeds, strict=True)), arrived)
        finally:
            for key, future in waiting.items():
                del self._waited_for[key]
                future.cancel()  # of one that has arrived this does nothing
        return outcomes

    def _count(self, answer: Answer) -> None:
        spent = self._budget.spent
        spent.prompt_tokens += answer.prompt_tokens
        spent.completion_tokens += answer.completion_tokens
        spent.money += answer.prompt_tokens * self._prices[0] + answer.completion_tokens * self._prices[1]
