"""The result of a run: a folder that transformers and vLLM load, with a model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gkd.config import LoraConfig
from gkd.errors import CheckpointError
from gkd.models.folders import copy_side_files, written_aside
from gkd.models.load import empty_model, read_config, torch_dtype
from gkd.models.lora import save_adapter
from gkd.models.resolve import local_folder
from gkd.models.weights import check_model_folder, file_tensors, read_tensors, write_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_KEY = "student.model"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class ModelCard:
    """What the README.md of a result tells."""

    teacher: str
    student: str  # what it was made from
    objective: Mapping[str, Any]  # the config's section
    mixture: Mapping[str, float]  # source of a completion -> its configured share
    data: str
    steps: int
    versions: Mapping[str, str]  # library -> version
    lora: LoraConfig | None = None  # of a student that was trained through an adapter
    heldout: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # measure -> (before, after)
    name: str | None = None
    base_models: tuple[str, ...] = ()  # names on the hub, for its index
    license: str | None = None  # the hub's identifier: "apache-2.0"

    def render(self) -> str:
        """The card in Markdown, after a YAML head that the hub reads."""
        head: dict[str, Any] = {
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["knowledge-distillation", "on-policy-distillation", "gkd"],
        }
        if self.base_models:
            head["base_model"] = list(self.base_models)
        if self.license:
            head["license"] = self.license
        head["distillation"] = {
            "teacher": self.teacher,
            "student": self.student,
            "objective": dict(self.objective),
            "mixture": dict(self.mixture),
            "data": self.data,
            "steps": self.steps,
            **({} if self.lora is None else {"lora": self.lora.model_dump(mode="json")}),
            "heldout": {name: {"before": old, "after": new} for name, (old, new) in self.heldout.items()},
            "versions": dict(self.versions),
        }
        front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
        return f"---\n{front}---\n\n{self._body()}"

    def _body(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.objective.items() if name != "kind")
        rows = [
            ("Teacher", self.teacher),
            ("Student made from", self.student),
            ("Objective", f"{self.objective.get('kind', '')} ({settings})"),
            ("Completions by", ", ".join(f"{name} {share:.0%}" for name, share in self.mixture.items())),
            ("Data", self.data),
            ("Steps", str(self.steps)),
        ]
        if self.lora is not None:
            rows.append(("Trained by LoRA", f"rank {self.lora.rank}, alpha {self.lora.alpha:g}; merged here"))
        parts = [
            f"# {_cell(self.name or f'Distilled from {self.teacher}')}",
            "A language model distilled by gkd: the teacher scores every token of completions that are drawn from "
            "the student, the teacher and the data in the shares below.",
            _table(("", ""), rows),
        ]
        if self.heldout:
            figures = [(name, f"{old:.4g}", f"{new:.4g}") for name, (old, new) in self.heldout.items()]
            parts += ["## On held-out prompts", _table(("measure", "before", "after"), figures)]
        parts += ["## Made with", _table(("library", "version"), self.versions.items()), "## Use", _USE]
        if self.lora is not None:
            parts.append(_USE_ADAPTER)
        return "\n\n".join(parts) + "\n"


_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
```"""


_USE_ADAPTER = f"""\
The adapter alone, in float32, is in `{ADAPTER_FOLDER}/`, for the model that the student was made from:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "{ADAPTER_FOLDER}")
```"""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that cannot leave its table cell or become HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def save_final(
    folder: str | Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    source_folder: str | Path,
    dtype: str | torch.dtype,
    card: ModelCard,
    *,
    revision: str | None = None,
    adapter: Iterable[tuple[str, torch.Tensor]] = (),
) -> Path:
    """Writes the trained student to `folder` and returns it; an earlier result there is replaced.

    `weights` are the parameters by transformers' names, full tensors in any float dtype; each is copied before the
    next is asked for, so that they can be gathered one at a time. Where gathering is collective, only the main rank
    calls this and the others run through the same iterator. A tied head may be left out, as may buffers.
    Config, tokenizer, chat template and generation config come from `source_folder`, the model that the student
    started from (a folder or hub name); the config's dtype becomes `dtype`. Of a LoRA student, whose card says so,
    `weights` are merged, and `adapter` is asked for after them and written beside them in peft's format.

    Raises CheckpointError, leaving `folder` as it was, if a parameter is missing, unknown, or of another shape.
    """
    target, target_dtype = Path(folder), torch_dtype(dtype)
    source = local_folder(str(source_folder), revision=revision, key=_KEY)
    model = empty_model(read_config(str(source), key=_KEY))
    with written_aside(target, replace=True) as partial:
        copy_side_files(source, partial)
        _write_config(source, model, target_dtype, partial)
        complete = file_tensors(model, _complete(weights, model, source))
        write_weights(partial, complete, target_dtype)
        if card.lora is not None:
            save_adapter(partial / ADAPTER_FOLDER, adapter, card.lora, str(source_folder))
        (partial / "README.md").write_text(card.render(), encoding="utf-8")
        check_model_folder(partial, _KEY)
    return target


def _write_config(source: Path, model: PreTrainedModel, dtype: torch.dtype, target: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if section is config or "dtype" in section or "torch_dtype" in section:
            section.pop("torch_dtype", None)  # the key's former name
            section["dtype"] = name
    config["architectures"] = [type(model).__name__]
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _complete(
    weights: Iterable[tuple[str, torch.Tensor]], model: PreTrainedModel, source: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes the parameters on, checked, without the second name of a tied one; adds buffers that were left out."""
    expected = dict(model.named_parameters())  # a tied head stands under its first name only
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - expected.keys()
    buffers = model.state_dict().keys() - expected.keys() - aliases
    shapes = {name: tensor.shape for name, tensor in (*expected.items(), *model.named_buffers())}
    seen: set[str] = set()
    for name, tensor in weights:
        if name in aliases:
            continue
        if name not in shapes:
            raise CheckpointError(f"{name} is no parameter of {type(model).__name__}; nothing was written")
        if name in seen or tensor.shape != shapes[name]:
            fault = "came twice" if name in seen else f"has shape {list(tensor.shape)}, not {list(shapes[name])}"
            raise CheckpointError(f"{name} {fault}; nothing was written")
        seen.add(name)
        if name in expected or name in buffers:
            yield name, tensor
    missing = [name for name in expected if name not in seen]
    if missing:
        raise CheckpointError(f"{len(missing)} parameters are missing, first {missing[0]}; nothing was written")
    yield from _untrained(source, buffers - seen)


def _untrained(source: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that were left out: training does not change them, so those that the student started from hold."""
    found = {name: tensor for name, tensor in read_tensors(source, _KEY) if name in names} if names else {}
    if found.keys() != names:
        raise CheckpointError(f"the buffer {min(names - found.keys())} is missing; nothing was written")
    yield from found.items()
