"""What tells the weights that a trainer sent from those that a sampler holds: checksums that both ends compute.

A tensor that the sampler keeps is compared whole. One that it keeps in a form of its own, packed for its products, is
read back by such a product: with rows that are 1 in one place each it gives columns of the matrix, bit by bit. Which
columns is drawn anew for every version, so that a tensor of an older version shows at once, and a column of one in the
end.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gkd.models.weights import tensor_digest
from gkd.seeding import derive_seed

if TYPE_CHECKING:
    import torch

READ_COLUMNS = 4  # of a packed matrix, at a time: side by side, in one line of a processor's cache
_CHUNK_WORDS = 1 << 16
Forms = tuple[Literal["whole", "columns"], ...]
FORMS: Forms = ("whole", "columns")


@dataclass(frozen=True)
class WeightChecksums:
    """By the names of the trainer's tensors, which a tensor may have in both, or in none."""

    whole: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # of the drawn columns of a matrix
    origin: str = ""  # whose they are, for messages
    # matrices that an engine might lay out in an order of its own, so that its checksum never was the trainer's
    may_be_reordered: frozenset[str] = frozenset()

    def forms(self, name: str) -> Forms:
        """In which a tensor can be compared."""
        return tuple(form for form in FORMS if name in getattr(self, form))

    def add(self, name: str, tensor: torch.Tensor, version: int, forms: Forms = FORMS) -> None:
        """Of a tensor that is there whole."""
        if "whole" in forms:
            self.whole[name] = checksum(tensor)
        if "columns" in forms and tensor.dim() == 2:
            columns = drawn_columns(version, tensor.shape[1])
            self.columns[name] = columns_checksum(tensor[:, columns.start : columns.stop].T)


def differences(sent: WeightChecksums, held: WeightChecksums) -> list[str]:
    """Names of the tensors that are in both, and not alike. What a GPU summed is not compared with what a CPU did."""
    pairs = [(sent.whole, held.whole), (sent.columns, held.columns)]
    return sorted(
        {name for ours, theirs in pairs for name in ours if _differ(ours[name], theirs.get(name, ours[name]))}
    )


def _differ(ours: str, theirs: str) -> bool:
    return len(ours) == len(theirs) and ours != theirs


def drawn_columns(version: int, size: int) -> range:
    """Of a matrix of `size` columns, those that are read back of the weights of a version."""
    blocks = -(-size // READ_COLUMNS)
    start = READ_COLUMNS * (derive_seed(version, "columns", size) % blocks)
    return range(start, min(start + READ_COLUMNS, size))


@functools.lru_cache(8)  # a model has few widths
def one_hot_rows(columns: range, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[len(columns), size]: their product with a matrix W [N, size] gives the columns of W, [len(columns), N]."""
    import torch

    return torch.eye(len(columns), size, dtype=dtype, device=device).roll(columns.start, 1)


def checksum(tensor: torch.Tensor) -> str:
    """Changes with any value of the tensor, and with their order. On a GPU it is computed there, and is another one."""
    return f"{_multilinear(tensor):016x}" if tensor.is_cuda else tensor_digest(tensor).hex()


def columns_checksum(rows: torch.Tensor) -> str:
    """Of columns of a matrix as `rows`, whether sliced or made by a product, which keeps neither -0 nor numbers that
    are too small to be normal."""
    import torch

    return checksum(torch.nn.functional.hardshrink(rows, torch.finfo(rows.dtype).smallest_normal))


def _multilinear(tensor: torch.Tensor) -> int:
    """Sum of the tensor's 64-bit words, each times an odd number that was drawn for its place, modulo 2^64."""
    import torch

    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    factors = _factors(tensor.device)
    sums = [(chunk * factors[: len(chunk)]).sum() for chunk in words.split(_CHUNK_WORDS)]
    total = (torch.stack(sums) * factors[: len(sums)]).sum() if sums else words.sum()
    return int(total) & ((1 << 64) - 1)


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    import torch

    drawn = torch.randint(-(1 << 62), 1 << 62, (_CHUNK_WORDS,), generator=torch.Generator().manual_seed(0))
    return (2 * drawn + 1).to(device)
