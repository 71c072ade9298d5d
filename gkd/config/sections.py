"""Every key of a run's config: its type, its default, its meaning, and what excludes what in its section."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from gkd.config.addresses import SAMPLER_PORT, check_addresses, refuse_server_keys
from gkd.errors import shown
from gkd.schedules import CountSchedule, largest, value_at
from gkd.schema import Section

Dtype = Literal["float32", "bfloat16", "float16"]
LayerRule = Literal["even", "divergence", "block_influence"]
DtypeOrAuto = Literal["auto", Dtype]
Droppable = Literal["developer", "tool", "system", "think"]
DROPPABLE: tuple[Droppable, ...] = get_args(Droppable)
_SET_FOR_TEMPLATES = {
    "conversation", "add_generation_prompt", "chat_template", "continue_final_message", "tokenize", "return_dict",
}  # fmt: skip


def _possible_path(text: str) -> str:
    """Refuses what makes the file system raise where it is only asked whether there is such a file."""
    if not text:
        raise PydanticCustomError("path", "expected a path or name")
    if len(text.encode()) > 4095 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise PydanticCustomError("path", "expected what a path has room for")
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise PydanticCustomError("path", "expected a home folder that there is") from None
    return text


PathText = Annotated[str, AfterValidator(_possible_path)]


def check_template_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for one that is not the template's own."""
    for name in sorted(_SET_FOR_TEMPLATES & arguments.keys()):
        raise ValueError(f"chat_template_kwargs: {name} is set by gkd")


class CollapseConfig(Section):
    """What a student that comes apart is known by."""

    steps: int = Field(20, ge=1, description="a collapse has held for so many steps together; warnings come earlier")
    first_steps: int = Field(10, ge=1, description="what later steps are compared with is the mean of so many")
    length_ratio: float = Field(2.0, gt=1.0, description="samples longer than at the start by more than this factor")
    truncated_share: float = Field(
        0.5, ge=0.0, lt=1.0, description="of the samples, cut off before an end token; together with the length"
    )
    entropy_ratio: float = Field(
        0.1,
        ge=0.0,
        lt=1.0,
        description="the student's entropy below this share of that at the start (and of half its teacher's)",
    )
    repeated_share: float = Field(
        0.5, ge=0.0, le=1.0, description="of a sample's 4-grams, repeated in it; this is only warned of"
    )


class RunConfig(Section):
    name: str = Field("run", description="name of the run; its folder is runs/<name> unless run.dir is set")
    dir: PathText | None = Field(None, description="folder of the run: metrics, samples, checkpoints, result")
    steps: int = Field(100, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="every draw of the run derives from it")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0 = never")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay on disk")
    term_grace_s: float = Field(
        20.0, ge=0.0, description="after SIGTERM: how long a rank waits for all to finish the step; then it ends"
    )
    silent_rank_s: float = Field(
        600.0, gt=0.0, description="of several ranks: one whose process has not run for so long ends the others"
    )
    stop_on: Literal["collapse"] | None = Field(
        None, description="collapse: save and stop where the student comes apart, as run.collapse says; null: warn"
    )
    collapse: CollapseConfig = CollapseConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _name_is_a_folder_name(self) -> RunConfig:
        if not re.fullmatch(r"\w[\w.-]{0,99}", self.name):
            raise ValueError(
                f"name: {shown(self.name)} must be letters, digits, '_', '-' and '.', 100 at most, as it names a folder"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.dir) if self.dir is not None else Path("runs") / self.name


class DataConfig(Section):
    train: PathText = Field(description="JSONL or Parquet file, datasets folder, or hub name")
    heldout: PathText | None = Field(None, description="the same, for evaluation")
    train_split: str = Field("train", description="split of a datasets folder or hub name")
    heldout_split: str = Field("test", description="split of a datasets folder or hub name")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is given beside the messages, e.g. {enable_thinking: false}"
    )
    max_prompt_tokens: int = Field(512, ge=1, description="longest prompt, chat template included")
    long_prompts: Literal["drop", "error"] = Field("drop", description="what happens to longer ones; counted")
    long_completions: Literal["drop", "error"] = Field(
        "drop", description="what happens to rows whose completion, if used, exceeds rollout.max_new_tokens; counted"
    )
    empty_prompts: Literal["drop", "error"] = Field("error", description="what happens to empty ones; counted")
    allow_dropped: list[Droppable] = Field(
        [], description="what the chat template may leave out of conversations: developer, tool, system, think; counted"
    )
    teacher_column: str | None = Field(
        None, description="column of the rows that names their teacher of other_teachers; without a name: teacher"
    )
    shuffle: bool = Field(True, description="a new order each epoch, fixed by the seed")

    @model_validator(mode="after")
    def _template_arguments_are_the_templates_own(self) -> DataConfig:
        check_template_arguments(self.chat_template_kwargs)
        return self


class ReplayConfig(Section):
    size: int = Field(512, ge=1, description="the student's texts that each rank keeps, the newest")
    max_age: int = Field(50, ge=1, description="steps after which a text is not trained on again")


class MixedConfig(Section):
    teacher_share: float = Field(0.2, gt=0.0, lt=1.0, description="alpha: chance of each token to be the teacher's")

    @property
    def tokens_a_turn(self) -> float:
        """Mean length by which a text grows from one time that the teacher reads it to the next."""
        return 1.0 / self.teacher_share


class SpeculativeConfig(Section):
    top_k: int = Field(25, ge=1, description="a token that is not among the teacher's so many most likely is replaced")
    block_tokens: int = Field(8, ge=1, description="that the student proposes before the teacher reads them")

    def tokens_a_turn(self, accepted_share: float) -> float:
        """As of `MixedConfig`, where each token of the student's is accepted with that chance."""
        return sum(accepted_share**place for place in range(self.block_tokens))


class RolloutConfig(Section):
    engine: Literal["vllm", "transformers"] = Field("vllm", description="which sampler; transformers is the reference")
    placement: Literal["local", "served"] = Field(
        "local", description="local = one engine a rank, in its process; served = at rollout.addresses"
    )
    addresses: list[str] | None = Field(
        None,
        description=f"served: where `gkd serve-sampler` listens, e.g. [http://127.0.0.1:{SAMPLER_PORT}]; several "
        "share the work",
    )
    token_file: PathText | None = Field(
        None, description="served: file with the servers' token; null = $GKD_SERVER_TOKEN"
    )
    max_concurrency: int = Field(64, ge=1, description="served: requests of one rank at each address at once")
    timeout_s: float = Field(300.0, gt=0.0, description="served: longest wait for a completion or a part of an update")
    retry_s: float = Field(
        300.0, ge=0.0, description="served: how long servers that fail are asked again; then the run saves and stops"
    )
    weight_transfer: Literal["auto", "file", "gloo", "nccl"] = Field(
        "auto", description="served: how weights go there; auto = as the servers were started"
    )
    staleness: int = Field(
        0, ge=0, description="served: steps that a batch is sampled ahead of training, its weights that much older"
    )
    temperature: float = Field(1.0, gt=0.0, description="of sampling; the loss has its own")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="nucleus; 1 = off")
    top_k: int = Field(0, ge=0, description="most likely tokens kept; 0 = off")
    max_new_tokens: CountSchedule = Field(
        128, description="longest completion; a number, or a schedule for those that the student samples"
    )
    samples_per_prompt: int = Field(1, ge=1, description="completions a prompt in one step")
    replay: ReplayConfig = ReplayConfig()  # pyright: ignore[reportCallIssue]  # of mixture.replay
    mixed: MixedConfig = MixedConfig()  # pyright: ignore[reportCallIssue]  # of mixture.mixed
    speculative: SpeculativeConfig = SpeculativeConfig()  # pyright: ignore[reportCallIssue]  # of mixture.speculative
    stop_token_ids: list[int] | None = Field(
        None, description="null = the end tokens of student, teachers and their chat templates"
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0.0,
        description="nats: largest mean |log-probability| difference between trainer and sampler on the probe; "
        "null = 1e-3 in float32, else by the trainer's own rounding, measured",
    )
    max_mismatch: float = Field(
        5.0,
        gt=0.0,
        description="nats: mean k3 of a step's sampled tokens, trainer against sampler, above which the run stops",
    )
    lora_sync: Literal["auto", "adapter", "merged"] = Field(
        "auto", description="a LoRA student reaches the sampler as adapter alone or merged; auto = adapter on a GPU"
    )
    max_num_seqs: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="sequences that the sampler runs at once; auto = 64 on a CPU, else all of an engine's step"
    )
    kv_cache_gib: float = Field(1.0, gt=0.0, description="key-value cache of vLLM on CPU")
    gpu_memory_utilization: Literal["auto"] | Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        "auto", description="share of a GPU for vLLM; auto = what its sequences need, of what training leaves"
    )
    enforce_eager: Literal["auto"] | bool = Field(
        "auto", description="no graph capture in vLLM: a faster start; auto = false on a GPU"
    )
    tensor_parallel: int = Field(
        1, ge=1, description="local vllm: ranks that one engine and its weights are split over; divides their number"
    )
    sleep_level: Literal["auto", 0, 1, 2] = Field(
        "auto",
        description="local vllm on a GPU: what it gives back while the student trains; 0 = nothing, 1 = its cache, and "
        "its weights wait in host memory, 2 = its cache and weights; auto = 0 unless it has too little room so",
    )

    @property
    def most_new_tokens(self) -> int:
        """The longest completion of any step."""
        return round(largest(self.max_new_tokens))

    def new_tokens_at(self, step: int) -> int:
        """The longest completion that the student samples in a step."""
        return round(value_at(self.max_new_tokens, step))

    @model_validator(mode="after")
    def _settings_fit_the_placement(self) -> RolloutConfig:
        for name, default in (("tensor_parallel", 1), ("sleep_level", 0)):
            value, where = getattr(self, name), f"{self.placement} {self.engine}"
            if value not in (default, "auto") and where != "local vllm":
                raise ValueError(
                    f"{name}: {value} is for a local vllm sampler, and this one is {where}; set it to {default}"
                )
        if self.placement == "local":
            if self.staleness:
                raise ValueError(
                    f"staleness: {self.staleness} needs a sampler that works while the trainer does; set "
                    "rollout.placement to served, or this to 0"
                )
            refuse_server_keys(self, "rollout.placement: served")
            return self
        if self.engine != "vllm":
            raise ValueError(f"engine: a served sampler is vllm, not {self.engine}; set it to vllm")
        check_addresses(self.addresses, "sampler", SAMPLER_PORT)
        return self


class OptimConfig(Section):
    lr: float = Field(1e-5, gt=0.0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0.0, description="of AdamW, on matrices only")
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False, description="of AdamW")
    eps: float = Field(1e-8, gt=0.0, description="of AdamW")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    max_grad_norm: float = Field(1.0, ge=0.0, description="clip; 0 = off")
    max_skipped_steps: int = Field(
        20, ge=1, description="float16: steps in a row left out for infinite gradients after which the run stops"
    )
    batch_size: int = Field(16, ge=1, description="sequences a step, over all ranks")
    micro_batch_size: int = Field(8, ge=1, description="sequences a forward on one rank, padded to the longest")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="tokens a forward on one rank, packed without padding, instead of micro_batch_size"
    )


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what is sharded; ignored if the JSON sets it")
    config: PathText | None = Field(None, description='a DeepSpeed JSON, passed through; its "auto" values are filled')


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="steps between held-out evaluations; 0 = before and after only")
    prompts: int = Field(32, ge=1, description="held-out prompts that the divergence is measured on")
    samples: int = Field(3, ge=0, description="held-out prompts whose answers are shown")
    resamples: int = Field(2000, ge=100, description="gkd eval: bootstrap resamples of the prompts, for the intervals")
    tasks: list[str] = Field([], description="gkd eval: tasks of reasoning-gym, such as chain_sum")
    task_problems: int = Field(32, ge=1, description="gkd eval: problems a task")
    lm_eval: list[str] = Field([], description="gkd eval: tasks of lm-eval by name, or YAML files of tasks")
    engines: list[Literal["vllm", "transformers"]] = Field(
        ["vllm", "transformers"], description="gkd eval: engines whose speed and memory are measured"
    )
    timing_batch_size: int = Field(16, ge=1, description="gkd eval: sequences at once where tokens/s are measured")
    timing_repeats: int = Field(5, ge=1, description="gkd eval: repetitions of each timing")


class LogConfig(Section):
    tensorboard: bool = Field(False, description="write TensorBoard events to the run folder")
    wandb: bool = Field(False, description="log to Weights & Biases, if installed")
    show_first_batch: bool = Field(True, description="print the first batch with its scored tokens coloured")
