"""An archive in Python: search, questions, videos, frames and SQL; `import vidx` gives what is here."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal

from pipeline.api.parameters import (
    check,
    check_choice,
    check_count,
    check_number,
    in_parameters,
    instant_of,
    naming_parameters,
    place_of,
    seconds_of,
)
from pipeline.api.sequences import Moments, Videos
from pipeline.api.stored_frames import CELLS, Frames, stored_frames
from pipeline.ask.filter import Filter
from pipeline.ask.query import Kind, Query, Term
from pipeline.ask.search import FRAMES_SHOWN, Searcher, SearchLimits, bundle_of
from pipeline.sizes import parse_size
from pipeline.times import parse_moment
from storage.archive.archive import ArchiveStatus, open_archive
from storage.errors import UsageError
from storage.files import source_text
from storage.records import Answer, Status, VideoRow

if TYPE_CHECKING:
    from pipeline.ask.answer import Asker
    from storage.archive.archive import Archive
    from storage.sql import SqlLimits
    from workers.models.bundle import Bundle

Path = str | PathLike[str]
Seconds = float | str  # a position in a video, as seconds or "0:01:23.5"
Instant = datetime | str  # with a time zone, or ISO 8601, which is UTC without one
Tags = Mapping[str, str | Sequence[str]]
StatusName = Literal["indexing", "indexed", "partial", "failed", "deleted"]
CellName = Literal["token", "compressor_out", "search_key", "thumbnail"]


class OpenArchive:
    """An archive to search, ask and read, at the version at which it was opened, or at which `refresh` was called.

    Every method raises UsageError for wrong use, and ArchiveError for a damaged archive (storage.errors). The same
    parameters choose a part of the archive in every method:

        video: a path, a URI, a file name, or six or more digits of an id; VIDEO@START-END is a moment of it.
        start_seconds, end_seconds: positions that a player shows, half-open, as seconds or "0:01:23.5".
        after, before: times of recording, half-open: datetimes with a time zone, or ISO 8601 (UTC if without a zone).
        tags: by key, a value, or several values of which one must match.
        where: an SQL condition on the views `videos` and `frames`.
    """

    def __init__(self, stored: "Archive", model: str | None = None, tower: str | None = None):
        self._stored = stored
        self._model = model
        self._tower = tower
        self._asker: Asker | None = None
        if model is not None or tower is not None:
            _ = self._bundle  # raises now if it is wrong

    @classmethod
    @naming_parameters
    def open(cls, place: Path, model: str | None = None, tower: str | None = None) -> "OpenArchive":
        """The archive in a folder or at a URI.

        The model is found when it is needed first, or now if `model` or `tower` is given.

        Args:
            model, tower: where the archive's model and its CLIP are, if they were moved; as for `--model`, `--tower`.
        """
        return cls(open_archive(place_of(place)), model, tower)

    def __repr__(self) -> str:
        return f"Archive({source_text(self._stored.uri)!r}, version={self._stored.version})"

    @cached_property
    def _bundle(self) -> "Bundle":
        return bundle_of(self._stored, self._model, self._tower)

    @cached_property
    def _searcher(self) -> Searcher:
        return Searcher(self._stored, self._bundle)

    def refresh(self) -> None:
        """Opens the newest version; moments that were found before keep theirs."""
        self._stored = open_archive(self._stored.uri)
        self.__dict__.pop("_searcher", None)
        if self._asker is not None:
            self._asker = self._asker.of(self._stored, self._searcher)

    @naming_parameters
    def search(
        self,
        *texts: str | Term,
        images: Sequence[Path] = (),
        like: Sequence[str] = (),
        without: Sequence[str] = (),
        top: int = 10,
        per_video: int | None = None,
        min_score: float | None = None,
        video: str | None = None,
        start_seconds: Seconds | None = None,
        end_seconds: Seconds | None = None,
        after: Instant | None = None,
        before: Instant | None = None,
        tags: Tags | None = None,
        where: str = "",
    ) -> Moments:
        """The moments that texts describe, or that look like pictures, best first.

        Args:
            texts: with several texts, a frame's score is the mean of its scores; `Term(text, weight)` gives a weight.
            images: paths of pictures; find moments that look like them.
            like: moments of the archive as VIDEO@TIME; find other moments that look like them.
            without: texts; exclude frames that show one of them.
            top: maximum number of moments.
            per_video: maximum number of moments of one video.
            min_score: lowest score of a hit; None for what the model states or was measured in the archive.
            video, start_seconds, end_seconds, after, before, tags, where: the part of the archive, see the class.
        """
        check_count("top", top)
        check_count("per_video", per_video, or_none="any number")
        check_number("min_score", min_score, -1, 1, or_none="the threshold of the model or the archive")
        terms = [text if isinstance(text, Term) else Term(text) for text in _several("texts", texts)]
        terms += [Term(fspath(path), kind=Kind.IMAGE) for path in _several("images", images)]
        terms += [Term(moment, kind=Kind.MOMENT) for moment in _several("like", like)]
        query = Query(tuple(terms), tuple(_several("without", without)))
        within = self.narrowed(video, start_seconds, end_seconds, after, before, tags, where)
        found = self._searcher.search(query, within, SearchLimits(top, min_score, per_video))
        return Moments(self._stored, str(query), found, within.unfinished(self._stored))

    @naming_parameters
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
        video: str | None = None,
        start_seconds: Seconds | None = None,
        end_seconds: Seconds | None = None,
        after: Instant | None = None,
        before: Instant | None = None,
        tags: Tags | None = None,
        where: str = "",
    ) -> Answer | None:
        """The model's answer and the moments that it was shown; None if no frame fits the question.

        The model stays loaded, and what was computed of the frames is kept, so that another question about the same
        frames is faster. The first question sets `device`, `dtype`, `quantize` and `engine` for all.

        Args:
            question: any text.
            frames: maximum number of frames that the model is shown; None shows all of that part of the archive.
            fuse: what the question is fused with: "exact", "patches" or "tokens"; None for the best available.
            over: what to show if the model's context cannot hold all frames: "retrieve", "stride" or "windows"; None
                refuses.
            anyway: answer from the best frames even if none fits the question.
            max_tokens, max_words: maximum length of the answer.
            temperature: 0 gives the most likely answer; above 0, each token is drawn at random.
            seed: seed of the random draws.
            device, dtype: where the model computes, and its precision.
            quantize: keep the LLM's matrices in "8bit" or "4bit".
            engine: library that runs the LLM, "transformers" or "vllm".
            stream: gets the text of the answer, piece by piece.
            video, start_seconds, end_seconds, after, before, tags, where: the part of the archive, see the class.
        """
        from pipeline.ask.answer import Asked, Asker, Over, silent  # with torch
        from pipeline.ask.showing import SOURCES
        from workers.llm.engine import ModelOptions, SamplingParams

        check_count("frames", frames, or_none="all")
        check_choice("fuse", fuse, SOURCES, or_none="the best available")
        check_choice("over", over, Over, or_none="an error")
        check_count("max_tokens", max_tokens)
        check_count("max_words", max_words, or_none="no limit")
        check_number("temperature", temperature, 0, math.inf)
        check_number("seed", seed, 0, 2**63 - 1)
        within = self.narrowed(video, start_seconds, end_seconds, after, before, tags, where)
        if self._asker is None:
            options = ModelOptions(device, dtype, quantize, engine)
            self._asker = Asker(self._stored, self._bundle, options, searcher=self._searcher)
        sampling = SamplingParams(temperature, seed)
        asked = Asked(frames, fuse, None if over is None else Over(over), anyway, max_tokens, max_words, sampling)
        return self._asker.ask(question, within, asked, stream=stream or silent)

    @naming_parameters
    def videos(
        self,
        *,
        status: StatusName | Sequence[StatusName] | None = None,
        video: str | None = None,
        after: Instant | None = None,
        before: Instant | None = None,
        tags: Tags | None = None,
        where: str = "",
    ) -> Videos:
        """The videos of the archive, in order of URI.

        Args:
            status: only videos with this status, or with one of these; None for all but deleted videos.
            video, after, before, tags, where: the part of the archive, see the class; `where` is a condition on
                the view `videos`, or one on `frames` that is true for at least one frame of the video.
        """
        given = (status,) if isinstance(status, str) else status
        for one in given or ():
            check_choice("status", one, Status)
        wanted = {*Status} - {Status.DELETED} if given is None else {*given}
        check("where", where, not where or Status.DELETED not in wanted, "SQL does not find deleted videos")
        within = self.narrowed(video=video, after=after, before=before, tags=tags, where=where)
        return Videos([row for row in within.videos(self._stored) if row.status in wanted])

    @naming_parameters
    def frames(
        self,
        *,
        cells: Sequence[CellName] = ("token", "search_key"),
        batch_frames: int = 1024,
        video: str | None = None,
        start_seconds: Seconds | None = None,
        end_seconds: Seconds | None = None,
        after: Instant | None = None,
        before: Instant | None = None,
        tags: Tags | None = None,
        where: str = "",
    ) -> Iterator[Frames]:
        """The stored frames in order of video and time, in batches; memory holds one batch at a time.

        Args:
            cells: what to read of each frame besides its video and times.
            batch_frames: frames per batch; a batch can hold frames of several videos, and the last one is smaller.
            video, start_seconds, end_seconds, after, before, tags, where: the part of the archive, see the class.
        """
        for name in _several("cells", cells):
            check_choice("cells", name, CELLS)
        check_count("batch_frames", batch_frames)
        within = self.narrowed(video, start_seconds, end_seconds, after, before, tags, where)
        return stored_frames(self._stored, within.rows(self._stored), cells, batch_frames)

    @naming_parameters
    def narrowed(
        self,
        video: str | None = None,
        start_seconds: Seconds | None = None,
        end_seconds: Seconds | None = None,
        after: Instant | None = None,
        before: Instant | None = None,
        tags: Tags | None = None,
        where: str = "",
    ) -> Filter:
        """The part of the archive that these parameters choose, see the class."""
        name, start, end = (None, None, None) if video is None else parse_moment(video)
        if start is not None:
            given = start_seconds is not None or end_seconds is not None
            check("video", video, not given, "names a moment; leave out start_seconds and end_seconds")
            end = start + 1e-6 if end is None else end  # VIDEO@TIME: the frame that is shown then
        else:
            start, end = seconds_of("start_seconds", start_seconds), seconds_of("end_seconds", end_seconds)
            is_right = start is None or end is None or start < end
            check("end_seconds", end_seconds, is_right, f"must be more than start_seconds={start_seconds!r}")
        earliest, latest = instant_of("after", after), instant_of("before", before)
        is_right = earliest is None or latest is None or earliest < latest
        check("before", before, is_right, f"must be later than after={after!r}")
        check("tags", tags, tags is None or isinstance(tags, Mapping), "must be a dictionary, as {'camera': 'north'}")
        values = {key: (value,) if isinstance(value, str) else tuple(value) for key, value in (tags or {}).items()}
        row = None if name is None else self.video(name)
        return Filter(row, start, end, earliest, latest, values, where)

    @naming_parameters
    def video(self, name: str) -> VideoRow:
        """The video with this path, URI, file name, or six or more digits of its id."""
        return self._stored.videos.find(name)

    @naming_parameters
    def sql(
        self, statement: str, *, timeout_seconds: float = 300.0, memory: int | str | None = None
    ) -> list[dict[str, Any]]:
        """The rows of a SELECT over the views `videos` and `frames`; `sql_rows` gives them one by one.

        Args:
            timeout_seconds: the statement is stopped after this time.
            memory: the memory that the statement may use, in bytes or as "512MB"; None for half of the machine's, at
                most 4 GB.
        """
        return list(self.sql_rows(statement, timeout_seconds=timeout_seconds, memory=memory))

    @naming_parameters
    def sql_rows(
        self, statement: str, *, timeout_seconds: float = 300.0, memory: int | str | None = None
    ) -> Iterator[dict[str, Any]]:
        """An iterator over the same rows, which keeps at most a thousand of them in memory."""
        from storage.sql import SqlLimits  # with DuckDB

        check("timeout_seconds", timeout_seconds, timeout_seconds != 0, "must be more than 0")
        check_number("timeout_seconds", timeout_seconds, 0, math.inf)
        memory_bytes = SqlLimits().memory_bytes if memory is None else parse_size("--memory", str(memory))
        return _named_rows(self._stored, statement, SqlLimits(timeout_seconds, memory_bytes))

    def status(self) -> ArchiveStatus:
        """Counts of videos and frames, and the size of the archive."""
        return self._stored.status()


def _named_rows(archive: "Archive", statement: str, limits: "SqlLimits") -> Iterator[dict[str, Any]]:
    from storage.sql import stream_sql

    try:
        with stream_sql(archive, statement, limits) as result:
            for row in result.rows():
                yield dict(zip(result.columns, row, strict=True))
    except UsageError as error:
        raise UsageError(in_parameters(str(error))) from error


def _several(name: str, values: Sequence) -> Sequence:
    """The values, if they are a sequence and not a single text, whose letters would count as values."""
    check(name, values, not isinstance(values, str), "must be a sequence, as ['...']")
    return values
