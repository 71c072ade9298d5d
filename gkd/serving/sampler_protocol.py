"""What a served sampler and its clients agree on. Nothing heavy is imported here.

GET  /sampler              a `ServedSamplerModel` as JSON
POST /completions?...      the token ids of a prompt, how to complete it as a `CompletionQuery`; the answer is the
                           completion: its n ids, then their n log-probabilities in little-endian float32
POST /probe?update=ID      the token ids of a text; the answer is the log-probabilities of its second token and all
                           after it, as above
POST /lease                from here on the server works for this run alone; again, at least every LEASE_S
POST /lease/end            the run needs it no more
POST /weights/held         {"update": ID}: the answer is a `HeldWeights` as JSON
POST /weights/connect      {"info": {...}}: what the weight-transfer engine has to know of the trainer, once; then, for
                           each update:
POST /weights/start        {"update": ID, "version": V}
POST /weights/piece        {"update": ID, "piece": {...}}: the engine receives some of the weights
POST /weights/finish       {"update": ID, "pieces": N}
POST /weights/accept       {"update": ID}: the trainer has proved them

Every POST says with `x-gkd-run` whose it is: a `RunIdentity` as JSON. Nothing is completed before weights were
accepted, and only for a client that names the update which brought them: versions are numbers that two runs may share.
Token ids, errors and the token are as in `gkd/serving/protocol.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gkd.serving.protocol import TOKEN_ID_FORMAT, Description
from gkd.types import Completion, SamplingSettings

PROTOCOL_VERSION = 3
DESCRIPTION_PATH = "/sampler"
COMPLETIONS_PATH = "/completions"
PROBE_PATH = "/probe"
LEASE_PATH = "/lease"
LEASE_END_PATH = "/lease/end"
HELD_PATH = "/weights/held"
CONNECT_PATH = "/weights/connect"
START_PATH = "/weights/start"
PIECE_PATH = "/weights/piece"
FINISH_PATH = "/weights/finish"
ACCEPT_PATH = "/weights/accept"
FINISH_REASON_HEADER = "x-gkd-finish-reason"
UPDATE_HEADER = "x-gkd-update"
RUN_HEADER = "x-gkd-run"
LEASE_S = 120.0
LOGPROB_FORMAT = "<f4"  # numpy's name of little-endian float32
LOGPROB_BYTES = 4
LOGPROB_ROUNDING = 1e-3  # how far above 0 an engine may round
BYTES_A_TOKEN = 8  # of a completion: its id and its log-probability
CONFLICT = 409  # the server does not hold the weights that the request is for
LOCKED = 423  # it works for another run
Transfer = Literal["file", "gloo", "nccl"]
_NO_ARCHITECTURE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")


class ServedSamplerModel(Description):
    """What a served sampler says of itself. `max_tokens` is the longest prompt and completion together."""

    spoken = PROTOCOL_VERSION

    architecture: str  # `architecture_digest`
    weight_transfer: Transfer
    weights_folder: str | None  # file: where it looks for pieces
    process: str  # another one after a restart


class RunIdentity(BaseModel):
    """A run, the same one after a resume. `name` is for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    name: str

    @property
    def headers(self) -> dict[str, str]:
        return {RUN_HEADER: json.dumps(self.model_dump())}  # ASCII, whatever a folder's name is


class ProbeQuery(BaseModel):
    """Which weights a request is for: its query."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    update: str = Field(min_length=1)  # that brought them

    @property
    def params(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.model_dump().items()}


class CompletionQuery(ProbeQuery):
    """And how to complete a prompt, in the words of `SamplingSettings`."""

    seed: int = Field(ge=0, lt=1 << 63)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0.0)
    top_p: float = Field(gt=0.0, le=1.0)
    top_k: int = Field(ge=0, lt=1 << 31)
    stop_token_ids: str = Field(pattern=r"^([0-9]{1,9}(,[0-9]{1,9})*)?$")  # a larger one is in no int32
    shared_vocab: int = Field(0, ge=0)

    @classmethod
    def of(cls, settings: SamplingSettings, *, seed: int, update: str) -> CompletionQuery:
        return cls(
            update=update,
            seed=seed,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_token_ids=",".join(map(str, settings.stop_token_ids)),
            shared_vocab=settings.shared_vocab,
        )

    @property
    def settings(self) -> SamplingSettings:
        stop_ids = tuple(int(i) for i in self.stop_token_ids.split(",") if i)
        return SamplingSettings(
            self.max_new_tokens, self.temperature, self.top_p, self.top_k, stop_ids, self.shared_vocab
        )


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Connection(_Message):
    info: dict[str, Any]


class WhichUpdate(_Message):
    update: str


class UpdateStart(_Message):
    update: str
    version: int = Field(ge=0)


class UpdatePiece(_Message):
    update: str
    piece: dict[str, Any]


class UpdateFinish(_Message):
    update: str
    pieces: int = Field(ge=1)


class HeldWeights(_Message):
    """`gkd.models.held.WeightChecksums` of what a server holds."""

    whole: dict[str, str]
    columns: dict[str, str]
    may_be_reordered: list[str]


def architecture_digest(config: Any) -> str:
    """16 hex digits of a transformers config: equal for models whose weights fit each other."""
    values = {name: value for name, value in config.to_dict().items() if name not in _NO_ARCHITECTURE}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def completion_to_bytes(completion: Completion) -> bytes:
    import numpy as np

    return np.asarray(completion.token_ids, TOKEN_ID_FORMAT).tobytes() + logprobs_to_bytes(completion.logprobs)


def completion_from_bytes(data: bytes | bytearray, finish_reason: str | None) -> Completion:
    """The inverse of `completion_to_bytes`. Raises ValueError if `data` is no completion."""
    import numpy as np

    count, rest = divmod(len(data), BYTES_A_TOKEN)
    if rest or not count or finish_reason not in ("stop", "length"):
        raise ValueError(f"{len(data)} bytes, finish reason {finish_reason!r}: that is no completion")
    half = len(data) // 2
    token_ids = np.frombuffer(data[:half], TOKEN_ID_FORMAT)
    return Completion(tuple(token_ids.tolist()), logprobs_from_bytes(data[half:]), finish_reason)  # pyright: ignore


def logprobs_to_bytes(logprobs: Sequence[float]) -> bytes:
    import numpy as np

    return np.asarray(logprobs, LOGPROB_FORMAT).tobytes()


def logprobs_from_bytes(data: bytes | bytearray) -> tuple[float, ...]:
    """The inverse of `logprobs_to_bytes`. Raises ValueError if one is no log-probability, or there are half ones."""
    import numpy as np

    logprobs = np.frombuffer(data, LOGPROB_FORMAT)
    if not np.isfinite(logprobs).all():
        raise ValueError("its log-probabilities are not finite")
    if logprobs.size and logprobs.max() > LOGPROB_ROUNDING:  # none of a text of one token
        raise ValueError(f"a log-probability of {logprobs.max():.4g}: they are 0 at most")
    return tuple(logprobs.tolist())
