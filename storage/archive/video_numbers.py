"""The table of numbers: each combination of video, model and sampling gets a number once, and keeps it."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa

from storage.archive.row_table import NONE, Check, Rows, RowTable
from storage.archive.video_rows import SAMPLING_CHECK
from storage.checks import INT32, VIDEO_ID, check_column_range, check_column_text
from storage.errors import ArchiveError

NUMBERS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),
        pa.field("video_number", pa.int32(), nullable=False),
    ]
)


CHECKS = (
    Check(("video_id",), lambda rows: check_column_text("video_id", rows.column("video_id"), VIDEO_ID)),
    Check(("video_number",), lambda rows: check_column_range("video_number", rows.column("video_number"), 1, INT32)),
    SAMPLING_CHECK,
)


class NumberTable:
    """The numbers of one model's videos, by (video id, sampling)."""

    def __init__(self, uri: str, model_id: str):
        self._uri = uri
        self._model_id = model_id

    @cached_property
    def _table(self) -> RowTable:
        """Opened at the first use: a search does not need it."""
        return RowTable(self._uri, NUMBERS, CHECKS)

    def known(self) -> dict[tuple[str, str], int]:
        """The numbers of this model's videos."""
        return self._of_model(self._table.rows().table())

    def all_given(self) -> np.ndarray:
        """(n,) int32: the numbers of every model's videos."""
        return self._table.rows().column("video_number").to_numpy()

    def of_ids(self, video_ids: Iterable[str]) -> set[int]:
        """The numbers of this model's videos with these ids, with any sampling."""
        rows = self._table.rows()
        return set(self._of_model(rows.take(rows.find("video_id", video_ids))).values())

    def reserve(self, keys: Sequence[tuple[str, str]], above: int) -> dict[tuple[str, str], int]:
        """The number of each key; a key without one gets the next number that is not given, above a limit."""
        wanted = list(dict.fromkeys(keys))
        given: dict[tuple[str, str], int] = {}

        def plan(rows: Rows) -> tuple[np.ndarray, pa.Table]:
            given.clear()
            given.update(self._of_model(rows.take(rows.find("video_id", [video_id for video_id, _ in wanted]))))
            first = max(rows.column("video_number").to_numpy().max(initial=0).item(), above) + 1
            new = [key for key in wanted if key not in given]
            if first + len(new) > INT32:
                raise ArchiveError("the archive has given all its numbers; index into a new --archive")
            given.update(zip(new, range(first, first + len(new))))
            added = [
                {"video_id": key[0], "model_id": self._model_id, "sampling": key[1], "video_number": given[key]}
                for key in new
            ]
            return NONE, pa.Table.from_pylist(added, NUMBERS)

        self._table.change(plan)
        return {key: given[key] for key in wanted}

    def restore(self, lost: Sequence[Mapping[str, str | int]]) -> None:
        """Adds rows, with the columns of NUMBERS; rows whose number the table already has are left out."""

        def plan(rows: Rows) -> tuple[np.ndarray, pa.Table]:
            known = rows.take(rows.find("video_number", [row["video_number"] for row in lost]), ["video_number"])
            has_number = set(known.column(0).to_pylist())
            missing = [row for row in lost if row["video_number"] not in has_number]
            return NONE, pa.Table.from_pylist(missing, NUMBERS)

        self._table.change(plan)

    def _of_model(self, rows: pa.Table) -> dict[tuple[str, str], int]:
        columns = (rows.column(name).to_pylist() for name in NUMBERS.names)
        return {
            (video_id, sampling): number
            for video_id, model_id, sampling, number in zip(*columns, strict=True)
            if model_id == self._model_id
        }
