"""TRL's side: its two trainers of on-policy distillation, timed from outside.

What is set for speed: fused AdamW, no gradient checkpointing, a key-value cache, no logging, evaluation or checkpoints,
no worker processes, transformers' fastest attention here (SDPA, its default). What `options` choose are the settings
that are not obviously faster one way: see tuning.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore
from trl.experimental.gkd import GKDConfig, GKDTrainer

from benchmarks.records import read_json
from benchmarks.runs.versus_trl.job import Job, Stopwatch, Work, check_same_work
from gkd.models import resolve_model

TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}  # its one formula is a KL at its ends; between them beta is gkd's


class TimedDistillationTrainer(DistillationTrainer):
    """Samples for a whole step at once; the loss makes logits tile by tile, the teacher's among them."""

    stopwatch: Stopwatch
    seen_prompts: list[list[int]]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        prompt_ids, *rest = super()._tokenize_prompts(prompts)
        self.seen_prompts += prompt_ids
        return prompt_ids, *rest

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.stopwatch.part("sampling"):
            completions = super()._generate_single_turn(*args, **kwargs)
        self.stopwatch.add_tokens(sum(len(ids) for ids in completions))
        return completions


class TimedGkdTrainer(GKDTrainer):
    """Samples in every micro-batch; the loss is made of both models' whole logits.

    Its loss has no temperature (`compute_loss` passes none on), so the benchmark's is 1.
    """

    stopwatch: Stopwatch
    seen_prompts: list[list[int]]

    def generate_on_policy_outputs(self, model: Any, inputs: Any, generation_config: Any) -> Any:  # pyright: ignore
        prompts, masks = inputs["prompts"].tolist(), inputs["prompt_attention_mask"].tolist()
        self.seen_prompts += [ids[mask.index(1) :] for ids, mask in zip(prompts, masks, strict=True)]
        with self.stopwatch.part("sampling"):
            made = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
        self.stopwatch.add_tokens(int((made[2] != -100).sum()))
        return made


class StepTimer(TrainerCallback):
    """A step is all from the end of the one before it to its own end, the data loader included."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._stopwatch.restart()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._stopwatch.finish_step()


def run(job: Job) -> dict[str, Any]:
    """Trains and saves the student; returns the steps' times. Raises RuntimeError if the work was not the same."""
    work, options = job.work, job.options
    prepared = read_json(work.prepared / "prepared.json")
    dtype = torch.bfloat16 if options["precision"] == "bfloat16" else torch.float32
    student: Any = AutoModelForCausalLM.from_pretrained(work.student, dtype=dtype)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder(work), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(work.student)
    make = make_distillation if options["trainer"] == "distillation" else make_gkd
    trainer = make(work, options, student, teacher, tokenizer, prepared["prompts"])
    trainer.stopwatch = Stopwatch(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
    trainer.seen_prompts = []
    time_scoring(teacher.base_model if options["trainer"] == "distillation" else teacher, trainer.stopwatch)
    trainer.add_callback(StepTimer(trainer.stopwatch))
    trainer.train()
    check_same_work(trainer.seen_prompts, trainer.generation_config.eos_token_id, work, prepared)
    folder = Path(options["folder"]) / "final"
    student.to(torch.bfloat16).save_pretrained(folder)  # what gkd saves too
    tokenizer.save_pretrained(folder)
    return {"steps": trainer.stopwatch.steps, "student": str(folder)}


def teacher_folder(work: Work) -> str:
    return resolve_model(work.teacher, key="teacher.model")


def shared_arguments(work: Work, options: dict[str, Any]) -> dict[str, Any]:
    """Of `transformers.TrainingArguments`: gkd's config in its words, and whatever would cost time switched off."""
    return {
        "output_dir": options["folder"],
        "per_device_train_batch_size": options["micro_batch_size"],
        "gradient_accumulation_steps": work.batch_size // options["micro_batch_size"],
        "max_steps": work.steps,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "adam_beta1": work.betas[0],
        "adam_beta2": work.betas[1],
        "adam_epsilon": work.eps,
        "weight_decay": work.weight_decay,
        "max_grad_norm": work.max_grad_norm,
        "bf16": options["precision"] == "autocast",
        "gradient_checkpointing": False,
        "seed": options["seed"],
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "temperature": 1.0,
        "beta": TRL_BETA.get(work.kind, work.beta),
    }


def make_distillation(
    work: Work, options: dict[str, Any], student: Any, teacher: Any, tokenizer: Any, prompts: list[Any]
) -> Any:
    arguments = DistillationConfig(
        **shared_arguments(work, options),
        max_completion_length=work.max_new_tokens,
        shuffle_dataset=False,
        use_vllm=options["vllm"],
        vllm_mode="colocate",
        vllm_max_model_length=work.max_prompt_tokens + work.max_new_tokens,
    )
    dataset = Dataset.from_dict({"prompt": [prompt["messages"] for prompt in prompts]})
    return TimedDistillationTrainer(student, teacher, args=arguments, train_dataset=dataset, processing_class=tokenizer)


def make_gkd(
    work: Work, options: dict[str, Any], student: Any, teacher: Any, tokenizer: Any, prompts: list[Any]
) -> Any:
    """With lambda = 1 the data set's completions are replaced by samples.

    They must be there all the same: the trainer divides the loss by the number of THEIR tokens, counted before it
    samples. As many as a completion may have make that nearly the right number.
    """
    arguments = GKDConfig(
        **shared_arguments(work, options),
        max_new_tokens=work.max_new_tokens,
        lmbda=1.0,
        train_sampling_strategy="sequential",
    )
    stand_in = [tokenizer.eos_token_id] * work.max_new_tokens
    rows = [
        {
            "prompt": "",  # its collator wants the key, and reads the token ids
            "input_ids": prompt["ids"] + stand_in,
            "completion_mask": [0] * len(prompt["ids"]) + [1] * len(stand_in),
        }
        for prompt in prompts
    ]
    return TimedGkdTrainer(
        student, teacher, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def time_scoring(module: torch.nn.Module, stopwatch: Stopwatch) -> None:
    """Counts the module's forward passes as scoring: the teacher's layers, for GKDTrainer its logits too."""
    parts: list[Any] = []

    def enter(*_: Any) -> None:
        parts.append(stopwatch.part("scoring"))
        parts[-1].__enter__()

    def leave(*_: Any) -> None:
        parts.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
