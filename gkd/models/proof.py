"""A written model is loaded again, as its users will, and compared with what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import CheckpointError
from gkd.models.hub import explained
from gkd.models.load import load_causal_lm
from gkd.models.weights import tensor_digest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Probe:
    """A text, and what the trainer makes of it."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]  # natural, of token_ids[1:], each given all before it
    tolerance: float  # nats: of the mean difference


def prove_model(folder: Path, dtype: torch.dtype, digests: Mapping[str, bytes], probe: Probe) -> None:
    """Raises CheckpointError unless `folder` loads as the tensors of `digests` and scores the probe as the trainer.

    `digests` holds `tensor_digest` of each parameter, in `dtype`, by transformers' name.
    """
    model: Any = load_causal_lm(str(folder), dtype, key=f"{folder}", may_be_packed=True)
    loaded = model.state_dict()
    for name, digest in digests.items():
        if name not in loaded or tensor_digest(loaded[name]) != digest:
            raise CheckpointError(f"{name} does not load as it was trained")
    _compare(model, probe, "the result")


def prove_adapter(folder: Path, base_folder: Path, dtype: torch.dtype, probe: Probe) -> None:
    """The same of an adapter over its base model, by peft. Raises CheckpointError."""
    from peft import PeftModel

    base = load_causal_lm(str(base_folder), dtype)
    with explained(str(folder), str(folder), "adapter"):
        model = PeftModel.from_pretrained(base, str(folder))
    _compare(model.eval(), probe, "the adapter over its base model")


def _compare(model: Any, probe: Probe, what: str) -> None:
    import torch

    ids = torch.tensor(list(probe.token_ids))
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()  # [T - 1, V]
    found = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    error = (found - torch.tensor(list(probe.logprobs))).abs().mean().item()
    if not error <= probe.tolerance:  # a NaN must not pass
        raise CheckpointError(
            f"{what}, loaded again, gives log-probabilities that differ from the trainer's by {error:.3g} on average "
            f"over {len(found)} probe tokens; rollout.sync_tolerance is {probe.tolerance:g}"
        )
