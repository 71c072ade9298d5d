"""Whether a folder's weights are those of the architecture that its config names: told by file headers, nothing is
loaded. transformers would make up what is missing, and say so after the whole model is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gkd.errors import ModelError
from gkd.models.hub import explained, is_hub_name
from gkd.models.load import check_readable, empty_model, read_config, refuse_missing
from gkd.models.quantized_files import plain_names
from gkd.models.resolve import local_folder
from gkd.models.weight_files import read_header, weight_files
from gkd.models.weights import file_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMPILED = "_orig_mod."


def check_covers(path: str, *, key: str, may_be_packed: bool = False) -> None:
    """Raises ModelError, starting with `key`, for weights that are quantized, that a compiled model was saved with, or
    that lack a tensor. A name on the hub is taken as it is: its files need not be here yet. `may_be_packed`: by
    compressed-tensors."""
    if is_hub_name(path):
        return
    folder = local_folder(path, key=key)
    config = read_config(path, key=key)
    scheme = check_readable(config, path, key, may_be_packed=may_be_packed)
    found = {name for file in weight_files(folder, key) for name in read_header(file, key)}
    found = found if scheme is None else plain_names(found)
    wrapped = sorted(name for name in found if _COMPILED in name)
    if wrapped:
        raise ModelError(
            f"{key}: {path} was saved from torch.compile's wrapper ({wrapped[0]}): save the model inside it, "
            "`model._orig_mod.save_pretrained(...)`, or take `_orig_mod.` out of the names"
        )
    with explained(path, key):
        model = empty_model(config)
        missing = set(_missing(model, found))
    refuse_missing(missing, model, path, key)


def _missing(model: PreTrainedModel, found: set[str]) -> Iterator[str]:
    """Parameters that no tensor of the files becomes, and those of several tensors of which some are not there."""
    targets, converted = _targets(model, found)
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    names_of: dict[int, list[str]] = {}  # a tied one has several
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for names in names_of.values():
        if targets.isdisjoint(names) and not any(pattern.search(names[0]) for pattern in optional):
            yield names[0]
    for name in converted & targets:
        parts = {part for part, _ in file_tensors(model, [(name, model.get_parameter(name))])}
        if not parts.isdisjoint(found):
            yield from parts - found


def _targets(model: PreTrainedModel, found: set[str]) -> tuple[set[str], set[str]]:
    """The model's names that the files' names become by transformers' rules, and those of them that are made of
    several or cut."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = dict(model.named_parameters(remove_duplicate=False))
    targets, converted = set[str](), set[str]()
    for name in found:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if target not in own and name in own:
            target, pattern = name, None
        targets.add(target)
        if pattern is not None and target in own:
            converted.add(target)
    return targets, converted
