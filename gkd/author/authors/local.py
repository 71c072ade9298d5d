"""An author in this process: vLLM or transformers, through the sampler that training uses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gkd.author.questions import Answer, Arrived, AskSettings, Failure, PromptKind, Question
from gkd.author.spec import ModelForm
from gkd.config import lone_choices, settled_option
from gkd.data.formats import Row
from gkd.engines.sampling import SamplerSpec
from gkd.errors import DataError
from gkd.extras import require_vllm
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    from gkd.rollout.base import Sampler

_LONGEST_CONTEXT = 8192  # by default: a key-value cache has to hold it


class LocalAuthor:
    """Implements `Author`. All questions of a call are one batch, handed over together: so the same calls give the same
    answers, bit by bit with transformers. The model is loaded when the first question is asked."""

    is_here = True

    def __init__(self, form: ModelForm, key: str) -> None:
        """`key` is the model's in the recipe, for messages. Raises ModelError for one that is not there,
        MissingPackageError if its engine is not."""
        if form.engine == "vllm":
            require_vllm(f"{key}.engine", "or set it to transformers")
        from gkd.data.encoding import RowEncoder
        from gkd.data.templates import ChatTemplate
        from gkd.models import (
            end_token_ids,
            load_tokenizer,
            pad_token_id,
            read_config,
            read_generation_config,
            resolve_model,
        )
        from gkd.models.fingerprint import model_fingerprint

        path = resolve_model(form.model, revision=form.revision, key=f"{key}.model")
        config = read_config(path, revision=form.revision, key=f"{key}.model")
        self._tokenizer: Any = load_tokenizer(path, f"{key}.model", revision=form.revision)
        self._encoder = RowEncoder(
            self._tokenizer, ChatTemplate(self._tokenizer, form.chat_template_kwargs, key=f"{key}.chat_template_kwargs")
        )
        generation = read_generation_config(path, revision=form.revision, key=f"{key}.model")
        self._end_ids = end_token_ids(self._tokenizer, generation, config, key=f"{key}.model")
        context = getattr(config, "max_position_embeddings", None) or 4096
        self._longest = form.max_model_tokens or min(context, _LONGEST_CONTEXT)
        dtype = settled_option(form.dtype, f"{key}.dtype")
        fingerprint = model_fingerprint(path, form.revision, f"{key}.model")
        self.identity = json.dumps([fingerprint, form.engine, dtype, form.chat_template_kwargs])
        self._sampler: Sampler | None = None
        self._spec = SamplerSpec(
            engine=form.engine,
            model_folder=path,
            dtype=dtype,
            max_model_tokens=self._longest,
            pad_token_id=pad_token_id(self._tokenizer, f"{key}.model"),
            revision=form.revision,
            key=f"{key}.model",
        )

    def refusal(self, kind: PromptKind) -> str | None:
        if kind == "messages" and self._tokenizer.chat_template is None:
            return f"the tokenizer of {self._tokenizer.name_or_path!r} has no chat template; ask it raw text (text:)"
        return None

    async def answer(self, questions: Sequence[tuple[Question, int]], arrived: Arrived) -> None:
        outcomes: dict[int, Answer | Failure] = {}
        for settings, places in _alike(questions):
            requests: dict[int, SampleRequest] = {}
            for place in places:
                question, seed = questions[place]
                prompt_ids = self._prompt_ids(question, settings)
                if isinstance(prompt_ids, Failure):
                    outcomes[place] = prompt_ids
                else:
                    requests[place] = SampleRequest(prompt_ids, seed)
            completions = self._generate(list(requests.values()), settings)
            for (place, request), completion in zip(requests.items(), completions, strict=True):
                outcomes[place] = self._answer(questions[place][0], len(request.prompt_ids), completion)
        arrived(sorted(outcomes.items()))

    async def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()

    def _prompt_ids(self, question: Question, settings: AskSettings) -> tuple[int, ...] | Failure:
        prompt = question.prompt
        row = Row("a prompt", prompt_text=prompt) if isinstance(prompt, str) else Row("a prompt", messages=prompt)
        try:
            ids = tuple(self._encoder.prompt_ids(row))
        except DataError as error:
            return Failure("the chat template refuses the conversation", str(error))
        if left_out := list(self._encoder.left_out):
            self._encoder.left_out.clear()
            return Failure("the chat template leaves messages out", ", ".join(left_out))
        if not ids:
            return Failure("an empty prompt")
        if len(ids) + settings.max_new_tokens > self._longest:
            return Failure(
                f"prompt and max_new_tokens are more than {self._longest} tokens", f"{len(ids)} of the prompt"
            )
        return ids

    def _generate(self, requests: Sequence[SampleRequest], settings: AskSettings) -> Sequence[Completion]:
        if not requests:
            return []
        if self._sampler is None:
            import torch

            from gkd.rollout.offline import alone, start_sampler

            chosen = lone_choices(torch.cuda.is_available())
            spec = replace(self._spec, max_num_seqs=chosen.max_num_seqs, enforce_eager=chosen.enforce_eager)
            self._sampler = start_sampler(alone(spec))
        drawn = SamplingSettings(
            settings.max_new_tokens, settings.temperature, settings.top_p, stop_token_ids=self._end_ids
        )
        return self._sampler.generate(requests, drawn)

    def _answer(self, question: Question, prompt_tokens: int, completion: Completion) -> Answer:
        text = str(self._tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))
        text = text.encode("utf-8", "replace").decode()
        mean = sum(completion.logprobs) / len(completion.logprobs) if completion.logprobs else None
        answer = Answer(text, completion.finish_reason, prompt_tokens, len(completion.token_ids), mean)
        ends = [place for stop in question.settings.stop if (place := text.find(stop)) >= 0]
        if ends:
            answer = replace(answer, text=text[: min(ends)], finish_reason="stop")
        return answer if isinstance(question.prompt, str) else replace(answer, text=answer.text.strip())


def _alike(questions: Sequence[tuple[Question, int]]) -> Iterator[tuple[AskSettings, list[int]]]:
    """The places of those that are drawn alike."""
    groups: dict[AskSettings, list[int]] = {}
    for place, (question, _) in enumerate(questions):
        groups.setdefault(question.settings, []).append(place)
    yield from groups.items()
