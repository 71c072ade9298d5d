"""What a served teacher and its clients agree on. Nothing heavy is imported here.

GET  /teacher                      a `ServedModel` as JSON
GET  /head                         the output head: safetensors, with logit scale and soft cap in its metadata
POST /hidden_states?first_row=K    token ids, little-endian int32; the answer is the states after the final norm of rows
                                   K to the last, [rows, H] row after row in the served dtype, little-endian

Errors are JSON: {"error": "..."}. With a token, every request carries `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from gkd.config import Dtype
from gkd.errors import ConfigError

PROTOCOL_VERSION = 1
DEFAULT_PORT = 8300
DESCRIPTION_PATH = "/teacher"
HEAD_PATH = "/head"
STATES_PATH = "/hidden_states"
FIRST_ROW = "first_row"
SHAPE_HEADER = "x-gkd-shape"  # "rows,hidden size"
DTYPE_HEADER = "x-gkd-dtype"
IDENTITY_HEADER = "x-gkd-identity"
TOKEN_ID_FORMAT = "<i4"  # numpy's name of little-endian int32
TOKEN_ID_BYTES = 4
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TOKEN_VARIABLE = "GKD_SERVER_TOKEN"
_SHORTEST_TOKEN = 16


class ServedModel(BaseModel):
    """What a server says of its model. `max_tokens` is the longest sequence that it reads."""

    model_config = ConfigDict(frozen=True, strict=True)

    protocol: int
    model: str
    fingerprint: str  # gkd.models.model_fingerprint
    dtype: Dtype
    hidden_size: int = Field(ge=1)
    vocabulary_rows: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    head_sha256: str

    @property
    def identity(self) -> str:
        """Equal for two servers exactly if their states and heads may be mixed; every answer carries it."""
        parts = f"{self.protocol}:{self.fingerprint}:{self.dtype}:{self.head_sha256}"
        return hashlib.sha256(parts.encode()).hexdigest()[:32]


def read_token(file: str | Path | None, key: str) -> str | None:
    """The token in `file`, else in $GKD_SERVER_TOKEN, else None. It never stands on a command line, which others see.

    Raises ConfigError, starting with `key` or the variable's name, for a file that cannot be read or a weak token.
    """
    origin, text = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        origin = key
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}: cannot read {file}: {error}") from None
    if text is None:
        return None
    token = text.strip()
    if len(token) < _SHORTEST_TOKEN or not all("!" <= character <= "~" for character in token):
        raise ConfigError(
            f"{origin}: a token is at least {_SHORTEST_TOKEN} printable ASCII characters without spaces; "
            "make one with `openssl rand -hex 32`"
        )
    return token
