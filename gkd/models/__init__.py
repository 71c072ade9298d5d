"""Models: found, checked, loaded, cut in backbone and head, made smaller, and exported.

Names are imported on first use: `gkd.models` itself imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkd.models.attention import use_short_attention
    from gkd.models.calibration import forward_kl
    from gkd.models.card import ModelCard
    from gkd.models.coverage import check_covers
    from gkd.models.cut_config import student_config
    from gkd.models.end_tokens import end_token_ids
    from gkd.models.export import save_final
    from gkd.models.fingerprint import model_fingerprint
    from gkd.models.heads import backbone_of, head_logits, head_settings, output_head, verify_head
    from gkd.models.layer_choice import LayerChoice, choose_by_measure
    from gkd.models.layer_states import StateReader, model_shape
    from gkd.models.leaving import LeavingWeight, adapter_weights, weight_scales, whole_weights
    from gkd.models.load import (
        count_parameters,
        empty_model,
        has_experts,
        load_causal_lm,
        load_tokenizer,
        owns_head,
        pad_token_id,
        read_config,
        read_generation_config,
    )
    from gkd.models.lora import adapter_parameters, inject_lora, lora_targets, save_adapter, use_float32_adapters
    from gkd.models.packed import packed_inputs, use_packed_attention
    from gkd.models.proof import Probe
    from gkd.models.quantization import Quantization, quantization_targets, quantize_linear, quantize_student
    from gkd.models.resolve import local_folder, resolve_model
    from gkd.models.shared_mass import SharedMass
    from gkd.models.sides import Side, describe_sides, union_of_ends
    from gkd.models.subset import choose_layers, config_of_layers, make_student_from_layers, recorded_choice
    from gkd.models.token_bytes import TokenBytes
    from gkd.models.tokenizer_pair import check_tokenizer_pair
    from gkd.models.tokens_between import TokenizerPair, Translation
    from gkd.models.weights import file_tensors
    from gkd.models.width import (
        WidthChoice,
        choose_width,
        is_made_by,
        make_narrower,
        narrow_config,
        record_width,
        width_sizes,
    )

_HOMES = {
    "card": ("ModelCard",),
    "coverage": ("check_covers",),
    "end_tokens": ("end_token_ids",),
    "export": ("save_final",),
    "heads": ("backbone_of", "head_logits", "head_settings", "output_head", "verify_head"),
    "layer_choice": ("LayerChoice", "choose_by_measure"),
    "layer_states": ("StateReader", "model_shape"),
    "load": (
        "count_parameters", "empty_model", "has_experts", "load_causal_lm", "load_tokenizer", "owns_head",
        "pad_token_id", "read_config", "read_generation_config",
    ),
    "leaving": ("LeavingWeight", "adapter_weights", "weight_scales", "whole_weights"),
    "lora": (
        "adapter_parameters", "inject_lora", "lora_targets", "save_adapter",
        "use_float32_adapters",
    ),
    "attention": ("use_short_attention",),
    "proof": ("Probe",),
    "packed": ("packed_inputs", "use_packed_attention"),
    "fingerprint": ("model_fingerprint",),
    "quantization": ("Quantization", "quantization_targets", "quantize_linear", "quantize_student"),
    "resolve": ("local_folder", "resolve_model"),
    "cut_config": ("student_config",),
    "shared_mass": ("SharedMass",),
    "sides": ("Side", "describe_sides", "union_of_ends"),
    "subset": ("choose_layers", "config_of_layers", "make_student_from_layers", "recorded_choice"),
    "token_bytes": ("TokenBytes",),
    "tokenizer_pair": ("check_tokenizer_pair",),
    "tokens_between": ("TokenizerPair", "Translation"),
    "weights": ("file_tensors",),
    "calibration": ("forward_kl",),
    "width": (
        "WidthChoice", "choose_width", "is_made_by", "make_narrower", "narrow_config", "record_width", "width_sizes",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LayerChoice",
    "LeavingWeight",
    "ModelCard",
    "Probe",
    "Quantization",
    "SharedMass",
    "Side",
    "StateReader",
    "TokenBytes",
    "TokenizerPair",
    "Translation",
    "WidthChoice",
    "adapter_parameters",
    "adapter_weights",
    "backbone_of",
    "check_covers",
    "check_tokenizer_pair",
    "choose_by_measure",
    "choose_layers",
    "choose_width",
    "config_of_layers",
    "count_parameters",
    "describe_sides",
    "empty_model",
    "end_token_ids",
    "file_tensors",
    "forward_kl",
    "has_experts",
    "head_logits",
    "head_settings",
    "inject_lora",
    "is_made_by",
    "load_causal_lm",
    "load_tokenizer",
    "local_folder",
    "lora_targets",
    "make_narrower",
    "make_student_from_layers",
    "model_fingerprint",
    "model_shape",
    "narrow_config",
    "output_head",
    "owns_head",
    "packed_inputs",
    "pad_token_id",
    "quantization_targets",
    "quantize_linear",
    "quantize_student",
    "read_config",
    "read_generation_config",
    "record_width",
    "recorded_choice",
    "resolve_model",
    "save_adapter",
    "save_final",
    "student_config",
    "union_of_ends",
    "use_float32_adapters",
    "use_packed_attention",
    "use_short_attention",
    "verify_head",
    "weight_scales",
    "whole_weights",
    "width_sizes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
