"""student: what is trained, and how it is made, shrunk, adapted or rounded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gkd.config.sections import DtypeOrAuto, LayerRule, PathText
from gkd.errors import ConfigError
from gkd.schema import Section


class StudentWidth(Section):
    hidden: int | None = Field(None, ge=1, description="channels of the residual stream; null = all, as below")
    heads: int | None = Field(None, ge=1, description="query heads; null = as many for each key-value head as now")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads")
    ffn: int | None = Field(None, ge=1, description="neurons of each MLP")

    @model_validator(mode="after")
    def _says_something(self) -> StudentWidth:
        if self.hidden is self.heads is self.kv_heads is self.ffn is None:
            raise ValueError("hidden: is missing, and so are heads, kv_heads and ffn; give at least one of them")
        return self

    def of(self, *, hidden: int, heads: int, kv_heads: int, ffn: int) -> dict[str, int]:
        """All four, of a model with these. Raises ConfigError for what it does not have."""
        most = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
        for name, size in most.items():
            asked = getattr(self, name)
            if asked is not None and asked > size:
                raise ConfigError(f"student.init.width.{name}: {asked} of a model with {size}")
        group = heads // kv_heads
        kept_groups = self.kv_heads or kv_heads
        kept = self.heads or kept_groups * group
        if kept % kept_groups or kept // kept_groups > group:
            fitting = ", ".join(str(kept_groups * size) for size in range(1, group + 1))
            raise ConfigError(
                f"student.init.width.heads: {kept} query heads for {kept_groups} key-value heads; each keeps as many, "
                f"at most {group}: {fitting}"
            )
        return {"hidden": self.hidden or hidden, "heads": kept, "kv_heads": kept_groups, "ffn": self.ffn or ffn}

    def describe(self) -> str:
        names = {"hidden": "channels", "heads": "heads", "kv_heads": "key-value heads", "ffn": "neurons"}
        return ", ".join(f"{size} {names[name]}" for name, size in self if size is not None)


class StudentInit(Section):
    layers: int | list[int] | None = Field(None, description="number of layers kept, or the list of layers; null = all")
    choose: LayerRule = Field(
        "even",
        description="which layers a number keeps: even = evenly spaced with both ends; divergence = all but those that "
        "a greedy search removes at the least forward KL; block_influence = those that turn their input most",
    )
    width: StudentWidth | None = Field(
        None, description="sizes of a narrower student, which keeps what data.train's prompts use most; null = all"
    )
    calibration_tokens: int = Field(
        256, ge=16, description="tokens of data.train's prompts that layers and width are measured on"
    )

    @model_validator(mode="after")
    def _fits_itself(self) -> StudentInit:
        if self.layers is None and self.width is None:
            raise ValueError("layers: is missing, and so is width; give at least one of them")
        if self.is_measured and not isinstance(self.layers, int):
            raise ValueError(f"choose: {self.choose} chooses as many layers as layers says; give a number")
        return self

    def count(self, available: int) -> int:
        """Layers of the student, of a model of `available`."""
        if self.layers is None:
            return available
        return self.layers if isinstance(self.layers, int) else len(self.layers)

    def check_fits(self, available: int) -> None:
        """Raises ConfigError unless a model of `available` layers can be cut to so many."""
        most, count = available - 1 if self.is_measured else available, self.count(available)
        if not 1 <= count <= most:
            removed = f", some of which student.init.choose: {self.choose} removes" if self.is_measured else ""
            raise ConfigError(
                f"student.init.layers: {count} of a model of {available} layers{removed}; must be 1 to {most}"
            )

    @property
    def is_measured(self) -> bool:
        """Whether the layers are known only once the model was measured."""
        return self.choose != "even"

    @property
    def needs_texts(self) -> bool:
        """To be measured on."""
        return self.is_measured or self.width is not None

    def describe(self) -> str:
        """`20 of its layers, evenly spaced`, of a model that was named."""
        measured = f"on {self.calibration_tokens} tokens of data.train's prompts"
        parts: list[str] = []
        if isinstance(self.layers, int):
            rule = f"chosen by {self.choose} {measured}" if self.is_measured else "evenly spaced"
            parts.append(f"{self.layers} of its layers, {rule}")
        elif self.layers is not None:
            parts.append(f"its layers {', '.join(map(str, self.layers))}")
        if self.width is not None:
            parts.append(f"of its width {self.width.describe()}, those that are used most {measured}")
        return "; ".join(parts)


class LoraConfig(Section):
    rank: int = Field(16, ge=1, le=512, description="of LoRA's factors; any key of student.lora, or {}, switches it on")
    alpha: float = Field(32.0, gt=0.0, description="LoRA's product is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="on LoRA's input, in training")
    rank_stabilized: bool = Field(False, description="multiply by alpha / sqrt(rank) instead")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="linear modules that get an adapter, e.g. [q_proj, v_proj]; never the output head"
    )


class QuantizeConfig(Section):
    """Weights of few bits that the student computes with while its full ones are trained."""

    scheme: Literal["int4", "int8"] = Field(description="whole numbers of 4 or 8 bits, symmetric around 0")
    group_size: int = Field(64, ge=1, description="numbers of a row that share a scale; divides every row's length")
    ignore: list[str] = Field(
        ["lm_head"], description="linear modules that stay as they are, by the end of their names; embeddings do, too"
    )

    @property
    def bits(self) -> int:
        return int(self.scheme.removeprefix("int"))

    def describe(self) -> str:
        return f"{self.scheme} in groups of {self.group_size}, but for {', '.join(self.ignore) or 'nothing'}"


class StudentConfig(Section):
    model: PathText | None = Field(None, description="folder or hub name; null with init.layers = the teacher")
    revision: str | None = Field(None, description="hub revision")
    init: StudentInit | None = Field(None, description="make the student from a subset of the model's layers")
    lora: LoraConfig | None = Field(None, description="train low-rank adapters and freeze the rest; null = train all")
    dtype: DtypeOrAuto = Field(
        "auto", description="dtype of compute and of the sampler; master weights are float32; auto as in teacher.dtype"
    )
    quantize: QuantizeConfig | None = Field(
        None, description="train for weights of few bits: rounded in every forward, sampled with and exported"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    compile: bool = Field(
        False,
        description="torch.compile each layer for training; takes half a minute at the start, and then less a step",
    )

    @model_validator(mode="after")
    def _has_an_origin(self) -> StudentConfig:
        if self.model is None and self.init is None:
            raise ValueError("model: name a model, or set student.init to make one from the teacher")
        for name in ("lora", "compile"):
            if self.quantize is not None and getattr(self, name):
                raise ValueError(f"quantize: not with student.{name}; leave one of them out")
        return self
