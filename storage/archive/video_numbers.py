"""The table of numbers: each combination of video, model and sampling gets a number once, and keeps it."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from storage.archive.delta import RowTable
from storage.checks import INT32, VIDEO_ID, check_column_range, check_column_text
from storage.errors import ArchiveError
from storage.records import Sampling

NUMBERS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("video_number", pa.int32(), nullable=False),
    ]
)


def check(rows: pa.Table) -> None:
    """Raises InvalidValue if vidx cannot have written the rows."""
    check_column_text("video_id", rows.column("video_id"), VIDEO_ID)
    check_column_range("video_number", rows.column("video_number"), 1, INT32)
    for sampling in rows.column("sampling").unique().to_pylist():
        Sampling.from_text(sampling)


class NumberTable:
    """The numbers of one model's videos, by (video id, sampling)."""

    def __init__(self, uri: str, model_id: str):
        self._uri = uri
        self._model_id = model_id

    @cached_property
    def _table(self) -> RowTable:
        """Opened at the first use: a search does not need it."""
        return RowTable(self._uri, NUMBERS, check)

    def known(self) -> dict[tuple[str, str], int]:
        """The numbers of this model's videos."""
        return self._known(self._table.rows())

    def all_given(self) -> set[int]:
        """The numbers of every model's videos."""
        return set(self._table.rows().column("video_number").to_pylist())

    def reserve(self, keys: Sequence[tuple[str, str]], in_use: set[int]) -> dict[tuple[str, str], int]:
        """The number of each key; a key without one gets the next number that is neither given nor in use."""
        wanted = list(dict.fromkeys(keys))
        given: dict[tuple[str, str], int] = {}

        def plan(rows: pa.Table) -> tuple[np.ndarray, pa.Table]:
            given.clear()
            given.update(self._known(rows))
            first = max([0, *rows.column("video_number").to_pylist(), *in_use]) + 1
            new = [key for key in wanted if key not in given]
            if first + len(new) > INT32:
                raise ArchiveError("the archive has given all its numbers; index into a new --archive")
            given.update(zip(new, range(first, first + len(new))))
            added = [
                {"video_id": key[0], "model_id": self._model_id, "sampling": key[1], "video_number": given[key]}
                for key in new
            ]
            return np.ones(rows.num_rows, bool), pa.Table.from_pylist(added, NUMBERS)

        self._table.change(plan)
        return {key: given[key] for key in wanted}

    def restore(self, lost: Sequence[Mapping[str, str | int]]) -> None:
        """Adds rows, with the columns of NUMBERS; rows whose number the table already has are left out."""

        def plan(rows: pa.Table) -> tuple[np.ndarray, pa.Table]:
            known = set(rows.column("video_number").to_pylist())
            missing = [row for row in lost if row["video_number"] not in known]
            return np.ones(rows.num_rows, bool), pa.Table.from_pylist(missing, NUMBERS)

        self._table.change(plan)

    def _known(self, rows: pa.Table) -> dict[tuple[str, str], int]:
        columns = (rows.column(name).to_pylist() for name in NUMBERS.names)
        return {
            (video_id, sampling): number
            for video_id, model_id, sampling, number in zip(*columns, strict=True)
            if model_id == self._model_id
        }
