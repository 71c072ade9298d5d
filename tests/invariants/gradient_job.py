"""One optimizer step of plain SGD on a fixed ragged batch, under every split asked for; run by torchrun or alone.

python gradient_job.py OUT.safetensors MODEL_FOLDER TEACHER_FOLDER '[[split, zero_stage], ...]' '{"name": objective}'
    [WIDE_TEACHER_FOLDER '{"name": objective}']

A split is a micro-batch size, or "60 tokens": packed.

A file quantize.json in MODEL_FOLDER holds what student.quantize is.

Writes, for each objective and split, every parameter's gradient, recovered as (old - new) / lr. The last two arguments
are another teacher, and the objectives that it teaches.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gkd.config import Launch, QuantizeConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import (
    Quantization,
    load_causal_lm,
    model_shape,
    quantization_targets,
    quantize_linear,
    use_packed_attention,
)
from gkd.models.leaving import LeavingWeight
from gkd.teacher.conversations import OfTurns
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.train.reference import InitialStudent
from gkd.train.reward_groups import with_reward_groups
from gkd.types import Conversation, Prompt, PromptDraw, Rollout

BATCH = 8
LR = 1e3  # large, so that new - old keeps the gradient's digits
MEASURED = ("loss", "grad_norm", "tokens/scored", "mismatch/k3")
LENGTHS = [(5, 30), (9, 1), (3, 17), (20, 2), (4, 44), (12, 8), (7, 0), (2, 23)]  # prompt, completion tokens


def ragged_rollouts() -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    rollouts: list[Rollout] = []
    for index, (prompt, completion) in enumerate(LENGTHS):
        ids = torch.randint(3, 259, (prompt + completion,), generator=generator).tolist()
        draw = PromptDraw(Prompt(index, tuple(ids[:prompt]), "", None), 0)
        source = "mixed" if index == 7 else "dataset" if index % 3 == 2 else "student"
        share = 0.3 if source == "mixed" else 0.0
        rollouts.append(Rollout(draw, source, tuple(ids[prompt:]), teacher_share=share))
    return rollouts


OBSERVED = {0: ((7, 12), (20, 21)), 4: ((1, 40),), 5: ((2, 4),), 7: ((10, 20),)}  # of which completions, and where


def in_turns(rollouts: list[Rollout]) -> list[Rollout]:
    """As if some of them were conversations."""
    return [
        replace(rollout, conversation=Conversation(OBSERVED[index], len(OBSERVED[index]) + 1, "done"))
        if index in OBSERVED
        else rollout
        for index, rollout in enumerate(rollouts)
    ]


def own_places(rollout: Rollout) -> list[int]:
    """Of its tokens, those that the student wrote."""
    observed = () if rollout.conversation is None else rollout.conversation.observed
    return [i for i in range(len(rollout.completion_ids)) if not any(start <= i < end for start, end in observed)]


REWARDS = {0: 1.0, 1: 0.0, 3: 0.5, 4: 2.0, 6: 0.25}  # of which completions; those of a prompt are on several ranks


def judged(rollouts: list[Rollout]) -> list[Rollout]:
    """As if they were samples of three prompts, and some had been judged."""
    return [
        replace(
            rollout, draw=PromptDraw(replace(rollout.draw.prompt, index=index % 3), index), reward=REWARDS.get(index)
        )
        for index, rollout in enumerate(rollouts)
    ]


def rollouts_for(objective: str) -> list[Rollout]:
    rollouts = weighed(ragged_rollouts())
    rollouts = in_turns(rollouts) if objective.startswith("conversations") else rollouts
    return judged(rollouts) if "judged" in objective else rollouts


def weighed(rollouts: list[Rollout]) -> list[Rollout]:
    """As if the data gave its rows weights, one of them 0."""
    weights = (1.0, 2.0, 0.0, 0.25, 1.5, 0.5, 1.0, 1.0)
    prompts = [replace(r.draw.prompt, weight=weight) for r, weight in zip(rollouts, weights, strict=True)]
    return [replace(r, draw=replace(r.draw, prompt=prompt)) for r, prompt in zip(rollouts, prompts, strict=True)]


def with_sampler_logprobs(rollouts: list[Rollout], model: Any) -> list[Rollout]:
    """As if a sampler with slightly other weights had drawn the student's, and the teacher every third mixed token."""
    generator = torch.Generator().manual_seed(1)
    found: list[Rollout] = []
    for rollout in rollouts:
        noise = torch.randn(len(rollout.completion_ids), generator=generator, dtype=torch.float64) * 0.3
        if rollout.source != "dataset":
            ids = torch.tensor([rollout.token_ids])
            with torch.no_grad():
                logprobs = model(ids).logits[0].double().log_softmax(-1)[:-1]
            own = logprobs.gather(-1, ids[0, 1:, None])[len(rollout.draw.prompt.token_ids) - 1 :, 0]
            if rollout.source == "mixed":
                noise[::3] = torch.nan
            rollout = replace(rollout, logprobs=tuple((own + noise)[own_places(rollout)].tolist()))
        found.append(rollout)
    return found


def shaken(model: Any) -> Any:
    """Slightly other weights, as a student's were before its training: the same in any dtype."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.float().std()
            parameter.add_(noise.to(parameter.dtype))
    return model


def run_split(
    model: str, teacher_model: Any, split: int | str, stage: int, name: str, objective: dict[str, Any], launch: Launch
) -> Any:
    folder = Path(sys.argv[1]).parent
    sgd = folder / f"sgd{launch.rank}.json"
    sgd.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": LR}}}))
    packed = isinstance(split, str)
    size = {"micro_batch_tokens": int(split.split()[0])} if packed else {"micro_batch_size": split}
    training = TrainingSettings.model_validate(
        {
            "objective": objective,
            "optim": {"batch_size": BATCH, "max_grad_norm": 0.0, **size},
            "deepspeed": {"config": str(sgd), "zero_stage": stage},
        }
    )
    student, before = load_causal_lm(model, "float32"), shaken(load_causal_lm(model, "float32"))
    if (asked := Path(model) / "quantize.json").exists():
        quantize = QuantizeConfig.model_validate_json(asked.read_text())
        quantize_linear(student, quantization_targets(student, quantize), Quantization.of(quantize, torch.float32))
    rollouts = with_sampler_logprobs(rollouts_for(name), student)
    if packed:
        use_packed_attention(student, "optim.micro_batch_tokens")
        use_packed_attention(before, "optim.micro_batch_tokens")
    shapes = (model_shape(student.config, "student.model"), model_shape(teacher_model.config, "teacher.model"))
    pairs = training.objective.state_pairs(*shapes)
    engine = StudentEngine(
        student, training, launch, valid_vocab=259, state_pairs=pairs, reference=InitialStudent(before)
    )
    old = {name: tensor.clone() for name, tensor in all_weights(engine)}
    teacher = OfTurns(
        LocalTeacher(
            teacher_model,
            device=torch.device("cpu"),
            micro_batch_size=4,
            pad_token_id=0,
            state_places={pair.teacher: pair.teacher_width for own in pairs.values() for pair in own},
        )
    )
    mine = rollouts[launch.rank :: launch.world_size]
    mine = with_reward_groups(mine)
    scores = teacher.score(mine)
    batches = pack(
        mine,
        scores,
        micro_batch_size=training.optim.micro_batch_size,
        micro_batch_tokens=training.optim.micro_batch_tokens,
        agree_on_largest=distributed.largest_count,
        pad_token_id=0,
        reduction=training.objective.reduction,
    )
    stats = engine.step(batches, step=0)
    gradients = {name: (old[name] - tensor) / LR for name, tensor in all_weights(engine)}
    return gradients, stats


def all_weights(engine: StudentEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """The student's, as the optimizer has them, and those of projectors, which do not leave the trainer otherwise."""
    module = engine._engine.module  # pyright: ignore[reportPrivateUsage]
    own = dict(module.model.named_parameters())
    own |= {} if module.state_terms is None else dict(module.state_terms.named_parameters())
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in own.items()}
    yield from engine.stream({name: LeavingWeight(shapes[name], (p,), lambda whole: whole) for name, p in own.items()})


def main() -> None:
    out, model, teacher_folder, splits, objectives, *wide = sys.argv[1:]
    launch = Launch.from_environment()
    distributed.initialize(launch)
    results: dict[str, torch.Tensor] = {}
    for folder, taught in ((teacher_folder, objectives), *([tuple(wide)] if wide else [])):
        teacher = load_causal_lm(folder, "float32")
        for (name, objective), (split, stage) in itertools.product(json.loads(taught).items(), json.loads(splits)):
            gradients, stats = run_split(model, teacher, split, stage, name, objective, launch)
            key = f"{name}/{split}/{stage}"
            results |= {f"{key}/{parameter}": gradient.contiguous() for parameter, gradient in gradients.items()}
            measured = {n: v for n, v in stats.items() if n in MEASURED or "objective" in n}
            results |= {f"{key}: {n}": torch.tensor(v, dtype=torch.float64) for n, v in measured.items()}
    if launch.is_main:
        save_file(results, out)
    distributed.end_process()


if __name__ == "__main__":
    main()
