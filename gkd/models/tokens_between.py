"""A text between two tokenizers: its bytes stay, and where both put a border it is compared.

Legend: N tokens that are read, M tokens of the other tokenizer that spell the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from gkd.errors import ModelError
from gkd.models.end_tokens import closing_token_id
from gkd.models.token_bytes import TokenBytes
from gkd.types import Alignment, AlignmentKind

NO_SPAN = -1  # of a token that the other side has nothing for


@dataclass
class Translation:
    """The same bytes in the other tokenizer's tokens, and the shortest spans that both cut the text into.

    Spans are numbered from 0, in order, and each holds at least one token of both. A token that the other side has
    nothing for, such as a control token of its own, stands in none, and the other side reads nothing in its place.
    """

    ids: list[int] = field(default_factory=list)  # [M]
    spans: list[int] = field(default_factory=list)  # [M]
    source_spans: list[int] = field(default_factory=list)  # [N]

    def cut(self, most: int) -> Translation:
        """At most so many tokens; what is read of a span that is cut through is compared with nothing."""
        if len(self.ids) <= most:
            return self
        whole = self.spans[most]  # as many spans are read to their end
        ids = self.ids[: bisect_left(self.spans, whole)]
        kept = [span if span < whole else NO_SPAN for span in self.source_spans]
        return Translation(ids, self.spans[: len(ids)], kept)


def translate(ids: Sequence[int], source: TokenBytes, target: TokenBytes, control: Mapping[int, int]) -> Translation:
    """`control`: which of the target's tokens stand for control tokens of the source."""
    found, run = Translation(), list[int]()

    def end_run() -> None:
        _add_run(found, run, source, target)
        run.clear()

    for token in ids:
        spelled = source.of(token)
        if spelled and target.unreadable.isdisjoint(spelled):
            run.append(token)
            continue
        end_run()
        span = NO_SPAN
        if token in control:
            span = _next_span(found)
            found.ids.append(control[token])
            found.spans.append(span)
        found.source_spans.append(span)
    end_run()
    return found


def _add_run(found: Translation, run: Sequence[int], source: TokenBytes, target: TokenBytes) -> None:
    """Tokens that spell bytes, all of which the target can spell, too."""
    pieces = [source.of(token) or b"" for token in run]
    ids = target.encode(b"".join(pieces))
    ends, target_ends = ([*accumulate(map(len, own))] for own in (pieces, (target.of(i) or b"" for i in ids)))
    common = sorted({*ends} & {*target_ends})
    first = _next_span(found)
    found.source_spans += [first + bisect_left(common, end) for end in ends]
    found.spans += [first + bisect_left(common, end) for end in target_ends]
    found.ids += ids


def _next_span(found: Translation) -> int:
    return found.spans[-1] + 1 if found.spans else 0


@dataclass(frozen=True)
class TokenizerPair:
    """A student and a teacher with another tokenizer."""

    student: TokenBytes
    teacher: TokenBytes
    to_teacher: Mapping[int, int]  # control tokens
    to_student: Mapping[int, int]
    teacher_ends: tuple[int, ...]  # what ends a completion that the teacher writes
    alignment: Alignment

    @classmethod
    def of(
        cls,
        student: TokenBytes,
        teacher: TokenBytes,
        student_ends: Sequence[int],
        teacher_ends: Sequence[int],
        kind: AlignmentKind = "shared",
    ) -> TokenizerPair:
        """The ends are what ends a completion on either side, the most usual one first. Raises ModelError without."""
        for side, ends in ((student, student_ends), (teacher, teacher_ends)):
            if not ends:
                raise ModelError(f"{side.key}: its tokenizer has no end token, which a completion could be read to")
        control = _control_pairs(student, teacher, student_ends, teacher_ends)
        known = {student_id for student_id, _ in control}, {teacher_id for _, teacher_id in control}
        to_teacher = dict.fromkeys(student_ends, _end_of(teacher, teacher_ends)) | dict(control)
        to_student = dict.fromkeys(teacher_ends, _end_of(student, student_ends)) | {t: s for s, t in control}
        spelled = _equal_bytes(student, teacher)
        shared = sorted([*control, *(pair for pair in spelled if pair[0] not in known[0] and pair[1] not in known[1])])
        pairs = shared if kind != "projection" else _projected(student, teacher, shared)
        own, others = tuple(own for own, _ in pairs), tuple(other for _, other in pairs)
        alignment = Alignment(kind, own, others, tuple(shared))
        return cls(student, teacher, to_teacher, to_student, tuple(teacher_ends), alignment)

    @property
    def shared(self) -> tuple[tuple[int, int], ...]:
        return self.alignment.shared

    def read_by_teacher(self, completion_ids: Sequence[int]) -> Translation:
        return translate(completion_ids, self.student, self.teacher, self.to_teacher)

    def for_student(self, completion_ids: Sequence[int]) -> tuple[int, ...]:
        """What the teacher wrote, in the student's tokens."""
        return tuple(translate(completion_ids, self.teacher, self.student, self.to_student).ids)


def _end_of(side: TokenBytes, ends: Sequence[int]) -> int:
    """The token that ends a completion: by which the chat template closes an answer, or the first."""
    closing = closing_token_id(side.tokenizer)
    return ends[0] if closing is None or closing not in ends else closing


def _control_pairs(
    student: TokenBytes, teacher: TokenBytes, student_ends: Sequence[int], teacher_ends: Sequence[int]
) -> list[tuple[int, int]]:
    """Tokens of one role: what ends a completion, what ends a text, what begins one; then those of one name."""
    by_name = {name: index for index, name in teacher.control.items()}
    roles = [
        (_end_of(student, student_ends), _end_of(teacher, teacher_ends)),
        *((getattr(student.tokenizer, role), getattr(teacher.tokenizer, role)) for role in _ROLES),
        *((index, by_name.get(name)) for index, name in student.control.items()),
    ]
    found: dict[int, int] = {}
    for student_id, teacher_id in roles:
        if not isinstance(student_id, int) or not isinstance(teacher_id, int):
            continue
        if student_id not in found and teacher_id not in found.values():
            found[student_id] = teacher_id
    return list(found.items())


def _projected(student: TokenBytes, teacher: TokenBytes, shared: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Every token of the student goes where it has its like, else to the first token of what the teacher would read:
    the one that it has to begin with to write the same. Control tokens without their like go nowhere."""
    found = dict(shared)
    for student_id in student.tokenizer.get_vocab().values():
        spelled = student.of(student_id)
        if student_id not in found and spelled and teacher.unreadable.isdisjoint(spelled):
            found[student_id] = teacher.encode(spelled)[0]
    return sorted(found.items())


_ROLES = ("eos_token_id", "bos_token_id")


def _equal_bytes(student: TokenBytes, teacher: TokenBytes) -> Iterable[tuple[int, int]]:
    """Each token once: where bytes have several tokens on a side, first those of the same name."""
    names = teacher.tokenizer.get_vocab()
    taken: set[int] = set()
    left: list[int] = []
    for name, student_id in sorted(student.tokenizer.get_vocab().items(), key=lambda item: item[1]):
        spelled, teacher_id = student.of(student_id), names.get(name)
        if not spelled:
            continue
        if teacher_id is not None and teacher.of(teacher_id) == spelled:
            taken.add(teacher_id)
            yield student_id, teacher_id
        else:
            left.append(student_id)
    for student_id in left:
        spelled = student.of(student_id) or b""
        teacher_id = teacher.ids.get(spelled)
        if teacher_id is not None and student.ids[spelled] == student_id and teacher_id not in taken:
            taken.add(teacher_id)
            yield student_id, teacher_id
