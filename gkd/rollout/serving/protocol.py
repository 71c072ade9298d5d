"""What a served sampler and its clients agree on. Nothing heavy is imported here.

GET  /sampler              a `ServedSamplerModel` as JSON
POST /completions?...      the token ids of a prompt, how to complete it as a `CompletionQuery`; the answer is the
                           completion: its n ids, then their n log-probabilities in little-endian float32
POST /weights/connect      {"info": {...}}: what the weight-transfer engine has to know of the trainer, once; then, for
                           each update:
POST /weights/start        {"update": ID, "version": V}
POST /weights/piece        {"update": ID, "piece": {...}}: the engine receives some of the weights
POST /weights/finish       {"update": ID, "pieces": N}
POST /weights/accept       {"update": ID}: the trainer has proved them

Nothing but probes is completed before weights were accepted, and only for a client that names their version. Token ids,
errors and the token are as in `gkd/serving/protocol.py`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gkd.config import Dtype
from gkd.types import Completion, SamplingSettings

PROTOCOL_VERSION = 1
DEFAULT_PORT = 8400
DESCRIPTION_PATH = "/sampler"
COMPLETIONS_PATH = "/completions"
CONNECT_PATH = "/weights/connect"
START_PATH = "/weights/start"
PIECE_PATH = "/weights/piece"
FINISH_PATH = "/weights/finish"
ACCEPT_PATH = "/weights/accept"
FINISH_REASON_HEADER = "x-gkd-finish-reason"
VERSION_HEADER = "x-gkd-weights-version"
LOGPROB_FORMAT = "<f4"  # numpy's name of little-endian float32
BYTES_A_TOKEN = 8  # its id and its log-probability
CONFLICT = 409  # the server does not hold the weights that the request is for
Transfer = Literal["file", "gloo", "nccl"]
_NO_ARCHITECTURE = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")


class ServedSamplerModel(BaseModel):
    """What a server says of itself. `max_tokens` is the longest prompt and completion together."""

    model_config = ConfigDict(frozen=True, strict=True)

    protocol: int
    model: str
    architecture: str  # `architecture_digest`
    dtype: Dtype
    vocabulary_rows: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    weight_transfer: Transfer
    weights_folder: str | None  # file: where it looks for pieces
    process: str  # another one after a restart


class CompletionQuery(BaseModel):
    """How to complete a prompt: the query of a request, in the words of `SamplingSettings`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights_version: int = Field(ge=0)
    seed: int = Field(ge=0, lt=1 << 63)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0.0)
    top_p: float = Field(gt=0.0, le=1.0)
    top_k: int = Field(ge=0)
    stop_token_ids: str = Field(pattern=r"^(\d+(,\d+)*)?$")
    is_probe: bool

    @classmethod
    def of(cls, settings: SamplingSettings, *, seed: int, weights_version: int, is_probe: bool) -> CompletionQuery:
        return cls(
            weights_version=weights_version,
            seed=seed,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            stop_token_ids=",".join(map(str, settings.stop_token_ids)),
            is_probe=is_probe,
        )

    @property
    def params(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.model_dump().items()}

    @property
    def settings(self) -> SamplingSettings:
        stop_ids = tuple(int(i) for i in self.stop_token_ids.split(",") if i)
        return SamplingSettings(self.max_new_tokens, self.temperature, self.top_p, self.top_k, stop_ids)


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Connection(_Message):
    info: dict[str, Any]


class UpdateAccept(_Message):
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


def architecture_digest(config: Any) -> str:
    """16 hex digits of a transformers config: equal for models whose weights fit each other."""
    values = {name: value for name, value in config.to_dict().items() if name not in _NO_ARCHITECTURE}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def completion_to_bytes(completion: Completion) -> bytes:
    import numpy as np

    from gkd.serving.protocol import TOKEN_ID_FORMAT

    logprobs = np.asarray(completion.logprobs, LOGPROB_FORMAT)
    return np.asarray(completion.token_ids, TOKEN_ID_FORMAT).tobytes() + logprobs.tobytes()


def completion_from_bytes(data: bytes | bytearray, finish_reason: str | None) -> Completion:
    """The inverse of `completion_to_bytes`. Raises ValueError if `data` is no completion."""
    import numpy as np

    from gkd.serving.protocol import TOKEN_ID_FORMAT

    count, rest = divmod(len(data), BYTES_A_TOKEN)
    if rest or not count or finish_reason not in ("stop", "length"):
        raise ValueError(f"{len(data)} bytes, finish reason {finish_reason!r}: that is no completion")
    half = len(data) // 2
    token_ids = np.frombuffer(data[:half], TOKEN_ID_FORMAT)
    logprobs = np.frombuffer(data[half:], LOGPROB_FORMAT)
    if not np.isfinite(logprobs).all():
        raise ValueError("its log-probabilities are not finite")
    return Completion(tuple(token_ids.tolist()), tuple(logprobs.tolist()), finish_reason)  # pyright: ignore
