"""A recipe's file: models, and the steps that every row of the input goes through."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from gkd.config import DtypeOrAuto, make_section, read_mapping
from gkd.config.sections import PathText, check_template_arguments
from gkd.schema import Fraction, Section

_FIELD = re.compile(r"[A-Za-z_]\w*")
_ADDRESS = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[\w./~-]*)?")
_OF_SERVERS = ("token_file", "token_variable", "prices", "extra")
_HERE = ("revision", "max_model_tokens", "chat_template_kwargs")


class PricesForm(Section):
    prompt: float = Field(ge=0.0, description="of a million tokens that it reads")
    completion: float = Field(ge=0.0, description="of a million tokens that it writes")


class ModelForm(Section):
    """In this process, or at an address."""

    model: PathText = Field(
        description="folder, hub name, or wheel:<distribution>; with address: the server's name of it"
    )
    engine: Literal["vllm", "transformers"] = Field("vllm", description="in this process: the sampler")
    dtype: DtypeOrAuto = Field("auto", description="in this process: auto = bfloat16 where it is fast, else float32")
    revision: str | None = Field(None, description="in this process: hub revision")
    max_model_tokens: int | None = Field(
        None, ge=2, description="in this process: longest prompt and answer; null = the model's context, at most 8192"
    )
    chat_template_kwargs: dict[str, Any] = Field({}, description="in this process: handed to its chat template")
    address: str | None = Field(
        None, description="of an OpenAI-compatible server, e.g. https://api.openai.com/v1 or http://127.0.0.1:8000"
    )
    api: Literal["chat", "completions"] = Field("chat", description="with address: which of its routes is asked")
    token_file: PathText | None = Field(None, description="with address: file with the server's token")
    token_variable: str | None = Field(
        None, description="with address: environment variable with it, e.g. OPENAI_API_KEY; null = GKD_SERVER_TOKEN"
    )
    max_concurrency: int = Field(32, ge=1, le=4096, description="with address: requests at once")
    timeout_s: float = Field(300.0, gt=0.0, description="with address: longest wait for an answer")
    retry_s: float = Field(
        300.0, ge=0.0, description="with address: how long one request that fails is asked again; then the command ends"
    )
    prices: PricesForm | None = Field(None, description="with address: what it costs, in the currency of budget.money")
    extra: dict[str, Any] = Field(
        {}, description="with address: further keys of every request's body; null leaves one out"
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> ModelForm:
        if self.address is not None and not _is_address(self.address):
            raise ValueError(f"address: {self.address!r} is not of the form https://HOST:PORT/PATH")
        check_template_arguments(self.chat_template_kwargs)
        wrong = _HERE if self.address else _OF_SERVERS
        for key in wrong:
            if getattr(self, key) not in (None, {}):
                kind = "a model in this process; leave it out, or address" if self.address else "a server; give address"
                raise ValueError(f"{key}: is for {kind}")
        return self


def _is_address(text: str) -> bool:
    try:
        return _ADDRESS.fullmatch(text) is not None and urlsplit(text).port != 0
    except ValueError:  # a port, or an IPv6 address, that cannot be
        return False


class MessageForm(Section):
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str = Field(description="template")


class AskForm(Section):
    model: str | list[str] = Field("teacher", description="of models; of several each is asked")
    prompt: str | None = Field(None, description="template of a user's message")
    messages: list[MessageForm] | None = Field(None, min_length=1, description="templates of a conversation")
    text: str | None = Field(
        None, description="template of raw text to go on with; none of these: the row's own prompt"
    )
    samples: int = Field(1, ge=1, le=1024, description="answers of each model")
    temperature: float = Field(1.0, ge=0.0, description="0 = greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    max_new_tokens: int = Field(512, ge=1)
    stop: list[str] = Field([], max_length=16, description="an answer ends before any of these texts")
    truncated: Literal["drop", "keep"] = Field("drop", description="answers that max_new_tokens has cut off")
    logprobs: bool = Field(False, description="the mean log-probability of an answer's tokens, as field mean_logprob")
    into: str = Field("text", description="field of the answer")

    @model_validator(mode="after")
    def _one_question(self) -> AskForm:
        _check_one_of(self, ("prompt", "messages", "text"), least=0)
        if self.samples > 1 and self.temperature == 0.0:
            raise ValueError("samples: are all the same at temperature 0; raise it, or ask for one")
        if not self.models:
            raise ValueError("model: names none")
        _check_field(self.into, "into")
        return self

    @property
    def models(self) -> Sequence[str]:
        return [self.model] if isinstance(self.model, str) else self.model


class ReadForm(Section):
    source: str = Field("text", alias="from", description="field that is read")
    regex: str | None = Field(None, description="first match; its named groups are fields")
    json_keys: dict[str, str] | list[str] | None = Field(
        None, alias="json", description="keys of the first JSON object in the text, or field: key"
    )
    headings: dict[str, str] | None = Field(
        None, description="field: heading; what stands below it, or behind its colon"
    )
    number: str | None = Field(None, description="field of the last number in the text")

    @model_validator(mode="after")
    def _one_way(self) -> ReadForm:
        _check_one_of(self, ("regex", "json_keys", "headings", "number"))
        for field in self.written:
            _check_field(field, "fields")
        return self

    @property
    def written(self) -> Sequence[str]:
        """The fields that it makes. Those of a regex, if it is none: nothing."""
        if self.number is not None:
            return [self.number]
        if self.regex is not None:
            try:
                return list(re.compile(self.regex).groupindex)
            except re.error:
                return []
        return list(self.json_keys or self.headings or ())


class CloseForm(Section):
    value: str = Field(description="expression")
    to: str = Field(description="expression")
    tolerance: float = Field(0.0, ge=0.0, description="largest difference, in parts of `to` where that is above 1")


class VerifierForm(Section):
    task: str = Field(description="of reasoning-gym; the row is one of its problems: question, answer, metadata")
    answer: str = Field("text", description="expression of what is judged")


class LengthForm(Section):
    of: str = Field("text", description="expression")
    unit: Literal["characters", "words"] = "words"
    least: int = Field(0, ge=0)
    most: int | None = Field(None, ge=1)


class KeepForm(Section):
    where: str | None = Field(None, description="expression that is true of what stays")
    equal: list[str] | None = Field(
        None, min_length=2, max_length=2, description="two expressions; case and spaces do not count"
    )
    close: CloseForm | None = Field(None, description="two numbers")
    verifier: VerifierForm | None = Field(None, description="an answer that a program checks")
    length: LengthForm | None = Field(None, description="of a text")
    reason: str | None = Field(None, description="what those that go are counted as")

    @model_validator(mode="after")
    def _one_test(self) -> KeepForm:
        _check_one_of(self, ("where", "equal", "close", "verifier", "length"))
        return self


class DistinctForm(Section):
    of: str = Field("text", description="expression of what is compared; case, spaces and punctuation do not count")
    among: Literal["row", "all"] = Field(
        "row", description="what came of the same input row, or all; all is remembered"
    )
    ngram: int = Field(0, ge=0, le=64, description="0: the same text; n: texts that share runs of n words")
    overlap: Fraction = Field(0.7, description="with ngram: from which share of its n-grams on a text is a repetition")


class ExamplesForm(Section):
    count: int = Field(ge=1, le=1024, description="how many rows")
    file: PathText = Field(description="JSONL, Parquet, or what else rows are read from; held in memory")
    into: str = Field("examples", description="field: the list of them")


class SampleForm(Section):
    most: int | None = Field(None, ge=1, description="how many that came of an input row stay")
    best: str | None = Field(None, description="with most: expression; those where it is largest, else drawn")
    share: Fraction | None = Field(None, description="the share of all that stays, drawn")
    examples: ExamplesForm | None = Field(None, description="rows of another file, drawn for each input row")

    @model_validator(mode="after")
    def _one_draw(self) -> SampleForm:
        _check_one_of(self, ("most", "share", "examples"))
        if self.best is not None and self.most is None:
            raise ValueError("best: is for most")
        return self


class WriteForm(Section):
    prompt: str | None = Field(None, description="template of a user's message")
    messages: list[MessageForm] | None = Field(None, min_length=1, description="templates of a conversation")
    text: str | None = Field(None, description="template of a raw prompt; none of these: the row's own prompt")
    completion: str = Field("{{ text }}", description="template")
    weight: float | str | None = Field(None, description="number or expression: the row's weight in the loss")
    task: str | None = Field(None, description="template: a name that splits the metrics")
    teacher_messages: list[MessageForm] | None = Field(
        None, min_length=1, description="templates of what a teacher reads in the prompt's place when it scores the row"
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> WriteForm:
        _check_one_of(self, ("prompt", "messages", "text"), least=0)
        return self


class StepForm(Section):
    ask: AskForm | None = Field(None, description="one record becomes an answer each")
    read: ReadForm | None = Field(None, description="fields of a text")
    keep: KeepForm | None = Field(None, description="records that pass a test")
    distinct: DistinctForm | None = Field(None, description="the first of each kind")
    sample: SampleForm | None = Field(None, description="some of the records, or rows beside them")
    write: WriteForm | None = Field(None, description="a row of the output; the records go on")

    @model_validator(mode="after")
    def _one_operator(self) -> StepForm:
        _check_one_of(self, tuple(type(self).model_fields))
        return self


class BudgetForm(Section):
    tokens: int | None = Field(None, ge=1, description="read and written, of all models and all sessions of this file")
    money: float | None = Field(None, gt=0.0, description="by the models' prices, likewise")


class ContaminationForm(Section):
    ngram: int = Field(13, ge=1, le=64, description="words in a row that a held-out text and a row may not share")


class RecipeForm(Section):
    name: str = Field("recipe", description="what the card calls it")
    license: str | None = Field(None, description="of the data that it makes, for the card")
    seed: int = Field(0, ge=0, description="every draw derives from it")
    models: dict[str, ModelForm] = Field(min_length=1, description="name: model")
    steps: list[StepForm] = Field(min_length=1, description="what every row goes through, in order")
    budget: BudgetForm = Field(
        default_factory=lambda: BudgetForm(tokens=None, money=None),
        description="where the command stops, with 75; raised, it goes on",
    )
    contamination: ContaminationForm = Field(
        default_factory=lambda: ContaminationForm(ngram=13), description="of --heldout"
    )
    block_rows: int = Field(64, ge=1, le=65536, description="rows that a model in this process answers at once")

    @model_validator(mode="after")
    def _models_are_there(self) -> RecipeForm:
        for index, step in enumerate(self.steps):
            for name in step.ask.models if step.ask else ():
                if name not in self.models:
                    raise ValueError(
                        f"steps.{index}.ask.model: models has no {name!r}; it has: {', '.join(self.models)}"
                    )
        if not any(step.write for step in self.steps):
            raise ValueError("steps: none of them writes")
        if self.budget.money is not None and all(model.prices is None for model in self.models.values()):
            raise ValueError("budget.money: no model has prices")
        return self


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> RecipeForm:
    """Raises ConfigError, which names file, key and what is wrong."""
    values = read_mapping(path, "'models:' and 'steps:'", overrides)
    return make_section(RecipeForm, values, str(path))


def _check_one_of(form: Section, names: Sequence[str], *, least: int = 1) -> None:
    fields = type(form).model_fields
    given = [name for name in names if getattr(form, name) is not None]
    if not least <= len(given) <= 1:
        shown = [fields[name].alias or name for name in names]
        raise ValueError(f": expected {'one' if least else 'at most one'} of {', '.join(shown)}, not {len(given)}")


def _check_field(name: str, key: str) -> None:
    if not _FIELD.fullmatch(name):
        raise ValueError(f"{key}: {name!r} cannot be a field; letters, digits and _ make one")
