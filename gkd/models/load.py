"""Models, tokenizers and configs from a folder or the hub: no remote code, safetensors only, errors of one line."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError
from gkd.models.hub import explained, quiet_transformers
from gkd.models.quantized_files import CONFIG, packed_scheme, plain_tensors
from gkd.models.resolve import local_folder
from gkd.models.weights import nonfinite_row, read_tensors

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_GENERATION = "generation_config.json"
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ROUTER_OUTPUTS = "output_router_logits"


def load_tokenizer(path: str, key: str = "student.model", *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model. Raises ModelError, starting with `key`, if there is none."""
    from transformers import AutoTokenizer

    with explained(path, key, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)


def read_config(path: str, *, revision: str | None = None, key: str = "student.model") -> PreTrainedConfig:
    """The config of a resolved model. Raises ModelError, starting with `key`."""
    from transformers import AutoConfig

    with explained(path, key):
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)


def read_generation_config(
    path: str, *, revision: str | None = None, key: str = "student.model"
) -> GenerationConfig | None:
    """The generation config of a resolved model, or None if it has no such file."""
    from transformers import GenerationConfig
    from transformers.utils.hub import cached_file

    with explained(path, key, "generation config"):  # of a hub model this file alone: not all have to load its weights
        file = cached_file(path, _GENERATION, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if file is None else GenerationConfig.from_pretrained(str(Path(file).parent))


def load_causal_lm(
    path: str,
    dtype: str | torch.dtype,
    *,
    revision: str | None = None,
    key: str = "student.model",
    may_be_packed: bool = False,
) -> PreTrainedModel:
    """The model of a resolved name on the CPU, in `dtype` and eval mode, with PyTorch's own attention where it can.

    Every weight comes from the files. Raises ModelError, starting with `key`, if one is missing (transformers would
    make it up) or holds a value that is not finite, if the weights are quantized, or if the model needs code that is
    not transformers' own. `may_be_packed`: weights that compressed-tensors packed are unpacked.
    """
    folder = str(local_folder(path, revision=revision, key=key))
    config = read_config(folder, key=key)
    scheme = check_readable(config, path, key, may_be_packed=may_be_packed)
    if hasattr(config, _ROUTER_OUTPUTS):  # for a loss of their own, which no run has: they cost every forward
        setattr(config, _ROUTER_OUTPUTS, False)
    tensors = None
    if scheme is not None:
        delattr(config, CONFIG)  # of a model with plain numbers
        tensors = dict(plain_tensors(Path(folder), scheme, key))
    with explained(path, key), quiet_transformers():
        model, info = _from_pretrained(folder, config, torch_dtype(dtype), tensors)
    refuse_missing(info["missing_keys"], model, path, key)
    _check_finite(model, path, key)
    return model.eval()


def _from_pretrained(
    folder: str, config: PreTrainedConfig, dtype: torch.dtype, tensors: dict[str, torch.Tensor] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of loading it; of `tensors` in the place of the folder's, if there are."""
    from transformers import AutoModelForCausalLM

    architecture: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
    if tensors is not None:
        architecture, source = AutoModelForCausalLM._model_mapping[type(config)], {"state_dict": tensors}
    return architecture.from_pretrained(
        folder if tensors is None else None,
        config=config,
        dtype=dtype,
        attn_implementation=_attention(config),
        output_loading_info=True,
        **source,
    )


def check_readable(
    config: PreTrainedConfig, path: str, key: str, *, may_be_packed: bool = False
) -> QuantizationScheme | None:
    """How the weights are packed; None for plain numbers. Raises ModelError, starting with `key`, for what is not read
    here."""
    scheme = packed_scheme(config, path, key)
    if scheme is not None and not may_be_packed:
        raise ModelError(
            f"{key}: {path} is quantized; what is trained or cut needs plain weights: use the model it was made from"
        )
    return scheme


def refuse_missing(missing: Collection[str], model: PreTrainedModel, path: str, key: str) -> None:
    """Raises ModelError, starting with `key`, if there are some: transformers makes them up."""
    if missing:
        raise ModelError(
            f"{key}: the weights of {path} lack {len(missing)} tensors of {type(model).__name__}, first "
            f"{min(missing)}: they belong to another model, or are incomplete"
        )


def _check_finite(model: PreTrainedModel, path: str, key: str) -> None:
    """A row that no text of the data holds would go unnoticed through training and sampling, into the result."""
    for name, parameter in model.named_parameters():
        row = nonfinite_row(parameter.detach())
        if row is not None:
            raise ModelError(
                f"{key}: {path}: {name}: row {row} is not finite; the weights are damaged, or beyond "
                f"{str(parameter.dtype).removeprefix('torch.')}"
            )


def _attention(config: PreTrainedConfig) -> str:
    """PyTorch's attention where it can be had: it caps no scores, and transformers would leave them uncapped without a
    word; models with sinks (gpt_oss) or without attention (mamba2) have what is their own.

    A config.json may name a kernel on the hub; it is not followed.
    """
    from transformers import AutoModelForCausalLM

    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    architecture: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "eager" if capped or not getattr(architecture, "_supports_sdpa", True) else "sdpa"


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a config is of a mixture of experts, by the names that transformers has for how many there are."""
    text_config = config.get_text_config()
    return any((getattr(text_config, name, None) or 0) > 1 for name in _EXPERT_COUNTS)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture of a config without memory: modules, names and shapes, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation=_attention(config))


def count_parameters(config: PreTrainedConfig) -> int:
    """Of the model that a config describes, a tied head once."""
    return sum(parameter.numel() for parameter in empty_model(config).parameters())


def owns_head(path: str, *, revision: str | None = None, key: str = "student.model") -> bool:
    """Whether a resolved model's files hold an output head that differs from the embedding, though its config ties the
    two. transformers goes by the files then, vLLM by the config."""
    import torch

    folder = local_folder(path, revision=revision, key=key)
    config = read_config(str(folder), key=key)
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        return False
    with explained(path, key):
        model = empty_model(config)
    tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    shared = [name for name, number in tied.items() if list(tied.values()).count(number) > 1]
    found = list(dict(read_tensors(folder, key, shared)).values())
    return any(not torch.equal(tensor, found[0]) for tensor in found[1:])


def pad_token_id(tokenizer: PreTrainedTokenizerBase, key: str = "student.model") -> int:
    """The id that fills up a batch: the pad token, else the end token. Masks never depend on its being distinct."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ModelError(f"{key}: the tokenizer has neither a pad token nor an end token (eos_token)")


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """`torch.bfloat16` for "bfloat16"."""
    import torch

    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
