"""Things that a config chooses by name: those of the house, and those that a plugin adds.

    TERMS = Registry[type[Term]]("term", {"cross_entropy": "gkd.objectives.terms.cross_entropy:CrossEntropy"})
    TERMS.register("my_term", MyTerm)      # in a module that the config's `plugins` names

What is built in is named by where it stands and imported when it is asked for: to know the names costs nothing.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from gkd.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to things of one sort; every process of a run fills its own."""

    def __init__(self, noun: str, built_in: Mapping[str, str]) -> None:
        """`noun` is for messages; `built_in` maps names to "module:attribute"."""
        self.noun = noun
        self._built_in = dict(built_in)
        self._found: dict[str, T] = {}

    def register(self, name: str, value: T) -> T:
        """Adds `value`. Raises ConfigError for a name that is taken by something else, or that no YAML key could be."""
        if not re.fullmatch(r"[a-z]\w*", name):
            raise ConfigError(f"{self.noun} {name!r}: a name is a lower-case letter, then letters, digits and '_'")
        if name in self._built_in or self._found.get(name, value) is not value:
            raise ConfigError(f"{self.noun} {name!r}: the name is taken; choose another")
        self._found[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        """Raises KeyError for a name that nobody registered; see `explain`."""
        if name not in self._found:
            module, attribute = self._built_in[name].split(":")
            self._found[name] = getattr(importlib.import_module(module), attribute)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._built_in or name in self._found)

    def names(self) -> tuple[str, ...]:
        """Built in ones first, each group in the order of its registration."""
        return tuple(dict.fromkeys([*self._built_in, *self._found]))

    def explain(self, name: object) -> str:
        """What is wrong with a name that is not in the table, and what may have been meant."""
        nearest = difflib.get_close_matches(str(name), self.names(), n=1, cutoff=0.4)
        meant = f"; did you mean {nearest[0]!r}?" if nearest else ";"
        return f"unknown {self.noun} {name!r}{meant} known: {', '.join(self.names())}"


REPLAY = "replay"  # the source of texts that an older student sampled


class Drawn(Enum):
    """Who draws the tokens of a source's texts. P is the teacher, Q the student."""

    BY_STUDENT = auto()  # of the step: on policy
    BY_EARLIER_STUDENT = auto()
    FROM_MIXTURE = auto()  # each from a P + (1 - a) Q in the step, a the rollout's `teacher_share`
    CORRECTED = auto()  # by the student of the step, and by the teacher instead where it would not have said that
    ELSEWHERE = auto()  # the text comes back as it is, and the student's sampler is not asked

    @property
    def in_step(self) -> bool:
        """The student's sampler takes part, with the weights of the step."""
        return self is Drawn.BY_STUDENT or self.with_teacher

    @property
    def with_teacher(self) -> bool:
        """The teacher takes part, in the step."""
        return self in (Drawn.FROM_MIXTURE, Drawn.CORRECTED)

    @property
    def asks_sampler(self) -> bool:
        """It may, so that the sampler has to have the weights of the step."""
        return self is not Drawn.ELSEWHERE


class SourceRegistry(Registry[Any]):
    """Classes of `gkd.rollout.sources.Source`, and who draws the tokens of their texts."""

    def __init__(self, built_in: Mapping[str, tuple[str, Drawn]]) -> None:
        super().__init__("source", {name: place for name, (place, _) in built_in.items()})
        self._drawn = {name: drawn for name, (_, drawn) in built_in.items()}

    def register(self, name: str, value: Any, drawn: Drawn = Drawn.ELSEWHERE) -> Any:
        super().register(name, value)
        self._drawn[name] = drawn
        return value

    def drawn(self, name: str) -> Drawn:
        """Raises KeyError for a name that nobody registered."""
        return self._drawn[name]


SOURCES = SourceRegistry(
    {
        "student": ("gkd.rollout.sources.student:StudentSource", Drawn.BY_STUDENT),
        "teacher": ("gkd.rollout.sources.teacher:TeacherSource", Drawn.ELSEWHERE),
        "dataset": ("gkd.rollout.sources.dataset:DatasetSource", Drawn.ELSEWHERE),
        REPLAY: ("gkd.rollout.sources.replay:ReplaySource", Drawn.BY_EARLIER_STUDENT),
        "mixed": ("gkd.rollout.sources.mixed:MixedSource", Drawn.FROM_MIXTURE),
        "speculative": ("gkd.rollout.sources.speculative:SpeculativeSource", Drawn.CORRECTED),
    }
)
"""Where the completions of a mixture come from."""
