"""The README.md of a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from gkd.config import LoraConfig

ADAPTER_FOLDER = "adapter"  # of the result's folder


@dataclass(frozen=True)
class ModelCard:
    """What the README.md of a result tells."""

    teacher: str
    student: str  # what it was made from
    objective: Mapping[str, Any]  # the config's section
    mixture: Mapping[str, Any]  # source of a completion -> its configured share, a number or a schedule
    data: str
    steps: int
    versions: Mapping[str, str]  # library -> version
    lora: LoraConfig | None = None  # of a student that was trained through an adapter
    heldout: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # measure -> (before, after)
    name: str | None = None
    base_models: tuple[str, ...] = ()  # names on the hub, for its index
    license: str | None = None  # the hub's identifier: "apache-2.0"
    objective_text: str = ""  # the objective in words

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
        rows = [
            ("Teacher", self.teacher),
            ("Student made from", self.student),
            ("Objective", self.objective_text),
            ("Completions by", ", ".join(f"{name} {_share(share)}" for name, share in self.mixture.items())),
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


def _share(share: Any) -> str:
    return f"{share:.0%}" if isinstance(share, (int, float)) else f"{share['from']:.0%} to {share['to']:.0%}"


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
