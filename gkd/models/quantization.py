"""Weights of four or eight bits in training: the forward pass sees what is deployed, the optimizer the full ones.

A row's numbers lie in groups that share a scale s, and stand for whole numbers of b bits:

    s = max |w| / ((2^b - 1) / 2)  of the group,      w ~ s clamp(round(w / s), -2^(b - 1), 2^(b - 1) - 1)

which is compressed-tensors' symmetric scheme, number for number; a scale is rounded to the dtype that it is deployed
in. The gradient with respect to the rounded weights is taken for that of the full ones (straight through: Bengio et
al. 2013, arXiv 1308.3432). Scales are of the weights at each forward, so there is no state besides them.

Legend: O, I a matrix's rows and columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gkd.config import QuantizeConfig
from gkd.errors import ConfigError
from gkd.models.modules import fused_experts, kinds_of, matches

_GROUP_SIZES = (16, 32, 64, 96, 128, 192, 256, 512)  # to be proposed


@dataclass(frozen=True)
class QuantizeKeys:
    """What the parts of a QuantizeConfig are called where a user gives them, for messages."""

    whole: str = "student.quantize"
    group_size: str = "student.quantize.group_size"
    ignore: str = "student.quantize.ignore"


_OF_STUDENT = QuantizeKeys()


@dataclass(frozen=True)
class Quantization:
    """`scale_dtype` is that of the deployed model."""

    bits: int
    group_size: int
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, quantize: QuantizeConfig, dtype: torch.dtype) -> Quantization:
        return cls(quantize.bits, quantize.group_size, dtype)

    def scales(self, weight: Tensor) -> Tensor:
        """[O, G] float32, of a matrix [O, I]."""
        largest = self._groups(weight).abs().amax(-1)
        scales = (largest / ((2**self.bits - 1) / 2)).to(self.scale_dtype).float()
        return torch.where(scales == 0, torch.finfo(self.scale_dtype).eps, scales)

    def rounded(self, weight: Tensor) -> Tensor:
        """What is deployed of a matrix, [O, I] in float32."""
        scales, most = self.scales(weight)[..., None], 2 ** (self.bits - 1)
        whole = (self._groups(weight) / scales).round_().clamp_(-most, most - 1).add_(0.0)  # no -0, as in a file
        return whole.mul_(scales).view(weight.shape)

    def _groups(self, weight: Tensor) -> Tensor:
        return weight.detach().float().unflatten(-1, (-1, self.group_size))  # [O, G, I / G]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantization: Quantization) -> Tensor:
        return quantization.rounded(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class QuantizedLinear(nn.Linear):
    """A linear module that computes with rounded weights; its parameters are the full ones, under the same names."""

    quantization: Quantization

    def forward(self, input: Tensor) -> Tensor:
        weight = cast("Tensor", _StraightThrough.apply(self.weight, self.quantization))  # pyright: ignore[reportUnknownMemberType]
        return linear(input, weight, self.bias)


def quantization_targets(model: Any, quantize: QuantizeConfig, keys: QuantizeKeys = _OF_STUDENT) -> list[str]:
    """Names of the linear modules that are quantized: all but the output head and those that `ignore` names.

    `model` may be on the meta device. Raises ConfigError, naming the key, for a name that no module has, a group size
    that does not divide a module's columns, fused experts, and where nothing is left.
    """
    fused, share = fused_experts(model)
    if fused:
        raise ConfigError(
            f"{keys.whole}: {', '.join(fused)}, {share:.0%} of the model, are fused experts, which stay as they are"
        )
    head = model.get_output_embeddings()
    linear_modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    known = {*linear_modules, *(name for name, module in model.named_modules() if module is head)}
    for ignored in quantize.ignore:
        if not any(matches(name, ignored) for name in known):
            raise ConfigError(
                f"{keys.ignore}: {type(model).__name__} has no linear module {ignored!r}; known: "
                f"{', '.join(kinds_of(sorted(known), 1))}"
            )
    targets = [name for name in linear_modules if not any(matches(name, ignored) for ignored in quantize.ignore)]
    if not targets:
        raise ConfigError(f"{keys.ignore}: names every linear module, so there is nothing to quantize")
    _check_groups({name: linear_modules[name].in_features for name in targets}, quantize.group_size, keys.group_size)
    return targets


def _check_groups(columns: dict[str, int], group_size: int, key: str) -> None:
    misfit = next((name for name, count in columns.items() if count % group_size), None)
    if misfit is not None:
        fitting = [str(size) for size in _GROUP_SIZES if not any(count % size for count in columns.values())]
        raise ConfigError(
            f"{key}: {columns[misfit]} columns of {misfit} are no whole number of groups of {group_size}; "
            f"sizes that fit all modules: {', '.join(fitting) or 'none; name some in ignore'}"
        )


def quantize_linear(model: Any, targets: Sequence[str], quantization: Quantization) -> None:
    """Has these modules of `model` compute with rounded weights, in place."""
    for name in targets:
        module = model.get_submodule(name)
        module.__class__ = QuantizedLinear
        module.quantization = quantization


def quantize_student(model: Any, quantize: QuantizeConfig | None, dtype: str) -> None:
    """Has a student of `dtype`, in training or as it was before, compute as student.quantize says; None: as it is."""
    if quantize is not None:
        quantize_linear(model, quantization_targets(model, quantize), Quantization.of(quantize, getattr(torch, dtype)))


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """By their weights' names."""
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
