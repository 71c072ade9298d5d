"""The reference sampler: transformers' `generate`, with a seed of its own for every row.

Bitwise reproducible on one machine for the same batches of requests. Slower than vLLM; for platforms without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gkd.config import LoraConfig
from gkd.models import adapter_parameters, inject_lora, load_causal_lm
from gkd.models.held import WeightChecksums
from gkd.types import Completion, SampleRequest, SamplingSettings


class _GumbelNoise(LogitsProcessor):
    """Turns argmax into exact sampling, row by row: argmax(logits + Gumbel noise) ~ softmax(logits).

    `generate` has one random state for the whole batch; this gives each row its own (the Gumbel-max trick,
    Maddison et al. 2014, arXiv 1411.0030).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self._generators])
        return scores.float() - noise.to(scores.device).log()


class _SharedVocabulary(LogitsProcessor):
    """Draws no id from `size` on."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[-1] <= self._size:
            return scores
        scores = scores.clone()
        scores[:, self._size :] = -torch.inf
        return scores


class HfSampler:
    """Implements `Sampler` with a transformers model of its own."""

    def __init__(
        self,
        model_folder: str,
        *,
        dtype: str,
        device: torch.device,
        pad_token_id: int,
        max_num_seqs: int = 64,
        lora: LoraConfig | None = None,
        key: str = "student.model",
    ) -> None:
        """`key` is what an error about the model starts with."""
        self._model = load_causal_lm(model_folder, dtype, key=key, may_be_packed=True).to(device).eval()  # pyright: ignore
        if lora is not None:
            inject_lora(self._model, lora, seed=0)  # every update brings all of the adapter
            self._model.eval()
        self._held: dict[str, torch.Tensor] = {}  # what the last update brought, by its names
        self._model.generation_config = GenerationConfig()  # else its own end tokens and temperature mix in
        self._device = device
        self._pad_token_id = pad_token_id
        self._max_num_seqs = max_num_seqs

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        return [completion for part in self._at_once(requests) for completion in self._generate(part, settings)]

    def _at_once(self, requests: Sequence[SampleRequest]) -> list[Sequence[SampleRequest]]:
        return [requests[start : start + self._max_num_seqs] for start in range(0, len(requests), self._max_num_seqs)]

    @torch.no_grad()
    def _generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        limits = [request.limited(settings).max_new_tokens for request in requests]
        longest = max(len(request.prompt_ids) for request in requests)
        rows = [[self._pad_token_id] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
        mask = [[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests]
        output = self._model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(limits),
                eos_token_id=list(settings.stop_token_ids) or None,
                pad_token_id=self._pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            ),
            logits_processor=_processors(requests, settings),
        )
        tokens = output.sequences[:, longest:].cpu()  # [B, T]
        logits = torch.stack(output.logits, dim=1).float().cpu()  # [B, T, V]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # [B, T]
        return [
            _cut(t[:limit], lp[:limit], settings.stop_token_ids)
            for t, lp, limit in zip(tokens.tolist(), logprobs.tolist(), limits, strict=True)
        ]

    @torch.no_grad()
    def probe(self, token_ids: Sequence[int]) -> list[Sequence[float]]:
        ids = torch.tensor(token_ids, device=self._device)
        logprobs = self._model(ids[None]).logits[0, :-1].float().log_softmax(-1)  # [T - 1, V]
        return [logprobs.gather(-1, ids[1:, None])[:, 0].tolist()]

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        own = {**dict(self._model.named_parameters(remove_duplicate=False)), **adapter_parameters(self._model)}
        self._held = {}
        for name, tensor in weights:
            own[name].copy_(tensor)
            self._held[name] = own[name]

    def held_weights(self, version: int) -> list[WeightChecksums]:
        checksums = WeightChecksums()
        for name, parameter in self._held.items():
            checksums.add(name, parameter, version, ("whole",))
        return [checksums]

    def accept_weights(self) -> None:
        """Nobody else has to know."""

    def sleep(self) -> None:
        """Its caches live no longer than a batch."""

    def close(self) -> None:
        del self._model


def _processors(requests: Sequence[SampleRequest], settings: SamplingSettings) -> LogitsProcessorList:
    processors = LogitsProcessorList([_SharedVocabulary(settings.shared_vocab)] if settings.shared_vocab else [])
    if settings.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    processors.append(_GumbelNoise([request.seed for request in requests]))
    return processors


def _cut(tokens: list[int], logprobs: list[float], stop_token_ids: Sequence[int]) -> Completion:
    """Everything up to and including the first stop token: `generate` pads the rows that ended early."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop_token_ids), None)
    length = len(tokens) if end is None else end
    return Completion(tuple(tokens[:length]), tuple(logprobs[:length]), "length" if end is None else "stop")
