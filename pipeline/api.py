"""api: the commands as a library.

from pipeline.api import Archive

archive = Archive.open("./vidx-archive")
for moment in archive.search("a red bus", without=["at night"], where="width >= 1920"):
print(moment.uri, moment.start_seconds, moment.end_seconds, moment.score)
print(archive.ask("When does the bus leave?", video="cars.mp4").text)
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.util import find_spec
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, overload

import pyarrow as pa

from pipeline.filter import Filter
from pipeline.output import check_output
from pipeline.query import Kind, Query, Term
from pipeline.search import FRAMES_SHOWN, Searcher, SearchResult, Wanted, bundle_of
from storage.archive import ArchiveStatus, open_archive
from storage.errors import UsageError
from storage.files import source_text, to_uri
from storage.records import Answer, Moment, VideoRow

if TYPE_CHECKING:
    import pandas

    from pipeline.answer import Asker
    from storage.archive import Archive as StoredArchive
    from workers.bundle import Bundle


class Moments(Sequence[Moment]):
    """Moments, best first, as a sequence, a table or a page of thumbnails.

    Attributes:
        floor: the least score of a hit.
        frames_searched: how many frames were looked at.
        frames_pending: how many no search finds, as they have no search keys.
    """

    def __init__(self, archive: "StoredArchive", title: str, found: SearchResult):
        self._archive = archive
        self._title = title
        self._moments = found.moments
        self.floor = found.floor.score
        self.frames_searched = found.frames_searched
        self.frames_pending = found.frames_pending

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
        if find_spec("pandas") is None:
            raise UsageError("to_pandas needs pandas: pip install pandas; to_arrow needs nothing more")
        return self.to_arrow().to_pandas()

    def contact_sheet(self, path: str | PathLike[str]) -> None:
        """Writes the moments' thumbnails to a file, .html or .png.

        Raises:
            UsageError: another suffix, or the file cannot be written.
        """
        from pipeline.contact_sheet import SUFFIXES, write_contact_sheet

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


class Archive:
    """An archive to search and ask; it stays at the version that it was opened at until `refresh`.

    Every method raises UsageError for what the caller can mend and ArchiveError for a damaged archive
    (storage.errors).
    """

    def __init__(self, stored: "StoredArchive", bundle: "Bundle"):
        self._stored = stored
        self._bundle = bundle
        self._searcher = Searcher(stored, bundle)
        self._asker: Asker | None = None

    @classmethod
    def open(cls, place: str | PathLike[str], model: str | None = None) -> "Archive":
        """The archive in a folder or at a URI; model: where its model lies now, as `--model` takes it."""
        text = fspath(place)
        stored = open_archive(text if "://" in text else to_uri(os.path.expanduser(text)))
        return cls(stored, bundle_of(stored, model))

    def refresh(self) -> None:
        """Moves to the newest version."""
        self._stored = open_archive(self._stored.uri)  # moments that were found keep theirs
        self._searcher = Searcher(self._stored, self._bundle)
        if self._asker is not None:
            self._asker = self._asker.of(self._stored, self._searcher)

    def search(
        self,
        *texts: str | Term,
        images: Sequence[str | PathLike[str]] = (),
        like: Sequence[str] = (),
        without: Sequence[str] = (),
        top: int = 10,
        per_video: int | None = None,
        min_score: float | None = None,
        **where: Any,
    ) -> Moments:
        """The moments that texts describe, or that look like pictures, best first; none below the least score.

        Args:
            texts: of several, a frame's score is the mean; `Term(text, weight)` weighs one of them.
            images: paths of pictures that the moments are to look like.
            like: moments of the archive, VIDEO@TIME, that others are to look like.
            without: frames that one of these describes are left out.
            top: at most so many moments.
            per_video: at most so many of one video.
            min_score: the least score of a hit; None takes what the model or the archive says.
            where: narrows the archive, as `narrowed` says.
        """
        terms = [text if isinstance(text, Term) else Term(text) for text in texts]
        terms += [Term(fspath(path), kind=Kind.IMAGE) for path in images]
        terms += [Term(moment, kind=Kind.MOMENT) for moment in like]
        query = Query(tuple(terms), tuple(without))
        found = self._searcher.search(query, self.narrowed(**where), Wanted(top, min_score, per_video))
        return Moments(self._stored, str(query), found)

    def ask(
        self,
        question: str,
        *,
        frames: int | None = FRAMES_SHOWN,
        fuse: str | None = None,
        over: str | None = None,
        anyway: bool = False,
        max_tokens: int = 128,
        max_words: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        engine: str = "transformers",
        stream: Callable[[str], None] | None = None,
        **where: Any,
    ) -> Answer | None:
        """The model's answer with the moments that it was given; None where no frame fits the question.

        The model stays loaded, and what was computed of the frames is kept: the next question about the same ones pays
        for its own words alone.

        Args:
            question: any text.
            frames: at most so many; None takes all within `where`.
            fuse: "exact", "patches" or "tokens"; None takes the best at hand.
            over: "retrieve", "stride" or "windows", where there are more frames than the model's context holds; None
                refuses.
            anyway: answer from the best frames even where none fits the question.
            max_tokens, max_words: length of the answer at most.
            temperature: above 0, the answer is drawn, by the seed; else the likeliest one is given.
            seed: of the draws.
            device, dtype: for the model; what the first question says holds.
            quantize, engine: how the LLM's matrices are kept, "8bit" or "4bit", and what runs it, "transformers" or
                "vllm"; what the first question says holds.
            stream: gets the answer's text piece by piece.
            where: narrows the archive, as `narrowed` says.
        """
        from pipeline.answer import Asked, Asker, Over  # with torch
        from pipeline.fuse import SOURCES
        from workers.engine import ModelOptions, SamplingParams

        for name, value, is_right, allowed in (
            ("frames", frames, frames is None or frames >= 1, "show the model at least one, or None for all"),
            ("fuse", fuse, fuse in (None, *SOURCES), f"one of {', '.join(SOURCES)}, or None"),
            ("over", over, over is None or over in list(Over), f"one of {', '.join(Over)}, or None"),
            ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
            ("max_words", max_words, max_words is None or max_words >= 1, "at least 1, or None for no limit"),
            ("temperature", temperature, temperature >= 0, "0 or more"),
            ("seed", seed, seed >= 0, "0 or more"),
        ):
            if not is_right:
                raise UsageError(f"{name}={value!r}: {allowed}")
        if self._asker is None:
            options = ModelOptions(device, dtype, quantize, engine)
            self._asker = Asker(self._stored, self._bundle, options, searcher=self._searcher)
        sampling = SamplingParams(temperature, seed)
        asked = Asked(frames, fuse, None if over is None else Over(over), anyway, max_tokens, max_words, sampling)
        return self._asker.ask(question, self.narrowed(**where), asked, stream=stream or (lambda piece: None))

    def narrowed(
        self,
        *,
        video: str | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        after: datetime | None = None,
        before: datetime | None = None,
        tags: Mapping[str, str | Sequence[str]] | None = None,
        where: str = "",
    ) -> Filter:
        """The part of the archive that arguments of these names leave.

        Args:
            video: its path, URI, file name, or six or more digits of its id.
            start_seconds, end_seconds: positions that a player shows, half-open.
            after, before: when it was recorded, half-open, with a time zone.
            tags: a value for each key, or several of which one has to fit.
            where: an SQL condition on the views `videos` and `frames`.
        """
        row = None if video is None else self.video(video)
        values = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in (tags or {}).items()}
        return Filter(row, start_seconds, end_seconds, after, before, values, where)

    def video(self, name: str) -> VideoRow:
        """The video of a path, a URI, a file name, or six or more digits of its id."""
        return self._stored.find_video(name)

    def sql(self, statement: str) -> list[dict[str, Any]]:
        """The rows of a SELECT over the views `videos` and `frames`."""
        from storage.catalog import run_sql  # with DuckDB

        columns, rows = run_sql(self._stored, statement)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def status(self) -> ArchiveStatus:
        """Counts of videos and frames, and what the archive occupies."""
        return self._stored.status()
