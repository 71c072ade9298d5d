"""LoRA: low-rank adapters beside a model's frozen matrices, made by peft.

An adapted matrix W [out, in] acts as W + scale * B A, with A [rank, in] drawn at random and B [out, rank] zero at the
start, so that the fresh student is its base model. Only A and B are trained; the output head, tied or not, is frozen.
Weights leave under transformers' names where they are whole, and under those of peft's files where they are adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import LoraConfig
from gkd.errors import ConfigError
from gkd.models.modules import fused_experts, kinds_of, matches

if TYPE_CHECKING:
    import peft
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_KEY = "student.lora.target_modules"
_ADAPTER = "default"  # peft's name for the only one
_FILE_PREFIX = "base_model.model."  # of the names in peft's files
_BASE_WEIGHT = ".base_layer.weight"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def lora_targets(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Names of the linear modules that get an adapter. `model` may be on the meta device.

    Raises ConfigError, naming the key, for a target that is none of them, and for "all" of a model with fused experts.
    """
    from torch import nn

    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if lora.target_modules == "all-linear" and linear:
        _check_no_fused_experts(model, linear)
        return linear
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        if not any(matches(name, target) for name in linear):
            known = ", ".join(kinds_of(linear, 1))
            raise ConfigError(
                f"{_KEY}: {type(model).__name__} has no linear module {target!r} that can be adapted "
                f"(the output head stays frozen); known: {known or 'none'}"
            )
    return [name for name in linear if any(matches(name, target) for target in targets)]


def _check_no_fused_experts(model: PreTrainedModel, linear: Sequence[str]) -> None:
    """ "all" of them would leave out most."""
    fused, share = fused_experts(model)
    if fused:
        raise ConfigError(
            f"{_KEY}: all-linear leaves out {', '.join(fused)}, {share:.0%} of the model, as fused experts are no "
            f"linear modules; to adapt the others alone, name them: [{', '.join(kinds_of(linear, 1))}]"
        )


def inject_lora(model: PreTrainedModel, lora: LoraConfig, *, seed: int) -> None:
    """Puts fresh adapters into `model`, in place, in the dtype of its weights, and freezes everything else.

    `seed` alone decides them, whatever device the model is on. Raises ConfigError as `lora_targets` does.
    """
    import torch
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws on the CPU
        inject_adapter_in_model(_peft_config(lora, lora_targets(model, lora)), model, _ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def use_float32_adapters(model: PreTrainedModel) -> None:
    """Master weights of what is trained; the frozen rest stays in the dtype it was loaded in."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """In the block the frozen base computes alone, as if there had never been an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:  # not by `enable_adapters`, which also says what is trained
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in peft's files; none for a model without one."""
    return {
        _FILE_PREFIX + name.replace(f".{_ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if is_adapter(name)
    }


def base_name(name: str) -> str:
    """A parameter's name without an adapter around it."""
    return name.replace(".base_layer.", ".")


def is_adapted(name: str) -> bool:
    """Whether it is a matrix beside which there is an adapter."""
    return name.endswith(_BASE_WEIGHT)


def scaling_of(layer: Any) -> float:
    """What peft multiplies B A by."""
    return layer.scaling[_ADAPTER]


def merged(scale: float, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """W + scale * B A in float32, a new tensor."""
    import torch

    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def save_adapter(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], lora: LoraConfig, base_model: str | None = None
) -> None:
    """Writes `weights`, named as in peft's files, as an adapter that `PeftModel.from_pretrained` and vLLM load."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights}
    modules = sorted({name.removeprefix(_FILE_PREFIX).rpartition(".lora_")[0] for name in tensors})
    config = _peft_config(lora, modules)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_WEIGHTS).chmod(0o644)  # as write_weights does


def _peft_config(lora: LoraConfig, modules: Iterable[str]) -> peft.LoraConfig:
    import peft

    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (peft only divides it)
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilized,
        target_modules=list(modules),
        task_type="CAUSAL_LM",
    )
