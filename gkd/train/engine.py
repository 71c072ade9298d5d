"""The student on DeepSpeed: forward, divergence, backward, finite check, optimizer step, and its weights as a stream.

Legend: B rows, T positions, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from gkd.config import Config, DivergenceKind, Launch, ObjectiveConfig
from gkd.models.lora import LeavingWeight, adapter_weights, whole_weights
from gkd.objectives.mismatch import MismatchSums, mismatch_means
from gkd.train.deepspeed_config import deepspeed_config, scales_loss
from gkd.train.distributed import compute_device, max_over_ranks, sum_over_ranks
from gkd.train.guards import FiniteGuard
from gkd.train.module import BYPRODUCTS, TOPK_BYPRODUCTS, DivergenceSums, StudentModule, token_divergences
from gkd.train.optimizer import make_optimizer, make_schedule
from gkd.types import HiddenScores, TokenBatch, WeightStream

Phase = Callable[[str], AbstractContextManager[None]]


class StudentEngine:
    """Owns the DeepSpeed engine. Every method is collective: all ranks call it, with as many micro-batches each."""

    def __init__(
        self, model: Any, config: Config, launch: Launch, *, valid_vocab: int, phase: Phase = lambda name: nullcontext()
    ) -> None:
        import deepspeed

        self._config = config
        self._device = compute_device(launch)
        self._world_size = launch.world_size
        self._phase = phase
        settings = deepspeed_config(config, launch.world_size)
        if config.student.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._whole = whole_weights(model)
        self._adapter = adapter_weights(model)
        # what is frozen is in the student's own folder, and in no checkpoint
        self._is_partly_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        module = StudentModule(model, config.objective, valid_vocab, getattr(torch, config.student.dtype))
        optimizer = None if "optimizer" in settings else make_optimizer(module, config.optim)
        schedule: Any = None  # a function, as it may be DeepSpeed that makes the optimizer
        if "scheduler" not in settings:
            schedule = partial(make_schedule, config=config.optim, steps=config.run.steps)
        self._engine: Any = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],  # pyright: ignore
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=settings,
            dist_init_required=False,
        )[0]
        self._guard = FiniteGuard(module, enabled=not scales_loss(settings))

    # ---- training

    def step(self, micro_batches: Sequence[TokenBatch], step: int) -> dict[str, float]:
        """One optimizer step on this rank's share of the global batch; returns metrics of the global batch.

        The loss is sum of weight x divergence over the scored tokens of ALL ranks and micro-batches, divided by
        their total weight, which is counted before the first backward: how the batch is split cannot matter.
        Raises NonFiniteError on all ranks, before the optimizer steps, if any loss or gradient is not finite.
        """
        torch.manual_seed(step)  # dropout, if the student has any: the same after a resume
        totals = torch.stack(
            [sum((b.weights.double().sum() for b in micro_batches), torch.zeros((), dtype=torch.float64)),
             torch.tensor(float(sum(b.scored_tokens for b in micro_batches)), dtype=torch.float64)]
        ).to(self._device)  # fmt: skip
        total_weight, scored_tokens = sum_over_ranks(totals).tolist()
        self._engine.train()
        lr = self._engine.get_lr()[0]  # the engine's step moves on to that of the next one
        sums = _StepSums(self._device)
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)  # packed: another number of them every step
            with self._phase("forward_backward"):
                sums.add(self._forward_backward(micro_batch, total_weight), micro_batch)
                if is_last:
                    self._guard.check(sums.loss, [i for b in micro_batches for i in b.sample_ids], step)
            with self._phase("optimizer"):
                grad_norm = self._gradient_norm() if is_last else None
                self._engine.step()  # only counts, until the last micro-batch
        return {
            **sums.metrics(total_weight, self._config.objective.kind),
            "tokens/scored": scored_tokens,
            "grad_norm": float(self._engine.get_global_grad_norm() if grad_norm is None else grad_norm),
            "lr": lr,
        }

    def _forward_backward(self, micro_batch: TokenBatch, total_weight: float) -> DivergenceSums:
        sums: DivergenceSums = self._engine(micro_batch.to(self._device))
        # DeepSpeed averages gradients over ranks; the loss is already a share of the global mean
        scale = self._world_size / max(total_weight, 1e-30)
        self._engine.backward(sums.loss * scale, scale_wrt_gas=False)
        return sums

    def _gradient_norm(self) -> float | None:
        """DeepSpeed keeps the norm only where it shards; without sharding it is taken here, before clipping."""
        if self._engine.zero_optimization() or self._engine.fp16_enabled() or self._engine.bfloat16_enabled():
            return None
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        scaler = self._engine.torch_autocast_z0_gradscaler  # of float16: the loss, and so the gradients, are larger
        return float(torch.nn.utils.get_total_norm(gradients)) / (scaler.get_scale() if scaler else 1.0)

    # ---- evaluation

    @torch.no_grad()
    def token_divergences(
        self, micro_batches: Sequence[TokenBatch], objective: ObjectiveConfig
    ) -> list[dict[str, torch.Tensor]]:
        """See `gkd.train.module.token_divergences`."""
        self._engine.eval()
        return token_divergences(self._engine, micro_batches, objective, self._device)

    @torch.no_grad()
    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        """Natural log-probabilities of `token_ids[start:]`, each given everything before it."""
        self._engine.eval()
        batch = TokenBatch(
            input_ids=torch.tensor([token_ids]),
            score_index=torch.arange(start - 1, len(token_ids) - 1),
            labels=torch.tensor(token_ids[start:]),
            weights=torch.ones(len(token_ids) - start),
            hard_label=torch.zeros(len(token_ids) - start, dtype=torch.bool),
            sampler_logprobs=torch.full((len(token_ids) - start,), math.nan),
            sequence_index=torch.zeros(len(token_ids) - start, dtype=torch.int64),
            teacher=None,
            sample_ids=("probe",),
        )
        return self._engine(batch.to(self._device)).tolist()

    # ---- weights and state

    def weights(self) -> WeightStream:
        """What the sampler is given: every weight, or the adapter alone where it applies one itself."""
        applies_adapter = self._config.sampler_lora(self._device.type) is not None
        return self.adapter_weights() if applies_adapter else self.whole_weights()

    def whole_weights(self) -> WeightStream:
        """Every weight of the student, adapters merged; Hugging Face names."""
        return _EngineWeights(self, self._whole)

    def adapter_weights(self) -> WeightStream:
        """The adapter's weights by their names in peft's files; none without LoRA."""
        return _EngineWeights(self, self._adapter)

    def stream(self, weights: Mapping[str, LeavingWeight]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor), the parameters of one gathered at a time."""
        import deepspeed

        sharded = self._engine.zero_optimization_partition_weights()
        for name, weight in weights.items():
            gathered = deepspeed.zero.GatheredParameters(list(weight.parameters)) if sharded else nullcontext()
            with gathered:
                yield name, weight.value()

    def save_state(self, folder: str) -> None:
        self._engine.save_checkpoint(
            folder, tag="engine", save_latest=False, exclude_frozen_parameters=self._is_partly_frozen
        )

    def load_state(self, folder: str) -> None:
        self._engine.load_checkpoint(folder, tag="engine", load_module_strict=not self._is_partly_frozen)


class _EngineWeights:
    """Implements `WeightStream`."""

    def __init__(self, engine: StudentEngine, weights: Mapping[str, LeavingWeight]) -> None:
        self._engine = engine
        self._weights = weights
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.token_logprobs = engine.token_logprobs

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._engine.stream(self._weights)


class _StepSums:
    """What the micro-batches of a step add up to. No synchronisation until `metrics`."""

    def __init__(self, device: torch.device) -> None:
        def zeros(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.float64, device=device)

        self.loss = zeros(1)
        # tokens, then sums of their by-products: by teachers of whom the whole distribution is known, and by others
        self._whole, self._topk = zeros(1 + len(BYPRODUCTS)), zeros(1 + len(TOPK_BYPRODUCTS))
        self._mismatch = zeros(len(MismatchSums._fields))
        self._largest_log_ratio = zeros(1)

    def add(self, sums: DivergenceSums, batch: TokenBatch) -> None:
        self.loss += sums.loss.detach().double()
        own = self._whole if isinstance(batch.teacher, HiddenScores) else self._topk
        own[0] += batch.scored_tokens
        own[1:] += sums.byproducts.double().sum(1)
        self._mismatch += sums.mismatch
        self._largest_log_ratio = torch.maximum(self._largest_log_ratio, sums.largest_log_ratio)

    def metrics(self, total_weight: float, kind: DivergenceKind) -> dict[str, float]:
        """Of the global batch: collective."""
        parts = [self.loss, self._whole, self._topk, self._mismatch]
        joined = sum_over_ranks(torch.cat(parts)).cpu()
        loss, whole, topk, mismatch_sums = (part.tolist() for part in joined.split([len(part) for part in parts]))
        mismatch = mismatch_means(*mismatch_sums)
        if mismatch:
            mismatch["max_abs_log_ratio"] = max_over_ranks(self._largest_log_ratio.item())
        return {
            "loss": loss[0] / max(total_weight, 1e-30),
            **_measures(whole, topk, kind),
            **{f"mismatch/{name}": value for name, value in mismatch.items()},
        }


def _measures(whole: Sequence[float], topk: Sequence[float], kind: DivergenceKind) -> dict[str, float]:
    """Means a token from tokens and sums, see `_StepSums`: each over the tokens on which it was measured.

    The KLs are always plain ones, whatever the conventions of an objective of `kind`.
    """
    sums: dict[str, float] = dict(zip(BYPRODUCTS, whole[1:], strict=True))
    topk_sums: dict[str, float] = dict(zip(TOPK_BYPRODUCTS, topk[1:], strict=True))
    tokens, topk_tokens = whole[0], topk[0]
    measures = {
        metric: (sums[name] + topk_sums[name]) / max(tokens + topk_tokens, 1.0)
        for metric, name in (("entropy/student", "student_entropy"), ("agreement/top1", "top1_agreement"))
    }
    if tokens or not topk_tokens:
        measures |= {
            f"divergence/{kind}": sums["divergence"] / max(tokens, 1.0),
            "divergence/forward_kl": sums["forward_kl"] / max(tokens, 1.0),
            "divergence/reverse_kl": sums["reverse_kl"] / max(tokens, 1.0),
            "entropy/teacher": sums["teacher_entropy"] / max(tokens, 1.0),
        }
    if topk_tokens:
        measures |= {
            f"divergence/{name}": topk_sums[name] / topk_tokens for name in ("topk_forward_kl", "topk_reverse_kl")
        }
    return measures
