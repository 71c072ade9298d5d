"""A language model cut in two: the backbone up to the final norm, and the output head that makes logits.

Legend: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gkd.errors import ModelError
from gkd.types import OutputHead

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
_FACTOR_NAMES = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
_DIVISOR_NAME = "logits_scaling"  # Granite, MiniCPM3
_MULTIPLIES_BY_DIVISOR_NAME = ("hyperclovax",)  # has Granite's key with the opposite meaning
# relative to the largest logit: a few roundings of the dtype. A factor of 1.05 that is missed shows in each
_TOLERANCES = {"float32": 1e-5, "float16": 2**-8, "bfloat16": 2**-6}
_PROBE_TOKENS = 8
_PROBE_LARGEST_LOGIT = 64.0
_PROBE_LARGEST_EXPONENT = 10  # float16 ends at 2**16


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The module whose `last_hidden_state` is what the output head reads."""
    for module in (model.get_decoder(), model.base_model):
        if module is not model:
            return module
    raise ModelError(f"{type(model).__name__} has no backbone apart from its output head")


def head_module_of(model: PreTrainedModel) -> nn.Module:
    """The linear module that makes logits. Raises ModelError if the model has none."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no linear output head: is it a causal language model?")
    return head


def head_settings(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a model's config: logits = softcap * tanh(scale * raw / softcap), None = no cap."""
    text_config = config.get_text_config()
    scale = 1.0
    for name in _FACTOR_NAMES:
        value = getattr(text_config, name, None)
        if isinstance(value, int | float):  # MPT has a `logit_scale` that may be a word
            scale *= value
    divisor = getattr(text_config, _DIVISOR_NAME, None)
    if isinstance(divisor, int | float):
        scale *= divisor if text_config.model_type in _MULTIPLIES_BY_DIVISOR_NAME else 1.0 / divisor
    softcap = next((value for name in _SOFTCAP_NAMES if (value := getattr(text_config, name, None))), None)
    return scale, None if softcap is None else float(softcap)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's head with its live parameters (not copies). Raises ModelError if it has none."""
    module = head_module_of(model)
    scale, softcap = head_settings(model.config)
    return OutputHead(module.weight, getattr(module, "bias", None), scale, softcap)  # pyright: ignore


def head_logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
    """logits [..., V] in float32 of states [..., H]: softcap(logit_scale * (hidden @ weight.T + bias))."""
    import torch

    bias = None if head.bias is None else head.bias.float()
    logits = torch.nn.functional.linear(hidden.float(), head.weight.float(), bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def verify_head(model: PreTrainedModel, key: str = "student.model") -> float:
    """Proves on a few random tokens that backbone and head, by our formula, give the model's own logits.

    The states are blown up on both ways until logits reach 64, so that a soft cap shows whatever the weights are.
    Returns the largest difference relative to the largest logit. Raises ModelError, starting with `key`, if it is
    beyond the dtype's rounding. To be called before DeepSpeed partitions the parameters.
    """
    import torch

    head_module, body, head = head_module_of(model), backbone_of(model), output_head(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(head.weight.shape[0], (1, _PROBE_TOKENS), generator=generator).to(head.weight.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden = body(input_ids=tokens, use_cache=False).last_hidden_state  # [1, T, H]
            gain = _probe_gain(hidden, head)
            blow_up = head_module.register_forward_pre_hook(lambda _, args: (args[0] * gain, *args[1:]))
            try:
                expected = model(input_ids=tokens, use_cache=False).logits.float()  # [1, T, V]
            finally:
                blow_up.remove()
            ours = head_logits(hidden * gain, head)
    finally:
        model.train(was_training)
    return _compare(model, ours, expected, head.weight.dtype, key)


def _probe_gain(hidden: torch.Tensor, head: OutputHead) -> float:
    """What brings the logits near 64: a power of two, so that multiplying by it is exact in every dtype."""
    raw = head_logits(hidden, OutputHead(head.weight, None, head.logit_scale)).abs().max().item()
    if not 0.0 < raw < math.inf:
        return 1.0  # the comparison will say what is wrong
    return 2.0 ** min(_PROBE_LARGEST_EXPONENT, round(math.log2(_PROBE_LARGEST_LOGIT / raw)))


def _compare(model: PreTrainedModel, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, key: str) -> float:
    name = type(model).__name__
    if ours.shape != expected.shape:
        raise ModelError(
            f"{key}: {name} gives logits of shape {list(expected.shape)}, its head {list(ours.shape)}: "
            "its output head is of a kind that gkd does not know"
        )
    if not expected.isfinite().all():
        raise ModelError(f"{key}: {name} gives logits that are not finite: its weights are damaged, or beyond {dtype}")
    error = ((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    tolerance = _TOLERANCES.get(str(dtype).removeprefix("torch."), _TOLERANCES["bfloat16"])
    if not error <= tolerance:  # also where ours is NaN
        raise ModelError(
            f"{key}: the logits of {name} differ from softcap(scale * (hidden @ head + bias)) by {error:.2g} of the "
            f"largest (allowed {tolerance:.2g}): its output head does something that gkd does not know"
        )
    return error
