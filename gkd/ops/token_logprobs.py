"""Log-probabilities of given tokens from hidden states, without logits for more than a chunk of them.

Legend: N rows (tokens), n rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd.objectives.divergence import working_dtype
from gkd.ops.common import working_memory
from gkd.ops.heads import Head
from gkd.types import OutputHead

_CHUNK_BYTES = 64 << 20


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    compute_dtype: torch.dtype | None = None,
    *,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log softmax(logits)[label] at temperature 1, [N], float32 (float64 for float64 inputs).

    hidden [N, H], labels [N] int64 below V. `compute_dtype` rounds hidden states and head before the products, as
    autocast would. `chunk_bytes` is the memory for logits, by default 64 MiB. Raises InputError for shapes that do
    not fit.
    """
    side = Head("student", hidden, head.weight, head.bias, head.softcap, head.logit_scale)
    side.check()
    dtype = torch.float64 if compute_dtype == torch.float64 else working_dtype(hidden, head.weight)
    vocabulary, found = head.weight.shape[0], hidden.new_empty(len(labels), dtype=dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        product = side.product(vocabulary, None, compute_dtype, dtype)
        at_most = max(1, (chunk_bytes or _CHUNK_BYTES) // (vocabulary * dtype.itemsize))
        memory = working_memory((min(at_most, len(labels)), vocabulary), dtype, hidden.device)
        for start in range(0, len(labels), at_most):
            rows = slice(start, min(start + at_most, len(labels)))
            logits = side.logits(product, rows, memory[: rows.stop - rows.start])  # [n, V]
            found[rows] = logits.gather(1, labels[rows, None])[:, 0] - logits.logsumexp(-1)
    return found
