"""vLLM's own server, or one that speaks as it does, asked for a teacher's most likely tokens. No torch here.

Legend: K = `teacher.top_k`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel

from gkd.config import ENDPOINT_PORT, TeacherConfig
from gkd.errors import ConfigError, TeacherError
from gkd.serving.replicas import NoServerLeftError, Replica, Role, ServerFailedError, ServerRefusedError
from gkd.teacher.probe import SHARED_TOKENS, Probe, probe_texts
from gkd.teacher.servers import ANY_SEQUENCE, LongestSequence, TeacherServers
from gkd.teacher.top_tokens import TopTokens, distances, read_top_tokens

_MODELS_PATH, _COMPLETIONS_PATH = "/v1/models", "/v1/completions"


class _ModelCard(BaseModel):
    id: str
    root: str | None = None
    parent: str | None = None  # of an adapter: the model it belongs to
    max_model_len: int | None = None


class _ModelList(BaseModel):
    data: list[_ModelCard]


class Endpoints(TeacherServers):
    """Servers of one teacher's most likely tokens."""

    model: str  # what they serve, in their words
    max_tokens: int | None  # the least that any of them takes; None: they do not say
    vocabulary_rows: int  # of teacher.model, to be set before anything is scored: servers do not say it

    def __init__(
        self, config: TeacherConfig, section: str = "teacher", longest: LongestSequence = ANY_SEQUENCE
    ) -> None:
        """Asks every server what it serves, and for one answer of K tokens. `section` is the config's, for messages.

        Raises ConfigError if one does not answer, asks for a token that it was not given, serves several models or
        another than the others, allows fewer tokens, or takes no sequence as long as `longest`.
        """
        self._texts: Probe[TopTokens] = Probe(distances)
        role = Role(section, "nothing", "OpenAI-compatible server", _MODELS_PATH, self._start_command)
        super().__init__(config, role, longest)

    def _ask(self) -> None:
        cards = [self._describe(replica) for replica in self._pool.replicas]
        self._pool.check_agreement(cards, ("id", "root"))
        self.model = cards[0].root or cards[0].id
        self._name = cards[0].id
        self.max_tokens = min((card.max_model_len for card in cards if card.max_model_len), default=None)
        for replica in self._pool.replicas:
            self._check_top_k(replica)
        needed = self._longest.tokens + 1
        if self.max_tokens is not None and self.max_tokens < needed:
            raise ConfigError(
                f"{self._section}.addresses: {self._longest.said}, and a server that scores it samples one more; "
                f"{self.model} is served with {self.max_tokens}; start it with --max-model-len {needed} or more, or "
                "lower one of the two"
            )

    def top_tokens(self, token_ids: Sequence[int], first: int, what: str) -> TopTokens:
        """Of the tokens from `first` on, each given all before it. `what` names the sample in errors.

        Raises TeacherError if every attempt fails, or at once if a server refuses the request or answers something else
        than was asked for.
        """
        try:
            return self._attempt(lambda replica: self._top_tokens(replica, token_ids, first, what))
        except NoServerLeftError as error:
            raise TeacherError(f"{what} could not be scored by a top-k teacher: {error}", is_temporary=True) from None

    def check_vocabulary(self, rows: int) -> None:
        """Raises ConfigError unless the servers take the last of `rows` token ids, and no id after it, and read texts
        in their order."""
        for replica in self._pool.replicas:
            for token_id, is_known in ((rows - 1, True), (rows, False)):
                if self._takes(replica, token_id) != is_known:
                    has = "has no" if is_known else "has a"
                    raise ConfigError(
                        f"{self._section}.addresses: {replica.address} serves {self.model}, which {has} token id "
                        f"{token_id}, but teacher.model has {rows} ids; is it another model?"
                    )
        self.vocabulary_rows = rows
        self._probe_all()

    # ---- one server

    def _describe(self, replica: Replica) -> _ModelCard:
        models = [card for card in self._pool.describe(replica, _ModelList).data if card.parent is None]
        if len(models) != 1:
            names = ", ".join(card.id for card in models) or "none"
            raise ConfigError(
                f"{self._section}.addresses: {replica.address} has to serve one model, and serves {names}"
            )
        return models[0]

    def _check_top_k(self, replica: Replica) -> None:
        key, count = f"{self._section}.top_k", self._config.top_k
        try:
            found = json.loads(self._post(replica, (0, 0)))["choices"][0]["prompt_logprobs"][1]
        except ServerRefusedError as error:
            raise ConfigError(
                f"{key}: {replica.address} does not tell the {count} most likely tokens ({error}); lower it, or start "
                f"the server with --max-logprobs {count}"
            ) from None
        except (httpx.HTTPError, ServerFailedError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"{self._section}.addresses: {replica.address} answers no prompt_logprobs on {_COMPLETIONS_PATH} "
                f"({type(error).__name__}); start one that does with: {self._start_command(replica.address)}"
            ) from None
        if len(found) < count:
            raise ConfigError(f"{key}: {replica.address} tells {len(found)} tokens of the {count} asked for; lower it")

    def _takes(self, replica: Replica, token_id: int) -> bool:
        try:
            self._post(replica, (0, token_id))
        except ServerRefusedError:
            return False
        except (httpx.HTTPError, ServerFailedError) as error:
            raise ConfigError(f"{self._section}.addresses: {replica.address}: {self._pool.reason(error)}") from None
        return True

    def _post(self, replica: Replica, token_ids: Sequence[int]) -> bytes:
        request = {
            "model": self._name,
            "prompt": list(token_ids),
            "prompt_logprobs": self._config.top_k,
            "max_tokens": 1,  # the least that servers take
            "temperature": 0.0,
        }
        return self._pool.post_json(replica, _COMPLETIONS_PATH, request)

    def _probe(self, replica: Replica) -> None:
        texts = probe_texts(self.vocabulary_rows)
        one, other = (self._top_tokens(replica, text, 1, "a probe") for text in texts)
        try:
            self._texts.check(one, other, SHARED_TOKENS)
        except ValueError as error:
            raise TeacherError(f"{replica.address}: a probe: {error}") from None

    def _top_tokens(self, replica: Replica, token_ids: Sequence[int], first: int, what: str) -> TopTokens:
        count, rows = self._config.top_k, self.vocabulary_rows
        try:
            body = self._post(replica, token_ids)
            return read_top_tokens(body, token_ids, first, count=count, vocabulary_rows=rows)
        except ServerRefusedError as error:
            raise TeacherError(f"{replica.address}: {what}: the top-k teacher refused it: {error}") from None
        except ValueError as error:
            raise TeacherError(f"{replica.address}: {what}: {error}") from None

    def _start_command(self, address: str) -> str:
        port, config = urlsplit(address).port or ENDPOINT_PORT, self._config
        model = shlex.quote(config.model)
        return f"vllm serve {model} --dtype {config.dtype} --max-logprobs {config.top_k} --port {port}"
