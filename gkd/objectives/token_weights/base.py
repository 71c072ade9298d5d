"""What a weight of tokens is, and what it may look at.

Legend: n rows of a segment, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from gkd.schema import Section

if TYPE_CHECKING:
    from torch import Tensor

    from gkd.objectives.measures import RowMeasures, SequenceMeasures


class Weighed(Protocol):
    """What a weight may ask of the term that it stands at."""

    is_divergence: ClassVar[bool]

    @property
    def kind(self) -> str: ...


class TokenWeight(Section):
    """Options of a weight, and what it needs; a subclass of one of the two below."""

    needs_teacher: ClassVar[bool] = False
    needs_whole_teacher: ClassVar[bool] = False  # its distribution over the vocabulary: not from a teacher's top k

    def misfit(self, term: Weighed) -> str | None:
        """Why it cannot stand at this term, or None."""
        return None


class RowWeight(TokenWeight):
    """A weight that a row's two distributions decide, where they are at hand."""

    needs_teacher: ClassVar[bool] = True  # by-products of a row come with its divergence
    needs_divergence: ClassVar[bool] = False  # the term's own

    def of_rows(self, rows: RowMeasures) -> Tensor:
        """[n], detached."""
        raise NotImplementedError

    def misfit(self, term: Weighed) -> str | None:
        if self.needs_divergence and not term.is_divergence:
            return f"is of the term's own divergence, and {term.kind} is none"
        return None


class SequenceWeight(TokenWeight):
    """A weight that needs the log-probabilities of whole sequences first: one more product a side before the loss."""

    needs_teacher_logprobs: ClassVar[bool] = False

    def of_sequences(self, sequences: SequenceMeasures) -> Tensor:
        """[N], detached. Tokens of a sequence stand together, in order."""
        raise NotImplementedError
