"""Hidden states as a served teacher sends them, and what they have to be.

Legend: T rows, H hidden size.
"""

from __future__ import annotations

import torch


def states_from_bytes(data: bytearray, dtype: str, hidden_size: int) -> torch.Tensor:
    """[T, H] in `dtype`. Raises ValueError for what no final norm gives: not finite, or a row of equal numbers."""
    states = torch.frombuffer(data, dtype=getattr(torch, dtype)).view(-1, hidden_size)
    least, most = states.aminmax(dim=1)  # [T]; one pass, and a NaN passes through
    if not (least.isfinite() & most.isfinite()).all():
        raise ValueError("its hidden states are not finite")
    equal = least == most
    if equal.any():
        row = int(equal.nonzero()[0])
        raise ValueError(f"row {row} of its hidden states is {least[row].item():.4g} throughout")
    return states
