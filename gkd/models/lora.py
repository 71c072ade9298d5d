"""LoRA: low-rank adapters beside a model's frozen matrices, made by peft.

An adapted matrix W [out, in] acts as W + scale * B A, with A [rank, in] drawn at random and B [out, rank] zero at the
start, so that the fresh student is its base model. Only A and B are trained; the output head, tied or not, is frozen.
Weights leave under transformers' names where they are whole, and under those of peft's files where they are adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import LoraConfig
from gkd.errors import ConfigError

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


@dataclass(frozen=True)
class LeavingWeight:
    """A tensor that leaves the trainer, and how it is made of parameters that may be sharded."""

    shape: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]
    value: Callable[..., torch.Tensor]  # of the parameters' whole tensors, in their order


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
        if not any(_matches(name, target) for name in linear):
            known = ", ".join(_kinds(linear, 1))
            raise ConfigError(
                f"{_KEY}: {type(model).__name__} has no linear module {target!r} that can be adapted "
                f"(the output head stays frozen); known: {known or 'none'}"
            )
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def _check_no_fused_experts(model: PreTrainedModel, linear: Sequence[str]) -> None:
    """Their matrices lie in one tensor a layer, which is no linear module: "all" of them would leave out most."""
    from torch import nn

    known = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    fused = {
        f"{name}.{part}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, known)
        for part, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2
    }
    if fused:
        share = sum(fused.values()) / sum(parameter.numel() for parameter in model.parameters())
        raise ConfigError(
            f"{_KEY}: all-linear leaves out {', '.join(_kinds(fused, 2))}, {share:.0%} of the model, as fused "
            f"experts are no linear modules; to adapt the others alone, name them: [{', '.join(_kinds(linear, 1))}]"
        )


def _kinds(names: Iterable[str], parts: int) -> list[str]:
    """The last `parts` of each name, once."""
    return list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


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
        parameter.requires_grad_(_is_adapter(name))


def use_float32_adapters(model: PreTrainedModel) -> None:
    """Master weights of what is trained; the frozen rest stays in the dtype it was loaded in."""
    for name, parameter in model.named_parameters():
        if _is_adapter(name):
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


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their names in peft's files; none for a model without one."""
    return {
        _FILE_PREFIX + name.replace(f".{_ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if _is_adapter(name)
    }


def adapter_weights(model: nn.Module) -> dict[str, LeavingWeight]:
    """What leaves of the adapter alone."""
    return {name: _plain(parameter) for name, parameter in adapter_parameters(model).items()}


def whole_weights(model: nn.Module) -> dict[str, LeavingWeight]:
    """What leaves of the model as one without adapters: by transformers' names, a tied head once.

    An adapted matrix is merged in float32 each time it is asked for; the base is never changed, so nothing drifts.
    """
    weights: dict[str, LeavingWeight] = {}
    for name, parameter in model.named_parameters():
        if name.endswith(_BASE_WEIGHT):
            layer: Any = model.get_submodule(name.removesuffix(_BASE_WEIGHT))  # peft's
            parts = (parameter, *(p for part, p in layer.named_parameters() if _is_adapter(f".{part}")))
            value = partial(_merged, layer.scaling[_ADAPTER])
            weights[_base_name(name)] = LeavingWeight(tuple(parameter.shape), parts, value)
        elif not _is_adapter(name):
            weights[_base_name(name)] = _plain(parameter)
    return weights


def _base_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _plain(parameter: nn.Parameter) -> LeavingWeight:
    return LeavingWeight(tuple(parameter.shape), (parameter,), lambda whole: whole)


def _merged(scale: float, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
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
