"""What an operator is to the rest of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gkd.author.records import Drop, Record, RowState, Tally
from gkd.author.templates import RenderError
from gkd.errors import DataError


class Operator:
    """A step of a recipe, made from its form and checked: `where` is its key, `needs` field -> the key that reads it,
    `makes` the fields that its records have afterwards, `goes_in_order` whether what it does to a row depends on the
    rows before it."""

    goes_in_order = False
    needs: dict[str, str]
    makes: Sequence[str] = ()

    def __init__(self, index: int, where: str) -> None:
        self.index, self.where = index, where
        self.needs = {}

    async def apply(self, rows: Sequence[RowState], tally: Tally) -> None:
        """Replaces the records of each row. Raises what ends the run."""
        for row in rows:
            given = row.records
            row.records = list(self.of_row(row, tally))
            tally.passed(self.index, len(given), len(row.records))

    def of_row(self, row: RowState, tally: Tally) -> Iterable[Record]:
        """What is left of a row's records; what is not is counted in `tally`."""
        for record in row.records:
            try:
                yield self.of_record(record, row)
            except Drop as drop:
                tally.drop(self.index, drop, row.origin, record)
            except RenderError as error:
                tally.drop(self.index, Drop("a template or expression fails", str(error)), row.origin, record)
            except DataError as error:
                tally.drop(self.index, Drop("no row that can be trained on", str(error)), row.origin, record)

    def of_record(self, record: Record, row: RowState) -> Record:
        """What the record becomes. Raises Drop, RenderError or DataError where it goes no further."""
        raise NotImplementedError

    def check_row(self, record: Record, origin: str) -> None:
        """Raises InputError for an input row that the operator cannot work on, before anything is asked."""
        del record, origin
