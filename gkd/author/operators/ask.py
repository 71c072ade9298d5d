"""`ask`: a record becomes an answer each."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from gkd.author.authors.kept import KeptAuthor
from gkd.author.operators.base import Operator
from gkd.author.prompts import Prompt, PromptTemplate, own_prompt
from gkd.author.questions import Answer, AskSettings, Outcome, PromptKind, Question
from gkd.author.records import Drop, Record, RowState, Tally
from gkd.author.spec import AskForm
from gkd.author.templates import RenderError
from gkd.errors import ConfigError, DataError


class Ask(Operator):
    def __init__(self, form: AskForm, index: int, where: str) -> None:
        super().__init__(index, where)
        self._form = form
        self._prompt = PromptTemplate(form, where)
        self._settings = AskSettings(form.max_new_tokens, form.temperature, form.top_p, tuple(form.stop), form.logprobs)
        self._authors: Mapping[str, KeptAuthor] = {}
        self._kinds: dict[PromptKind, str] = {} if self._prompt.kind is None else {self._prompt.kind: where}
        self.needs = {name: f"{where}.{key}" for name, key in self._prompt.needs.items()}
        self.makes = [form.into, *(f"{form.into}_{name}" for name in ("author", "sample", "finish_reason"))]
        if form.logprobs:
            self.makes = [*self.makes, f"{form.into}_logprob"]

    def use(self, authors: Mapping[str, KeptAuthor]) -> None:
        """The models that it asks, by their names. Raises ConfigError for one that cannot be asked what the step or,
        as far as they were checked, the rows have."""
        self._authors = {name: authors[name] for name in self._form.models}
        for kind, where in self._kinds.items():
            for author in self._authors.values():
                if why := author.refusal(kind):
                    raise ConfigError(f"{where}: {why}")

    def check_row(self, record: Record, origin: str) -> None:
        if self._prompt.is_own:
            kind = "text" if isinstance(own_prompt(record, origin), str) else "messages"
            self._kinds.setdefault(kind, f"{origin}: prompt")

    def first_question(self, record: Record) -> Prompt:
        """What is asked first of a row. Raises RenderError or DataError."""
        return self._prompt.render(record)

    async def apply(self, rows: Sequence[RowState], tally: Tally) -> None:
        asked = list(self._questions(rows, tally))
        by_author: defaultdict[str, list[Question]] = defaultdict(list)
        for _, _, name, question in asked:
            by_author[name].append(question)
        portions = await asyncio.gather(
            *(self._authors[name].answer(questions) for name, questions in by_author.items())
        )
        answers = {name: iter(portion) for name, portion in zip(by_author, portions, strict=True)}
        given = [len(row.records) for row in rows]
        for row in rows:
            row.records = []
        for row, record, name, question in asked:
            try:
                row.records.append(self._answered(record, name, question, next(answers[name])))
            except Drop as drop:
                tally.drop(self.index, drop, row.origin, record)
        for row, count in zip(rows, given, strict=True):
            tally.passed(self.index, count, len(row.records))

    def _questions(self, rows: Sequence[RowState], tally: Tally) -> Iterator[tuple[RowState, Record, str, Question]]:
        """In the order of the answers' records."""
        for row in rows:
            for record in row.records:
                try:
                    prompt = self._prompt.render(record)
                except (RenderError, DataError) as error:
                    tally.drop(self.index, Drop("a template fails", str(error)), row.origin, record)
                    continue
                for name in self._form.models:
                    for number in range(self._form.samples):
                        yield row, record, name, Question(prompt, self._settings, number)

    def _answered(self, record: Record, name: str, question: Question, outcome: Outcome) -> Record:
        if not isinstance(outcome, Answer):
            raise Drop(outcome.reason, outcome.detail)
        if outcome.finish_reason == "length" and self._form.truncated == "drop":
            raise Drop(f"cut off at max_new_tokens = {self._form.max_new_tokens}", outcome.text)
        into = self._form.into
        made: dict[str, object] = {
            into: outcome.text,
            f"{into}_author": name,
            f"{into}_sample": question.number,
            f"{into}_finish_reason": outcome.finish_reason,
        }
        if self._form.logprobs:
            if outcome.mean_logprob is None:
                raise Drop("no log-probabilities", f"{name} tells none")
            made[f"{into}_logprob"] = outcome.mean_logprob
        return {**record, **made}
