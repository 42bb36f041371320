"""Moments and videos in Python: as sequences, tables and pages."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from os import PathLike, fspath
from typing import TYPE_CHECKING, TypeVar, overload

import pyarrow as pa

from pipeline.ask.search import SearchResult
from pipeline.results.listing import SCHEMA as VIDEO_SCHEMA
from pipeline.results.listing import listed
from pipeline.results.output import check_output
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Moment, VideoRow

if TYPE_CHECKING:
    import pandas

    from storage.archive.archive import Archive


_Item = TypeVar("_Item")


class _Rows(Sequence[_Item], ABC):
    """Rows as a sequence and as a table."""

    def __init__(self, rows: Iterable[_Item]):
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, place: int) -> _Item: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[_Item, ...]: ...
    def __getitem__(self, place):
        return self._rows[place]

    def __len__(self) -> int:
        return len(self._rows)

    @abstractmethod
    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The table of `to_arrow` as a pandas DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        if find_spec("pandas") is None:
            raise UsageError("to_pandas needs pandas: pip install pandas; or use to_arrow")
        return self.to_arrow().to_pandas()


class Moments(_Rows[Moment]):
    """Moments, best first, as a sequence, a table or a page of thumbnails.

    Attributes:
        threshold: the lowest score of a hit.
        frames_searched: number of frames that were searched.
        frames_pending: number of frames that no search finds, because they have no search keys.
        unfinished: the searched videos that are not completely indexed yet.
    """

    def __init__(self, archive: "Archive", title: str, found: SearchResult, unfinished: Sequence[VideoRow] = ()):
        super().__init__(found.moments)
        self._archive = archive
        self._title = title
        self.threshold = found.threshold.score
        self.frames_searched = found.frames_searched
        self.frames_pending = found.frames_pending
        self.unfinished = tuple(unfinished)

    def __repr__(self) -> str:
        return f"Moments({self._title!r}, {len(self)})"

    def to_arrow(self) -> pa.Table:
        """One row per moment: its fields, and `source`, the URI as a path for people."""
        rows = [{**asdict(moment), "source": source_text(moment.uri)} for moment in self]
        return pa.Table.from_pylist(rows, _MOMENT_SCHEMA)

    def contact_sheet(self, path: str | PathLike[str]) -> None:
        """Writes thumbnails of the moments to a .html or .png file.

        Raises:
            UsageError: the file has another suffix or cannot be written.
        """
        from pipeline.results.contact_sheet import SUFFIXES, write_contact_sheet

        check_output(fspath(path), SUFFIXES)
        write_contact_sheet(fspath(path), self._title, self._archive, self)


_MOMENT_SCHEMA = pa.schema(
    [
        ("video_id", pa.string()),
        ("video_number", pa.int32()),
        ("uri", pa.string()),
        ("source", pa.string()),
        ("start_seconds", pa.float64()),
        ("end_seconds", pa.float64()),
        ("best_seconds", pa.float64()),
        ("score", pa.float64()),
    ]
)


class Videos(_Rows[VideoRow]):
    """Videos in order of URI, as a sequence or a table."""

    def __repr__(self) -> str:
        return f"Videos({len(self)})"

    def to_arrow(self) -> pa.Table:
        """One row per video, with the columns of `vidx list --json`."""
        return pa.Table.from_pylist([listed(row) for row in self], VIDEO_SCHEMA)
