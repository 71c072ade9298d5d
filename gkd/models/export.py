"""The result of a run: a folder that transformers and vLLM load, proven to hold what was trained, with a model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import CheckpointError
from gkd.models.card import ADAPTER_FOLDER, ModelCard
from gkd.models.folders import copy_side_files, written_aside
from gkd.models.load import empty_model, read_config, torch_dtype
from gkd.models.lora import save_adapter
from gkd.models.proof import Probe, prove_adapter, prove_model
from gkd.models.quantized_files import CONFIG, packed_config, packed_tensors
from gkd.models.resolve import local_folder
from gkd.models.weight_files import check_model_folder
from gkd.models.weights import file_tensors, nonfinite_row, read_tensors, tensor_digest, write_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gkd.models.quantization import Quantization

_KEY = "student.model"
_TIED = "tie_word_embeddings"


def save_final(
    folder: str | Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    source_folder: str | Path,
    dtype: str | torch.dtype,
    card: ModelCard,
    *,
    probe: Probe,
    revision: str | None = None,
    adapter: Iterable[tuple[str, torch.Tensor]] = (),
    quantization: Quantization | None = None,
    scales: Iterable[tuple[str, torch.Tensor]] = (),
    end_token_ids: Sequence[int] = (),
) -> Path:
    """Writes the trained student to `folder` and returns it; an earlier result there is replaced.

    `weights` are the parameters by transformers' names, full tensors in any float dtype; each is copied before the
    next is asked for, so that they can be gathered one at a time. Where gathering is collective, only the main rank
    calls this and the others run through the same iterator. A tied head may be left out, as may buffers; a head that
    comes and differs from the embedding is the model's own, whatever the config says, and the saved config says so.
    Config, tokenizer, chat template and generation config come from `source_folder`, the model that the student
    started from (a folder or hub name); the config's dtype becomes `dtype`. Of a LoRA student, whose card says so,
    `weights` are merged, and `adapter` is asked for after them and written beside them in peft's format. Of a student
    that is quantized by `quantization` they are rounded, and those of `scales`, which are asked for first, are packed.
    Its generation stops at `end_token_ids`, where there are some: those at which it stopped in training.
    What was written is loaded again, one model at a time, and compared with what came and with `probe`.

    Raises CheckpointError, leaving `folder` as it was, if a parameter is missing, unknown, not finite or of another
    shape, or if what loads is not what was trained: then it is in `<folder>.refused`.
    """
    target, target_dtype = Path(folder), torch_dtype(dtype)
    source = local_folder(str(source_folder), revision=revision, key=_KEY)
    model = empty_model(read_config(str(source), key=_KEY))
    own_scales = {name: tensor.detach().to("cpu", copy=True) for name, tensor in scales}
    with written_aside(target, replace=True) as partial:
        copy_side_files(source, partial)
        checked = _Checked(weights, model, source, target_dtype)
        tensors, packing = file_tensors(model, checked), None
        if quantization is not None:
            tensors = packed_tensors(tensors, own_scales, quantization)
            packing = packed_config(quantization, model, own_scales)
        write_weights(partial, tensors, target_dtype)
        _write_config(source, model, target_dtype, partial, owns_head=checked.owns_head, packing=packing)
        if end_token_ids:
            _write_end_tokens(partial, end_token_ids)
        if card.lora is not None:
            save_adapter(partial / ADAPTER_FOLDER, adapter, card.lora, str(source_folder))
        (partial / "README.md").write_text(card.render(), encoding="utf-8")
        check_model_folder(partial, _KEY)
        try:
            prove_model(partial, target_dtype, checked.digests, probe)
            if card.lora is not None:
                prove_adapter(partial / ADAPTER_FOLDER, source, target_dtype, probe)
        except CheckpointError as error:
            refused = _keep_refused(partial, target)
            raise CheckpointError(f"{error}; what was written is in {refused}") from None
    return target


def _keep_refused(partial: Path, target: Path) -> Path:
    refused = target.with_name(f"{target.name}.refused")
    with written_aside(refused, replace=True) as kept:
        kept.rmdir()
        partial.rename(kept)
    return refused


def _write_config(
    source: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    target: Path,
    *,
    owns_head: bool,
    packing: dict[str, Any] | None,
) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if section is config or "dtype" in section or "torch_dtype" in section:
            section.pop("torch_dtype", None)  # the key's former name
            section["dtype"] = name
        if owns_head and (section is config or _TIED in section):
            section[_TIED] = False
    config["architectures"] = [type(model).__name__]
    if packing is not None:
        config[CONFIG] = packing
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_end_tokens(target: Path, end_token_ids: Sequence[int]) -> None:
    """Into the generation config, which transformers and vLLM go by; one is made where there is none."""
    file = target / "generation_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:  # what transformers would take from the config then
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        settings = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    settings.pop("_from_model_config", None)  # or transformers would go by the config
    settings["eos_token_id"] = list(end_token_ids) if len(end_token_ids) > 1 else end_token_ids[0]
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Checked:
    """Passes the parameters on, checked, without the second name of a tied one; adds buffers that were left out."""

    def __init__(
        self, weights: Iterable[tuple[str, torch.Tensor]], model: PreTrainedModel, source: Path, dtype: torch.dtype
    ) -> None:
        self.digests: dict[str, bytes] = {}  # of what went on, in the dtype that is written
        self.owns_head = False
        self._weights, self._source, self._dtype = weights, source, dtype
        self._architecture = type(model).__name__
        self._expected = dict(model.named_parameters())  # a tied head stands under its first name only
        first_names = {id(parameter): name for name, parameter in self._expected.items()}
        everything = dict(model.named_parameters(remove_duplicate=False))
        self._aliases = {
            name: first_names[id(parameter)] for name, parameter in everything.items() if name not in self._expected
        }
        self._buffers = model.state_dict().keys() - everything.keys()
        named = (*everything.items(), *model.named_buffers())
        self._shapes = {name: tuple(tensor.shape) for name, tensor in named}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        seen: set[str] = set()
        for name, tensor in self._weights:
            self._check(name, tensor, seen)
            seen.add(name)
            if name not in self._expected and name not in self._buffers and name not in self._aliases:
                continue
            digest = self._digest(name, tensor)
            first = self._aliases.get(name)
            if first is not None:
                if digest == self.digests.get(first):
                    continue
                self.owns_head = True
            self.digests[name] = digest
            yield name, tensor
        missing = [name for name in self._expected if name not in seen]
        if missing:
            raise CheckpointError(f"{len(missing)} parameters are missing, first {missing[0]}; nothing was written")
        for name, tensor in _untrained(self._source, self._buffers - seen):
            self.digests[name] = self._digest(name, tensor)
            yield name, tensor

    def _check(self, name: str, tensor: torch.Tensor, seen: set[str]) -> None:
        if name not in self._shapes:
            raise CheckpointError(f"{name} is no parameter of {self._architecture}; nothing was written")
        shape = self._shapes[name]
        if name in seen or tuple(tensor.shape) != shape:
            fault = "came twice" if name in seen else f"has shape {list(tensor.shape)}, not {list(shape)}"
            raise CheckpointError(f"{name} {fault}; nothing was written")

    def _digest(self, name: str, tensor: torch.Tensor) -> bytes:
        """Raises CheckpointError, naming the row, for what is not finite, also by being converted."""
        written = tensor.detach().to(self._dtype) if tensor.is_floating_point() else tensor
        row = nonfinite_row(written)
        if row is not None:
            why = "not finite" if nonfinite_row(tensor) is not None else f"beyond the range of {self._dtype}"
            raise CheckpointError(f"{name}: row {row} is {why}; nothing was written")
        return tensor_digest(written)


def _untrained(source: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that were left out: training does not change them, so those that the student started from hold."""
    found = dict(read_tensors(source, _KEY, names)) if names else {}
    if found.keys() != names:
        raise CheckpointError(f"the buffer {min(names - found.keys())} is missing; nothing was written")
    yield from found.items()
