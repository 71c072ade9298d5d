"""Log-probabilities of given or most likely tokens from hidden states, without logits for more than a chunk of them.

Legend: N rows (tokens), n rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[label], [N], float32 (float64 for float64 inputs).

    hidden [N, H], labels [N] int64 below V. `compute_dtype` rounds hidden states and head before the products, as
    autocast would. `chunk_bytes` is the memory for logits, by default 64 MiB. Raises InputError for shapes that do
    not fit.
    """
    found: list[Tensor] = []
    for rows, logits in _logit_chunks(hidden, head, compute_dtype, chunk_bytes):
        scaled = logits if temperature == 1.0 else logits.div_(temperature)
        found.append(scaled.gather(1, labels[rows, None])[:, 0] - scaled.logsumexp(-1))
    return torch.cat(found)


@torch.no_grad()
def top_logprobs(hidden: Tensor, head: OutputHead, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, count] and ids [N, count] of each row's most likely tokens at temperature 1, best first.

    hidden [N, H]; fewer than `count` only if the vocabulary is smaller. float32 (float64 for float64 inputs).
    Raises InputError for shapes that do not fit.
    """
    count = min(count, head.weight.shape[0])
    found = [logits.log_softmax(-1).topk(count, dim=-1) for _, logits in _logit_chunks(hidden, head, None, None)]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def _logit_chunks(
    hidden: Tensor, head: OutputHead, compute_dtype: torch.dtype | None, chunk_bytes: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their logits [n, V]) of all rows in turn, in the same memory; without a row one empty chunk."""
    side = Head.of("student", hidden, head)
    side.check()
    dtype = torch.float64 if compute_dtype == torch.float64 else working_dtype(hidden, head.weight)
    vocabulary = head.weight.shape[0]
    at_most = max(1, (chunk_bytes or _CHUNK_BYTES) // (vocabulary * dtype.itemsize))
    with torch.autocast(hidden.device.type, enabled=False):
        product = side.product(vocabulary, None, compute_dtype, dtype)
        memory = working_memory((min(at_most, len(hidden)), vocabulary), dtype, hidden.device)
        for start in range(0, max(1, len(hidden)), at_most):
            rows = slice(start, min(start + at_most, len(hidden)))
            yield rows, side.logits(product, rows, memory[: rows.stop - rows.start])
