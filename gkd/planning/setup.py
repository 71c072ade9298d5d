"""Everything that memory and time depend on, as plain numbers taken from a run's config and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gkd.chunks import loss_chunk_bytes
from gkd.config import MAIN_TEACHER, Config, known
from gkd.config.deepspeed import deepspeed_config
from gkd.config.training import TrainingSettings
from gkd.errors import ConfigError
from gkd.planning.devices import Device
from gkd.planning.models import DTYPE_BYTES, Architecture
from gkd.registry import SOURCES
from gkd.schedules import largest
from gkd.types import ModelShape

ACCEPTED_SHARE = 0.9  # ASSUMPTION: of the tokens that a student proposes to a speculating teacher
# unasked: no term of the objective needs a teacher; student: it is its own; mean: the mean of its weights is
Placement = Literal["local", "sharded", "served", "unasked", "student", "mean"]


@dataclass(frozen=True)
class Setup:
    """A run on `devices` equal training devices, one rank each; what is served has further devices of its own."""

    student: Architecture
    teacher: Architecture
    device: Device
    devices: int
    batch_size: int  # sequences a step, over all ranks
    micro_batch_size: int
    packed: bool  # micro-batches of so many of the longest sequences' tokens, without padding
    scoring_micro_batch_size: int
    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    half_weights: bool  # weights kept in half precision with a float32 copy, rather than autocast over float32
    checkpointing: bool
    student_dtype: str
    teacher_dtype: str
    max_prompt_tokens: int
    max_new_tokens: int
    prompt_tokens: float  # mean
    completion_tokens: float  # mean
    teacher_prompt_share: float  # tokens that the teacher reads before a completion, by those of the student's prompt
    student_share: float  # of the completions that the student samples (lambda)
    sends_weights: bool  # to the sampler after a step, as some step asks it
    vllm: bool
    sampler_sequences: int  # at most, at once
    sampler_memory_share: float  # of a training GPU, reserved by vLLM
    kv_cache_bytes: float  # of vLLM on a CPU
    decode_overhead_s: float  # the sampler's own time a step
    chunk_bytes: float
    head_products: tuple[int, int] = (1, 1)  # student's and teacher's, before the backward pass
    teacher_placement: Placement = "local"
    teacher_devices: int = 0  # of a served teacher; others have none of their own
    sampler_devices: int = 1  # that one sampler is split over
    sleep_level: int = 0  # of a local sampler while the student trains
    sampler_replicas: int = 0  # servers of a served sampler, a device each; 0: every rank has a sampler of its own
    staleness: int = 0  # steps that a served sampler works ahead of training
    adapter_parameters: int = 0  # of LoRA, beside a frozen student; 0: all of the student is trained
    sampler_applies_adapter: bool = False  # and is sent nothing else; otherwise merged weights
    extra_forwards: int = 0  # of the student in a step, or of the initial one, without a gradient
    needs_reference: bool = False  # the initial student beside the student, whose weights it has below its adapter
    together_share: float = 0.0  # of the completions that student and teacher draw together; in `student_share`
    teacher_turns: float = 0.0  # times that the teacher reads such a text while it is sampled
    proposed_share: float = 1.0  # tokens that the student draws for one of such a text
    projector_parameters: int = 0  # learned by terms beside the student
    state_widths: tuple[int, int] = (0, 0)  # of layers' states that the teacher gives: a scored token, any token
    settled_lines: tuple[str, ...] = field(default=(), compare=False)  # what auto became and why, and what is slow

    @property
    def longest_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def mean_tokens(self) -> float:
        """Prompt and completion of a mean sequence."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def teacher_longest_tokens(self) -> float:
        """As `longest_tokens`, of what the teacher reads."""
        return self.teacher_prompt_share * self.max_prompt_tokens + self.max_new_tokens

    @property
    def teacher_mean_tokens(self) -> float:
        """As `mean_tokens`, of what the teacher reads."""
        return self.teacher_prompt_share * self.prompt_tokens + self.completion_tokens

    @property
    def local_sequences(self) -> float:
        """Sequences of a step on one rank."""
        return self.batch_size / self.devices

    @property
    def sampled_sequences(self) -> float:
        """Sequences of a step that one sampler completes, on average; at least one if it has any."""
        samplers = self.sampler_replicas or self.devices
        return max(1.0, self.batch_size / samplers * self.student_share) if self.student_share else 0.0

    @property
    def together_sequences(self) -> float:
        """Sequences of a step on one rank that student and teacher draw together."""
        return self.local_sequences * self.together_share

    @property
    def scored_tokens(self) -> float:
        """Of a step, over all ranks: only completions are scored."""
        return self.batch_size * self.completion_tokens

    @property
    def accumulation(self) -> float:
        """Micro-batches a step on one rank."""
        return self.local_sequences / self.micro_batch_size

    @property
    def all_devices(self) -> int:
        return self.devices + self.teacher_devices + self.sampler_replicas

    @property
    def trained_parameters(self) -> int:
        return (self.adapter_parameters or self.student.parameters) + self.projector_parameters

    @property
    def held_parameters(self) -> int:
        """Of the student, with LoRA's."""
        return self.student.parameters + self.adapter_parameters

    @property
    def frozen_bytes(self) -> float:
        """Of the whole student under LoRA: frozen weights are kept in the dtype of compute."""
        return float(self.student.parameters * DTYPE_BYTES[self.student_dtype]) if self.adapter_parameters else 0.0

    @property
    def reference_bytes(self) -> float:
        """Of the initial student's weights, whole on each rank; below an adapter they are there already."""
        has_its_own = self.needs_reference and not self.adapter_parameters
        return float(self.student.parameters * DTYPE_BYTES[self.student_dtype]) if has_its_own else 0.0

    @property
    def sleeps(self) -> bool:
        """Whether a sampler beside the student gives its memory back while that trains."""
        return self.sleep_level > 0 and self.vllm and not (self.device.is_cpu or self.sampler_replicas)

    @property
    def sampler_weights_bytes(self) -> float:
        """Of one sampler's share on each of its devices."""
        return self.student.parameters * DTYPE_BYTES[self.student_dtype] / self.sampler_devices

    @property
    def waiting_bytes(self) -> float:
        """Of `sampler_weights_bytes` what waits in host memory while the sampler sleeps; level 2 keeps nothing."""
        return self.sampler_weights_bytes if self.sleeps and self.sleep_level == 1 else 0.0

    @property
    def autocast(self) -> bool:
        return self.student_dtype != "float32" and not self.half_weights

    @property
    def teacher_bytes(self) -> float:
        """The whole teacher's weights."""
        return float(self.teacher.parameters * DTYPE_BYTES[self.teacher_dtype])


def setup_of(
    config: Config,
    student: Architecture,
    teacher: Architecture,
    device: Device,
    devices: int,
    *,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
    teacher_placement: Placement = "local",
    teacher_devices: int = 0,
    sampler_replicas: int | None = None,
    settled_lines: tuple[str, ...] = (),
) -> Setup:
    """Of a settled config. `sampler_replicas`: servers of a served sampler; None: as many as the config has addresses.

    Raises ConfigError for a batch that does not divide, or lengths beyond the config's limits.
    """
    config.check_world_size(devices)
    settings = deepspeed_config(TrainingSettings.of(config), devices)
    zero = settings["zero_optimization"]
    offload = [_offloads(zero, name) for name in ("offload_optimizer", "offload_param")]
    if any(offload) and zero["stage"] == 0:
        raise ConfigError("deepspeed.config: zero_optimization offloads, which needs a stage of at least 1")
    chunk_mib = config.objective.chunk_mib
    if sampler_replicas is None:
        sampler_replicas = len(config.rollout.addresses or ())
    lora = config.student.lora
    projectors, state_widths = _states(config, student, teacher)
    completion = _mean("--completion-tokens", completion_tokens, config.rollout.most_new_tokens, 1.0)
    together_share, teacher_turns, proposed_share = _together(config, completion)
    asks_teacher = config.objective.needs_teacher or together_share > 0
    return Setup(
        student=student,
        teacher=teacher,
        device=device,
        devices=devices,
        batch_size=config.optim.batch_size,
        micro_batch_size=_micro_batch_size(config),
        packed=config.optim.micro_batch_tokens is not None,
        scoring_micro_batch_size=config.teacher.micro_batch_size,
        zero_stage=zero["stage"],
        offload_optimizer=offload[0],
        offload_parameters=offload[1],
        half_weights=any(settings.get(name, {}).get("enabled") for name in ("bf16", "fp16")),
        checkpointing=config.student.gradient_checkpointing,
        student_dtype=config.student.dtype,
        teacher_dtype=config.teacher.dtype,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_new_tokens=config.rollout.most_new_tokens,
        prompt_tokens=_mean("--prompt-tokens", prompt_tokens, config.data.max_prompt_tokens, 0.5),
        completion_tokens=completion,
        teacher_prompt_share=config.longest_prompt_of(MAIN_TEACHER)[0] / config.data.max_prompt_tokens,
        student_share=_sampled_share(config),
        sends_weights=config.mixture.ever_asks_sampler,
        vllm=config.rollout.engine == "vllm",
        sampler_sequences=_sampler_sequences(config, devices, sampler_replicas),
        sampler_memory_share=known(config.rollout.gpu_memory_utilization),
        kv_cache_bytes=config.rollout.kv_cache_gib * 2**30,
        decode_overhead_s=device.decode_eager_s if known(config.rollout.enforce_eager) else device.decode_graph_s,
        chunk_bytes=float(loss_chunk_bytes(device.torch_type) if chunk_mib is None else chunk_mib << 20),
        head_products=_head_products(config),
        extra_forwards=config.objective.extra_forwards,
        needs_reference=config.objective.needs_reference,
        together_share=together_share,
        teacher_turns=teacher_turns,
        proposed_share=proposed_share,
        teacher_placement=teacher_placement if asks_teacher else "unasked",
        teacher_devices=teacher_devices if asks_teacher else 0,
        sampler_devices=1 if sampler_replicas else config.rollout.tensor_parallel,
        sleep_level=known(config.rollout.sleep_level),
        sampler_replicas=sampler_replicas,
        staleness=config.rollout.staleness,
        adapter_parameters=0 if lora is None else student.adapter_parameters(lora),
        sampler_applies_adapter=not sampler_replicas and _sampler_applies_adapter(config, device),
        projector_parameters=projectors,
        state_widths=state_widths,
        settled_lines=settled_lines,
    )


def _head_products(config: Config) -> tuple[int, int]:
    """As `ObjectiveConfig.head_products`. With another tokenizer at most: `gkd.ops.aligned_terms` says which they are,
    and all tokens are taken to stand in longer spans."""
    student, teacher = config.objective.head_products
    return (student + 2, teacher + 1) if config.teacher.alignment is not None else (student, teacher)


def _sampled_share(config: Config) -> float:
    """Of a step's completions those that the student samples, where most of them are."""
    return min(1.0, sum(largest(share) for name, share in config.mixture.shares.items() if SOURCES.drawn(name).in_step))


def _together(config: Config, completion_tokens: float) -> tuple[float, float, float]:
    """`Setup.together_share`, `teacher_turns` and `proposed_share`. Raises ConfigError for a source of a plugin's."""
    mixed, speculative = config.rollout.mixed, config.rollout.speculative
    corrected = speculative.tokens_a_turn(ACCEPTED_SHARE)
    known_sources = {  # tokens of a turn, and tokens that the student draws for one of the text
        "mixed": (mixed.tokens_a_turn, 1.0 - mixed.teacher_share),
        "speculative": (corrected, speculative.block_tokens / corrected),
    }
    shares = {name: largest(config.mixture.shares[name]) for name in config.mixture.with_teacher}
    for name in shares.keys() - known_sources.keys():
        raise ConfigError(f"mixture.{name}: gkd plan does not know how often the teacher reads its texts; set it to 0")
    total = sum(shares.values())
    if not total:
        return 0.0, 0.0, 1.0
    turns = sum(share * completion_tokens / known_sources[name][0] for name, share in shares.items()) / total
    proposed = sum(share * known_sources[name][1] for name, share in shares.items()) / total
    return min(1.0, total), turns, proposed


def placement_of(config: Config) -> Placement | Literal["topk"]:
    """Where the main teacher is."""
    if not config.has_weights_of_its_own(MAIN_TEACHER):
        return "student"
    if config.teacher.is_student and config.teacher.student_weights == "ema":
        return "mean"
    return config.teacher.placement


def _states(config: Config, student: Architecture, teacher: Architecture) -> tuple[int, tuple[int, int]]:
    """What terms that compare states learn and ask for: `Setup.projector_parameters` and `state_widths`."""
    of_terms = config.objective.state_pairs(*(_shape(side) for side in (student, teacher)))
    pairs = [pair for own in of_terms.values() for pair in own]
    projectors = sum(p.student_width * p.teacher_width for p in pairs if p.is_projected)
    widths = {pair.teacher: pair.teacher_width for pair in pairs}
    asked = {tokens: sum(w for place, w in widths.items() if place.tokens == tokens) for tokens in ("scored", "all")}
    return projectors, (asked["scored"], asked["all"])


def _shape(side: Architecture) -> ModelShape:
    return ModelShape(side.layers, side.hidden, (side.query_width, side.kv_width, side.kv_width))


def _sampler_sequences(config: Config, devices: int, sampler_replicas: int) -> int:
    """A server is sent so many by each rank; it is taken to be started with the config's rollout.max_num_seqs."""
    if not sampler_replicas:
        return known(config.rollout.max_num_seqs)
    return min(known(config.rollout.max_num_seqs), devices * config.rollout.max_concurrency)


def _sampler_applies_adapter(config: Config, device: Device) -> bool:
    return config.sampler_lora(device.torch_type) is not None


def _micro_batch_size(config: Config) -> int:
    """Sequences a forward; packed, as many of the longest as its tokens hold."""
    if config.optim.micro_batch_tokens is None:
        return config.optim.micro_batch_size
    return config.optim.micro_batch_tokens // config.longest_sequence


def _offloads(zero: dict[str, dict[str, str]], name: str) -> bool:
    return zero.get(name, {}).get("device", "none") != "none"


def _mean(option: str, given: float | None, limit: int, share: float) -> float:
    if given is None:
        return share * limit
    if not 0 < given <= limit:
        raise ConfigError(f"{option}: {given:g} must be above 0 and at most {limit}, the config's limit")
    return given
