"""What a served teacher and its clients agree on. Nothing heavy is imported here.

GET  /teacher                      a `ServedTeacherModel` as JSON
GET  /head                         the output head: safetensors, with logit scale and soft cap in its metadata
POST /hidden_states?first_row=K    token ids; the answer is the states after the final norm of rows K to the last,
                                   [rows, H] row after row in the served dtype, little-endian

Token ids, errors and the token are as in `gkd/serving/protocol.py`.
"""

from __future__ import annotations

import hashlib

from pydantic import Field

from gkd.serving.protocol import Description

PROTOCOL_VERSION = 3
DESCRIPTION_PATH = "/teacher"
HEAD_PATH = "/head"
STATES_PATH = "/hidden_states"
FIRST_ROW = "first_row"
SHAPE_HEADER = "x-gkd-shape"  # "rows,hidden size"
DTYPE_HEADER = "x-gkd-dtype"
IDENTITY_HEADER = "x-gkd-identity"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ServedTeacherModel(Description):
    """What a served teacher says of its model. `max_tokens` is the longest sequence that it reads."""

    spoken = PROTOCOL_VERSION

    fingerprint: str  # gkd.models.model_fingerprint
    hidden_size: int = Field(ge=1)
    head_sha256: str

    @property
    def identity(self) -> str:
        """Equal for two servers exactly if their states and heads may be mixed; every answer carries it."""
        parts = f"{self.protocol}:{self.fingerprint}:{self.dtype}:{self.head_sha256}"
        return hashlib.sha256(parts.encode()).hexdigest()[:32]
