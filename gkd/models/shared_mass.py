"""How much two tokenizers have in common on given texts: asked before a pair is trained.

Legend: a span holds tokens of both sides that spell the same bytes, and no shorter one does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from gkd.models.tokens_between import TokenizerPair

_MOST_TEXTS = 1000


@dataclass(frozen=True)
class SharedMass:
    """Counts on some texts."""

    pair: TokenizerPair
    texts: int
    bytes: int
    teacher_tokens: int
    shared_tokens: int  # of these: the student has one that spells the same
    student_tokens: int
    single_tokens: int  # of these: they stand in a span of one token a side

    @classmethod
    def of(cls, pair: TokenizerPair, texts: Iterable[str]) -> SharedMass:
        """Of at most so many texts as take a second or so."""
        known = {teacher_id for _, teacher_id in pair.shared}
        counts = [_count(pair, known, text) for text in islice(filter(None, texts), _MOST_TEXTS)]
        return cls(pair, len(counts), *map(sum, zip(*counts, strict=True))) if counts else cls(pair, 0, 0, 0, 0, 0, 0)

    @property
    def share(self) -> float:
        """Of the teacher's tokens; what its probabilities have on tokens that both know, as far as texts can tell."""
        return self.shared_tokens / max(1, self.teacher_tokens)

    @property
    def figures(self) -> str:
        """For people to read."""
        reached = ""
        if self.pair.alignment.kind == "projection":
            projected, goal = len(self.pair.alignment.student_ids), len(set(self.pair.alignment.teacher_ids))
            lost = len(self.pair.student.tokenizer.get_vocab()) - projected
            reached = (
                f", {projected - len(self.pair.shared)} more of the student's go to the first token that the teacher "
                f"would write, {lost} nowhere, and {goal} of the teacher's are reached"
            )
        singles = self.single_tokens / max(1, self.student_tokens)
        sizes = [self.bytes / max(1, tokens) for tokens in (self.student_tokens, self.teacher_tokens)]
        return (
            f"{len(self.pair.shared)} ids are the same to both tokenizers{reached}; "
            f"of {self.texts} texts {self.share:.1%} of the teacher's tokens are tokens of the student, {singles:.1%} "
            "of the student's stand alone beside one of the teacher's, and a token has "
            f"{sizes[0]:.1f} bytes for the student and {sizes[1]:.1f} for the teacher"
        )


def _count(pair: TokenizerPair, known: set[int], text: str) -> tuple[int, int, int, int, int]:
    data = bytes(byte for byte in text.encode() if byte not in pair.student.unreadable)
    ids = pair.student.encode(data)
    read = pair.read_by_teacher(ids)
    lengths, others = Counter(read.source_spans), Counter(read.spans)
    singles = sum(lengths[span] == 1 == others[span] for span in others)
    return len(data), len(read.ids), sum(index in known for index in read.ids), len(ids), singles
