"""What all of gkd's servers and their clients agree on. Nothing heavy is imported here.

Token ids travel as little-endian int32. What is made of them comes with `x-gkd-digest`, its `answer_digest`. Errors are
JSON: {"error": "..."}. With a token, every request carries `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from gkd.config import Dtype
from gkd.digests import digest
from gkd.errors import ConfigError

TOKEN_ID_FORMAT = "<i4"  # numpy's name of little-endian int32
TOKEN_ID_BYTES = 4
DIGEST_HEADER = "x-gkd-digest"
TOKEN_VARIABLE = "GKD_SERVER_TOKEN"
_SHORTEST_TOKEN = 16


class Description(BaseModel):
    """What a server of gkd's says of its model. `max_tokens` is the longest sequence that it takes."""

    model_config = ConfigDict(frozen=True, strict=True)
    spoken: ClassVar[int]  # the version of its kind's protocol that this gkd speaks

    protocol: int
    model: str
    dtype: Dtype
    vocabulary_rows: int = Field(ge=1)
    max_tokens: int = Field(ge=1)


def answer_digest(token_ids: bytes, answer: bytes | bytearray | memoryview) -> str:
    """32 hex digits of an answer and of the token ids that it is for, as they were sent: neither an answer of which a
    bit has flipped nor that of another request fits them."""
    return digest(token_ids, answer).hex()


def read_token(file: str | Path | None, key: str, variable: str = TOKEN_VARIABLE) -> str | None:
    """The token in `file`, else in the environment, else None. It never stands on a command line, which others see.

    Raises ConfigError, starting with `key` or the variable's name, for a file that cannot be read or a weak token.
    """
    origin, text = variable, os.environ.get(variable)
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
