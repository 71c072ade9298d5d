"""Teachers with another tokenizer than the student's: their pairs, and whether these have enough in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gkd.config import Config
from gkd.errors import ConfigError
from gkd.models import SharedMass, Side, TokenBytes, TokenizerPair


def tokenizer_pairs(
    config: Config, student: Side, others: Mapping[str, Side], ends: Sequence[int]
) -> dict[str, TokenizerPair]:
    """`others`: teachers with another tokenizer, by name; `ends`: of the student's completions. Raises ModelError."""
    if not others:
        return {}
    own = TokenBytes(student.tokenizer, "student.model")
    found: dict[str, TokenizerPair] = {}
    for name, side in others.items():
        theirs = TokenBytes(side.tokenizer, f"{config.teacher_key(name)}.model")
        kind = config.teachers[name].alignment
        assert kind is not None
        found[name] = TokenizerPair.of(own, theirs, ends, side.end_ids, kind)
    return found


def audit(config: Config, name: str, pair: TokenizerPair, texts: Iterable[str]) -> str:
    """What a teacher's tokenizer has in common with the student's, in a line. Raises ConfigError for too little."""
    section, teacher = config.teacher_key(name), config.teachers[name]
    mass = SharedMass.of(pair, texts)
    if mass.share < teacher.min_shared_mass:
        raise ConfigError(
            f"{section}.min_shared_mass: {mass.share:.3g} is below {teacher.min_shared_mass:g}: {mass.figures}; take a "
            "teacher whose tokenizer is nearer to the student's, or lower it"
        )
    return f"{section}.alignment: {teacher.alignment}: {mass.figures}"
