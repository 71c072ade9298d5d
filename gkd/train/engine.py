"""The student on DeepSpeed: forward, divergence, backward, finite check, optimizer step, and its weights as a stream.

Legend: B rows, T positions, N scored tokens of a micro-batch.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gkd.config import Launch
from gkd.config.deepspeed import deepspeed_config, scales_loss
from gkd.config.training import TrainingSettings
from gkd.errors import CheckpointError
from gkd.models.compiled import compile_layers, warm_up
from gkd.models.leaving import LeavingWeight, adapter_weights, weight_scales, whole_weights
from gkd.models.lora import without_adapter
from gkd.objectives.objective import Objective
from gkd.seeding import derive_seed
from gkd.system_errors import memory_for
from gkd.train.batch_terms import batch_gradients
from gkd.train.deepspeed_check import deepspeed_refusals, where
from gkd.train.distributed import compute_device, sum_over_ranks
from gkd.train.gathering import whole_tensors
from gkd.train.guards import FiniteGuard, LossScaleGuard, MismatchGuard
from gkd.train.module import ObjectiveSums, StudentModule, token_measures
from gkd.train.optimizer import make_optimizer, make_schedule
from gkd.train.run_folder import write_json
from gkd.train.state_terms import StateTerms
from gkd.train.step_sums import StepSums
from gkd.train.unpickling import read_as_data
from gkd.types import HiddenScores, OutputHead, StatePairs, TokenBatch, WeightStream

_log = logging.getLogger(__name__)
_LESS_MEMORY = (
    "lower optim.micro_batch_size or micro_batch_tokens, which change no result, or objective.chunk_mib; set "
    "student.gradient_checkpointing; or shard the student (deepspeed.zero_stage)"
)
_OBJECTIVE_MEMORY = "objective.json"  # of a checkpoint: what the objective remembers of the run
Phase = Callable[[str], AbstractContextManager[None]]
Reference = Callable[[TokenBatch], HiddenScores]
Watch = Callable[[Mapping[str, object]], None]  # is told of everything that is logged of a step, in any parts


class StudentEngine:
    """Owns the DeepSpeed engine. Every method is collective: all ranks call it, with as many micro-batches each."""

    def __init__(
        self,
        model: Any,
        training: TrainingSettings,
        launch: Launch,
        *,
        valid_vocab: int,
        state_pairs: StatePairs | None = None,
        sampler_applies_adapter: bool = False,
        mismatch: MismatchGuard | None = None,
        reference: Reference | None = None,
        tasks: Sequence[str] = (),
        phase: Phase = lambda name: nullcontext(),
        watch: Watch = lambda metrics: None,
    ) -> None:
        """`reference` is the student as it was, for terms that compare with it; None: below the adapter of this one.
        `tasks`: what rows' tasks are called, where metrics are split by them."""
        import deepspeed

        self._objective, self._tasks = training.objective, tasks
        self._reference = reference or self._below_adapter
        self._sampler_applies_adapter = sampler_applies_adapter
        self._device = compute_device(launch)
        self._world_size, self._is_main = launch.world_size, launch.is_main
        self._phase, self._watch = phase, watch
        settings = deepspeed_config(training, launch.world_size)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._whole = whole_weights(model)
        self._adapter, self._scales = adapter_weights(model), weight_scales(model)
        # what is frozen is in the student's own folder, and in no checkpoint
        self._is_partly_frozen = not all(parameter.requires_grad for parameter in model.parameters())
        self._memory = training.objective.memory()
        state_terms = StateTerms(state_pairs, training.seed) if state_pairs else None
        module = StudentModule(model, valid_vocab, getattr(torch, training.dtype), state_terms)
        optimizer = None if "optimizer" in settings else make_optimizer(module, training.optim)
        schedule: Any = None  # a function, as it may be DeepSpeed that makes the optimizer
        if "scheduler" not in settings:
            schedule = partial(make_schedule, config=training.optim, steps=training.steps)
        file = training.deepspeed.config
        with deepspeed_refusals(where(file)) if file is not None else nullcontext():
            self._engine: Any = deepspeed.initialize(
                model=module,
                model_parameters=[p for p in module.parameters() if p.requires_grad],  # pyright: ignore
                optimizer=optimizer,
                lr_scheduler=schedule,
                config=settings,
                dist_init_required=False,
            )[0]
        if training.compile:
            self._compile(model, training, settings)
        self._finite = FiniteGuard(module, enabled=not scales_loss(settings))
        self._mismatch = mismatch or MismatchGuard()
        self._loss_scale = LossScaleGuard(training.optim.max_skipped_steps, training.steps)

    def _compile(self, model: Any, training: TrainingSettings, settings: dict[str, Any]) -> None:
        """After DeepSpeed has changed dtypes and devices, and before anything watches gradients."""
        compile_layers(model, "student.compile")
        autocast = getattr(torch, training.dtype) if settings.get("torch_autocast", {}).get("enabled") else None
        seconds = warm_up(model, training.optim.micro_batch_size, training.longest_sequence, autocast)
        _log.info(
            "student.compile: the layers took %.0f s to compile; a later start finds them in torch's cache", seconds
        )

    # ---- training

    def step(self, micro_batches: Sequence[TokenBatch], step: int) -> dict[str, float]:
        """One optimizer step on this rank's share of the global batch; returns metrics of the global batch.

        The loss is the sum over terms and scored tokens of weight x value, over ALL ranks and micro-batches, divided by
        the number of these tokens (of sequences, for "sequence_mean"), which is counted before the first backward; of
        a term about the whole batch it is weight x value. How the batch is split cannot matter. Raises
        StepRefusedError on all ranks: before the optimizer steps if a loss or gradient is not finite or the sampler is
        too far from the trainer, or if float16 leaves out step after step.
        """
        objective = self._objective.at(step, self._memory)
        counts = torch.tensor([self._denominator(micro_batches), sum(b.scored_tokens for b in micro_batches)])
        denominator, scored_tokens = sum_over_ranks(counts.double().to(self._device)).tolist()
        self._engine.train()
        lr = self._engine.get_lr()[0]  # the engine's step moves on to that of the next one
        sums = StepSums(objective, self._device, self._tasks)
        gradients: Sequence[torch.Tensor | None] = [None] * len(micro_batches)
        if objective.batch_terms:
            with self._phase("forward_backward"):
                gradients = self._batch_terms(micro_batches, objective, denominator, step, sums)
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)  # packed: another number of them every step
            with self._phase("forward_backward"):
                micro_batch = self._with_reference(micro_batch, objective)
                _seed_dropout(step, index)
                sums.add(self._forward_backward(micro_batch, objective, denominator, gradients[index]), micro_batch)
                if is_last:
                    self._finite.check(sums.loss, [i for b in micro_batches for i in b.sample_ids], step)
                    measured = sums.metrics(denominator)
                    self._mismatch.check(measured.get("mismatch/k3", 0.0), step)  # none if nothing was sampled
            with self._phase("optimizer"):
                grad_norm = self._gradient_norm() if is_last else None
                self._engine.step()  # only counts, until the last micro-batch
        if grad_norm is None:
            grad_norm = float(self._engine.get_global_grad_norm())
        self._loss_scale.check(grad_norm, step)
        metrics = {
            **measured,
            **{f"objective/{name}/weight": w for name, w in self._objective.weights_at(step, self._memory).items()},
            **self._objective.rule_metrics(self._memory),
            "objective/temperature": objective.temperature,
            "tokens/scored": scored_tokens,
            "grad_norm": grad_norm,
            "lr": lr,
        }
        self.observe(metrics)
        return metrics

    def observe(self, metrics: Mapping[str, object]) -> None:
        """What is logged of a step, the same on all ranks: for schedules and rules that follow it."""
        self._memory.observe(metrics)
        self._watch(metrics)

    def _denominator(self, micro_batches: Sequence[TokenBatch]) -> int:
        """This rank's part of what the loss is divided by."""
        if self._objective.reduction == "token_mean":
            return sum(batch.scored_tokens for batch in micro_batches)
        return sum(length > 0 for batch in micro_batches for length in batch.completion_lengths)

    def _batch_terms(
        self, micro_batches: Sequence[TokenBatch], objective: Objective, denominator: float, step: int, sums: StepSums
    ) -> list[torch.Tensor]:
        """What the sums' gradients get of each micro-batch's vectors. One forward more."""

        def vectors_of(index: int, micro_batch: TokenBatch) -> torch.Tensor:
            _seed_dropout(step, index)
            with memory_for("forward of a micro-batch", _LESS_MEMORY):
                return self._engine(micro_batch.to(self._device), None, only_vectors=True)

        found = batch_gradients(vectors_of, micro_batches, objective)
        sums.add_batch(found, denominator / self._world_size)
        return [gradient * denominator for gradient in found.gradients]

    def _with_reference(self, micro_batch: TokenBatch, objective: Objective) -> TokenBatch:
        """With what the student as it was says of the scored tokens, where a term asks. Collective."""
        if not objective.needs_reference:
            return micro_batch
        micro_batch = micro_batch.to(self._device)
        with memory_for("forward of the initial student", _LESS_MEMORY):
            return replace(micro_batch, reference=self._reference(micro_batch))

    def _below_adapter(self, micro_batch: TokenBatch) -> HiddenScores:
        """The head is frozen, and gathered where the module uses it."""
        states = self._states(micro_batch, with_adapter=False)
        self._engine.train()
        head = self._engine.module.objective_head.own_head()
        return HiddenScores(states.flatten(0, 1)[micro_batch.score_index], head)

    def _forward_backward(
        self, micro_batch: TokenBatch, objective: Objective, denominator: float, vector_gradients: torch.Tensor | None
    ) -> ObjectiveSums:
        # DeepSpeed averages gradients over ranks; the loss is already a share of the global mean
        scale = self._world_size / max(denominator, 1e-30)
        with memory_for("forward and backward of a micro-batch", _LESS_MEMORY):
            sums: ObjectiveSums = self._engine(
                micro_batch.to(self._device), objective, vector_gradients=vector_gradients
            )
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
    def token_measures(
        self, micro_batches: Sequence[TokenBatch], objective: Objective
    ) -> list[dict[str, torch.Tensor]]:
        """See `gkd.train.module.token_measures`."""
        self._engine.eval()
        return token_measures(self._engine, micro_batches, objective, self._device)

    def token_logprobs(self, token_ids: Sequence[int], start: int) -> list[float]:
        """Natural log-probabilities of `token_ids[start:]`, each given everything before it."""
        return self._logprobs(token_ids, start, is_exact=False)

    def exact_logprobs(self, token_ids: Sequence[int], start: int) -> list[float] | None:
        """The same in float32; None where weights are in another dtype."""
        if any(parameter.dtype != torch.float32 for parameter in self._engine.module.parameters()):
            return None
        return self._logprobs(token_ids, start, is_exact=True)

    @torch.no_grad()
    def _logprobs(self, token_ids: Sequence[int], start: int, *, is_exact: bool) -> list[float]:
        self._engine.eval()
        batch = TokenBatch(
            input_ids=torch.tensor([token_ids]),
            score_index=torch.arange(start - 1, len(token_ids) - 1),
            labels=torch.tensor(token_ids[start:]),
            weights=torch.ones(len(token_ids) - start),
            sampler_logprobs=torch.full((len(token_ids) - start,), math.nan),
            sequence_index=torch.zeros(len(token_ids) - start, dtype=torch.int64),
            teacher=None,
            sample_ids=("probe",),
            sources=("probe",),
            completion_lengths=(len(token_ids) - start,),
        )
        return self._engine(batch.to(self._device), None, is_exact=is_exact).tolist()

    # ---- as its own teacher

    def hidden_states(self, input_ids: torch.Tensor, *, with_adapter: bool = True) -> torch.Tensor:
        """What the output head reads, [B, T, H]; `with_adapter` False: as the student was before training."""
        return self._states(_unscored(input_ids), with_adapter=with_adapter)

    @torch.no_grad()
    def _states(self, batch: TokenBatch, *, with_adapter: bool) -> torch.Tensor:
        """Of a batch, padded or packed as it is. Leaves the engine ready to evaluate."""
        self._engine.eval()
        unscored = _unscored(batch.input_ids, batch.sequence_lengths)
        with nullcontext() if with_adapter else without_adapter(self._engine.module):
            return self._engine(unscored.to(self._device), None, only_states=True)

    @torch.no_grad()
    def output_head(self) -> OutputHead:
        """The student's, as it is until the next step: whole, of sharded weights a copy. Collective."""
        import deepspeed

        head: OutputHead = self._engine.module.objective_head.own_head()
        parameters = [part for part in (head.weight, head.bias) if part is not None]
        if not self._engine.zero_optimization_partition_weights():
            copies = [part.detach() for part in parameters]
        else:
            with deepspeed.zero.GatheredParameters(parameters):
                copies = [part.detach().clone() for part in parameters]
        return replace(head, weight=copies[0], bias=copies[1] if len(copies) > 1 else None)

    # ---- weights and state

    def weights(self) -> WeightStream:
        """What the sampler is given: every weight, or the adapter alone where it applies one itself."""
        return self.adapter_weights() if self._sampler_applies_adapter else self.whole_weights()

    def whole_weights(self) -> WeightStream:
        """Every weight of the student, adapters merged; Hugging Face names."""
        return _EngineWeights(self, self._whole)

    def adapter_weights(self) -> WeightStream:
        """The adapter's weights by their names in peft's files; none without LoRA."""
        return _EngineWeights(self, self._adapter)

    def weight_scales(self) -> WeightStream:
        """Of quantized weights, by these' names; none without student.quantize."""
        return _EngineWeights(self, self._scales)

    def stream(self, weights: Mapping[str, LeavingWeight]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor), gathered in buckets where sharded. A tensor may be gone once the next is asked for."""
        return whole_tensors(weights, self._device)

    def save_state(self, folder: str) -> None:
        self._engine.save_checkpoint(
            folder, tag="engine", save_latest=False, exclude_frozen_parameters=self._is_partly_frozen
        )
        if self._is_main:
            write_json(Path(folder) / _OBJECTIVE_MEMORY, self._memory.saved())

    def load_state(self, folder: str) -> None:
        """Raises CheckpointError if DeepSpeed's files hold more than data, or are not all there."""
        with read_as_data(folder):
            found, _ = self._engine.load_checkpoint(folder, tag="engine", load_module_strict=not self._is_partly_frozen)
        if found is None:
            raise CheckpointError(f"{folder}: DeepSpeed finds nothing to load in it")
        self._memory.restore(json.loads((Path(folder) / _OBJECTIVE_MEMORY).read_text(encoding="utf-8")))


def _unscored(input_ids: torch.Tensor, sequence_lengths: tuple[int, ...] | None = None) -> TokenBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return TokenBatch(
        input_ids=input_ids,
        score_index=nothing,
        labels=nothing,
        weights=torch.zeros(0),
        sampler_logprobs=torch.zeros(0),
        sequence_index=nothing,
        teacher=None,
        sample_ids=(),
        sources=(),
        completion_lengths=(),
        sequence_lengths=sequence_lengths,
    )


def _seed_dropout(step: int, index: int) -> None:
    """If the student has any: the same in each forward of a micro-batch, and after a resume."""
    torch.manual_seed(derive_seed(step, "dropout", index))


class _EngineWeights:
    """Implements `WeightStream`."""

    def __init__(self, engine: StudentEngine, weights: Mapping[str, LeavingWeight]) -> None:
        self._engine = engine
        self._weights = weights
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.token_logprobs, self.exact_logprobs = engine.token_logprobs, engine.exact_logprobs

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._engine.stream(self._weights)
