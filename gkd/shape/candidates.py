"""Students that could be cut out of a teacher: depths times widths, and how large each is. Loads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from gkd.config import LayerRule, StudentInit, StudentWidth
from gkd.errors import ConfigError, InputError, ModelError, shown
from gkd.models import config_of_layers, empty_model, narrow_config, read_config, width_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Widths = Literal["both", "heads", "geometric", "none"]
_DEPTHS = 12  # numbers of layers tried at each width, evenly spaced
_LEAST = 0.25  # of the teacher's layers, channels and heads: of less hardly anything is left that was learned
_MOST_GROUPS = 6  # widths that go with the heads, of a teacher that has many
_RATIO = math.sqrt(0.5)  # of one width to the one before, where they shrink geometrically
_MULTIPLE = 8  # that channels and neurons are rounded to: what tensor cores work with
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Candidate:
    """A student: `layers` of the teacher's, and its sizes; `name` is layers x channels x query heads."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    parameters: int
    share: float  # of the teacher's parameters
    is_whole_depth: bool
    is_whole_width: bool

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.hidden}x{self.heads}"

    @property
    def sizes(self) -> dict[str, int]:
        """As `StudentWidth` names them."""
        return {"hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}

    def init(self, choose: LayerRule, calibration_tokens: int) -> StudentInit:
        """What `student.init` has to say for it."""
        return StudentInit(
            layers=None if self.is_whole_depth else self.layers,
            choose="even" if self.is_whole_depth else choose,
            width=None if self.is_whole_width else StudentWidth(**self.sizes),
            calibration_tokens=calibration_tokens,
        )

    def as_record(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Candidates:
    """Of a teacher with so many parameters, smallest first."""

    all: tuple[Candidate, ...]
    teacher_parameters: int
    teacher_layers: int

    def within(self, share: tuple[float, float]) -> list[Candidate]:
        """Those with at least and at most these shares. Raises InputError, with the nearest, if there are none."""
        low, high = share
        found = [candidate for candidate in self.all if low <= candidate.share <= high]
        if not found:
            nearest = min(self.all, key=lambda one: max(low / one.share, one.share / high))
            raise InputError(
                f"--share: no candidate has {low:g} to {high:g} of the teacher's {self.teacher_parameters:,} "
                f"parameters; the nearest is {nearest.name} with {nearest.share:.3f}"
            )
        return found

    def named(self, name: str) -> Candidate:
        """Raises InputError for a name that none has."""
        for candidate in self.all:
            if candidate.name == name:
                return candidate
        raise InputError(
            f"--pick: {shown(name)} is no candidate; the table names them, as layers x channels x heads, e.g. "
            f"{self.all[0].name}"
        )


def parse_share(text: str) -> tuple[float, float]:
    """`0.05..0.5` as two numbers. Raises InputError."""
    low, dots, high = text.partition("..")
    try:
        share = float(low), float(high)
    except ValueError:
        share = (math.nan, math.nan)
    if not dots or not 0.0 < share[0] <= share[1] < 1.0:
        raise InputError(f"--share: {shown(text)} is no range; write LOW..HIGH, both between 0 and 1, e.g. 0.05..0.5")
    return share


def families_named(word: str) -> Widths:
    """Raises InputError."""
    if word not in get_args(Widths):
        raise InputError(f"--widths: {shown(word)} is none of {', '.join(get_args(Widths))}")
    return word  # pyright: ignore[reportReturnType]  it was just looked up


def candidates_of(source: str, widths: Widths, *, revision: str | None = None) -> Candidates:
    """All that can be cut out of the resolved model `source`.

    Raises ModelError for a model whose layers cannot be left out, or, unless `widths` is "none", whose width cannot be
    changed: only those of the Llama, Qwen and Gemma families can.
    """
    whole = read_config(source, revision=revision, key="teacher.model")
    available = whole.get_text_config().num_hidden_layers
    config_of_layers(source, max(1, available - 1), revision=revision)  # raises for what cannot be cut
    teacher = _Count.of(whole)
    found: dict[str, Candidate] = {}
    for config in (whole, *_narrower(whole, widths)):
        count, is_whole_width = _Count.of(config), config is whole
        for layers in _depths(available, with_all=not is_whole_width):
            candidate = Candidate(
                layers=layers,
                **_sizes(config),
                parameters=count.with_layers(layers),
                share=count.with_layers(layers) / teacher.with_layers(available),
                is_whole_depth=layers == available,
                is_whole_width=is_whole_width,
            )
            found.setdefault(candidate.name, candidate)
    ordered = sorted(found.values(), key=lambda one: (one.parameters, one.layers))
    return Candidates(tuple(ordered), teacher.with_layers(available), available)


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most `count` of them, as far apart as can be in size and in shape: each is the one that is farthest from
    those before it, beginning with the largest. In the order of their parameters."""
    chosen: list[Candidate] = []
    left = sorted(candidates, key=lambda one: (-one.parameters, one.layers))
    while left and len(chosen) < count:
        chosen.append(max(left, key=lambda one: min((_distance(one, other) for other in chosen), default=0.0)))
        left.remove(chosen[-1])
    return sorted(chosen, key=lambda one: (one.parameters, one.layers))


def _distance(one: Candidate, other: Candidate) -> float:
    """In the logarithms of parameters, and of depth by width."""
    aspects = (math.log(candidate.layers / candidate.hidden) for candidate in (one, other))
    return math.hypot(math.log(one.parameters / other.parameters), next(aspects) - next(aspects))


# ---- depths and widths


def _depths(available: int, *, with_all: bool) -> list[int]:
    depths = {max(1, round(available * part / _DEPTHS)) for part in range(round(_LEAST * _DEPTHS), _DEPTHS + 1)}
    return sorted(depths if with_all else depths - {available})


def _narrower(whole: PreTrainedConfig, widths: Widths) -> Iterator[PreTrainedConfig]:
    """Sizes that the family does not take are left out; raises ModelError for a family that cannot be made narrower."""
    if widths == "none":
        return
    sizes = _sizes(whole)
    asked: list[dict[str, int]] = []
    asked += _with_heads(sizes) if widths in ("both", "heads") else []
    asked += _geometric(sizes) if widths in ("both", "geometric") else []
    for smaller in asked:
        try:
            yield narrow_config(whole, StudentWidth(**smaller))
        except ConfigError:
            continue
        except ModelError as error:
            raise ModelError(f"{error}; --widths none looks at numbers of layers alone") from None


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """`width_sizes`, and of other families than those that it is for what they have."""
    text_config = config.get_text_config()
    if hasattr(text_config, "intermediate_size"):
        return width_sizes(config)
    heads = text_config.num_attention_heads
    return {"hidden": text_config.hidden_size, "heads": heads, "kv_heads": heads, "ffn": 0}


def _with_heads(sizes: dict[str, int]) -> list[dict[str, int]]:
    """Heads go with the width: with k of K key-value heads all other sizes are k/K of what they are, too."""
    groups = sizes["kv_heads"]
    numbers = {round(groups * part / (_MOST_GROUPS + 1)) for part in range(1, _MOST_GROUPS + 1)} - {groups}
    return [
        {
            "hidden": _rounded(sizes["hidden"] * kept / groups, sizes["heads"] // groups * kept),
            "heads": sizes["heads"] // groups * kept,
            "kv_heads": kept,
            "ffn": _rounded(sizes["ffn"] * kept / groups, _MULTIPLE),
        }
        for kept in sorted(numbers)
        if kept >= _LEAST * groups
    ]


def _geometric(sizes: dict[str, int]) -> list[dict[str, int]]:
    """Channels and neurons shrink by the same factor from one width to the next; all heads stay."""
    multiple = math.lcm(sizes["heads"], _MULTIPLE)
    factors = (_RATIO**step for step in range(1, round(math.log(_LEAST, _RATIO)) + 1))
    return [
        {
            **sizes,
            "hidden": min(sizes["hidden"], _rounded(sizes["hidden"] * factor, multiple)),
            "ffn": min(sizes["ffn"], _rounded(sizes["ffn"] * factor, _MULTIPLE)),
        }
        for factor in factors
    ]


def _rounded(size: float, multiple: int) -> int:
    return max(1, round(size / multiple)) * multiple


@dataclass(frozen=True)
class _Count:
    """Parameters of a model, a tied head once."""

    outside: int
    layers: int  # all of them together
    number: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> _Count:
        inside = outside = 0
        for name, parameter in empty_model(config).named_parameters():
            if _LAYER.search(name):
                inside += parameter.numel()
            else:
                outside += parameter.numel()
        return cls(outside, inside, config.get_text_config().num_hidden_layers)

    def with_layers(self, layers: int) -> int:
        """Where layers differ, as in some mixtures of experts, so many of their mean."""
        return self.outside + round(self.layers * layers / self.number)
