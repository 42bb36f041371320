"""What the Python interface gives: moments and videos as sequences, tables and pages."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from os import PathLike, fspath
from typing import TYPE_CHECKING, overload

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


class Moments(Sequence[Moment]):
    """Moments, best first, as a sequence, a table or a page of thumbnails.

    Attributes:
        threshold: the least score of a hit.
        frames_searched: how many frames were looked at.
        frames_pending: how many no search finds, as they have no search keys.
        unfinished: the videos looked at that are not whole yet.
    """

    def __init__(self, archive: "Archive", title: str, found: SearchResult, unfinished: Sequence[VideoRow] = ()):
        self._archive = archive
        self._title = title
        self._moments = found.moments
        self.threshold = found.threshold.score
        self.frames_searched = found.frames_searched
        self.frames_pending = found.frames_pending
        self.unfinished = tuple(unfinished)

    @overload
    def __getitem__(self, place: int) -> Moment: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Moment, ...]: ...
    def __getitem__(self, place):
        return self._moments[place]

    def __len__(self) -> int:
        return len(self._moments)

    def __iter__(self) -> Iterator[Moment]:
        return iter(self._moments)

    def __repr__(self) -> str:
        return f"Moments({self._title!r}, {len(self)})"

    def to_arrow(self) -> pa.Table:
        """One row per moment: its fields, and `source`, the uri as people read it."""
        rows = [{**asdict(moment), "source": source_text(moment.uri)} for moment in self._moments]
        return pa.Table.from_pylist(rows, _MOMENT_SCHEMA)

    def to_pandas(self) -> "pandas.DataFrame":
        """As `to_arrow`.

        Raises:
            UsageError: pandas is not installed.
        """
        return _as_pandas(self.to_arrow())

    def contact_sheet(self, path: str | PathLike[str]) -> None:
        """Writes the moments' thumbnails to a file, .html or .png.

        Raises:
            UsageError: another suffix, or the file cannot be written.
        """
        from pipeline.results.contact_sheet import SUFFIXES, write_contact_sheet

        check_output(fspath(path), SUFFIXES)
        write_contact_sheet(fspath(path), self._title, self._archive, self._moments)


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


class Videos(Sequence[VideoRow]):
    """Videos by uri, as a sequence or a table."""

    def __init__(self, rows: Sequence[VideoRow]):
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, place: int) -> VideoRow: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[VideoRow, ...]: ...
    def __getitem__(self, place):
        return self._rows[place]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Videos({len(self)})"

    def to_arrow(self) -> pa.Table:
        """One row per video, with the columns of `vidx list --json`."""
        return pa.Table.from_pylist([listed(row) for row in self._rows], VIDEO_SCHEMA)

    def to_pandas(self) -> "pandas.DataFrame":
        """As `to_arrow`.

        Raises:
            UsageError: pandas is not installed.
        """
        return _as_pandas(self.to_arrow())


def _as_pandas(table: pa.Table) -> "pandas.DataFrame":
    if find_spec("pandas") is None:
        raise UsageError("to_pandas needs pandas: pip install pandas; to_arrow needs nothing more")
    return table.to_pandas()
