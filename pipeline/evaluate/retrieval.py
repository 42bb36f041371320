"""retrieval: how well a search finds moments whose truth is known.

Sources: R@k at an IoU and its mean over queries, as of moment retrieval (QVHighlights, arXiv 2107.09609; Charades-STA,
arXiv 1705.02101).
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.archive.archive import Archive
from storage.errors import UsageError
from storage.files import normalize_text, source_text
from storage.records import Moment, Status, VideoRow

RANKS = (1, 5, 10)
OVERLAPS = (0.3, 0.5, 0.7)
MRR_OVERLAP = 0.5
DEPTH = max(RANKS)


@dataclass(frozen=True)
class Truth:
    """A stretch of a video that a text describes: positions in seconds, half-open."""

    video_id: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Annotated:
    """A text and everything that it describes; nothing, where it is not to be found.

    Attributes:
        text: the query.
        truths: what it describes.
        video: the one that it is to be found in; None for the whole archive.
    """

    text: str
    truths: tuple[Truth, ...]
    video: VideoRow | None


@dataclass(frozen=True)
class Judged:
    """What a search gave for one text.

    Attributes:
        text: the query.
        is_there: whether the archive shows what it describes.
        is_found: whether the search gave anything.
        ranks: by overlap, the rank (1 the best) of the first moment that overlaps a truth so much; None for no such one
            among the first DEPTH.
    """

    text: str
    is_there: bool
    is_found: bool
    ranks: Mapping[float, int | None]


@dataclass(frozen=True)
class Scores:
    """Means over queries; shares are 0 to 1, and None where there is no such query.

    Attributes:
        recall: by (rank, overlap), the share of the queries whose truth is met within the first so many moments.
        reciprocal_rank: mean of 1 / rank at MRR_OVERLAP, 0 where it is not met.
        found_f1: of "there is something to be found", over all queries.
        there, absent: numbers of queries with and without truth.
        found, found_wrongly: those of each that found anything.
    """

    recall: Mapping[tuple[int, float], float | None]
    reciprocal_rank: float | None
    found_f1: float | None
    there: int
    absent: int
    found: int
    found_wrongly: int


def overlap(moment: Moment, truth: Truth) -> float:
    """Intersection over union of two stretches; 0 where they are of different videos."""
    if moment.video_id != truth.video_id:
        return 0.0
    both = min(moment.end_seconds, truth.end_seconds) - max(moment.start_seconds, truth.start_seconds)
    whole = max(moment.end_seconds, truth.end_seconds) - min(moment.start_seconds, truth.start_seconds)
    return max(0.0, both) / whole if whole > 0 else 0.0


def judge(annotated: Annotated, moments: Sequence[Moment]) -> Judged:
    """One query's moments, best first, against its truth."""
    best = [max((overlap(moment, truth) for truth in annotated.truths), default=0.0) for moment in moments[:DEPTH]]
    ranks = {
        least: next((rank for rank, reached in enumerate(best, 1) if reached >= least), None) for least in OVERLAPS
    }
    return Judged(annotated.text, bool(annotated.truths), bool(moments), ranks)


def score(judged: Sequence[Judged]) -> Scores:
    """The means; those of rank and overlap over the queries that have a truth."""
    there = [one for one in judged if one.is_there]
    found = sum(one.is_found for one in there)
    found_wrongly = sum(one.is_found for one in judged if not one.is_there)
    reciprocal = [1 / rank if (rank := one.ranks[MRR_OVERLAP]) else 0.0 for one in there]
    misses = len(there) - found
    return Scores(
        recall={
            (rank, least): _mean([_met(one, rank, least) for one in there]) for rank in RANKS for least in OVERLAPS
        },
        reciprocal_rank=_mean(reciprocal),
        found_f1=2 * found / (2 * found + found_wrongly + misses) if there else None,
        there=len(there),
        absent=len(judged) - len(there),
        found=found,
        found_wrongly=found_wrongly,
    )


def _met(judged: Judged, rank: int, least: float) -> bool:
    reached = judged.ranks[least]
    return reached is not None and reached <= rank


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- annotations


def read_annotations(path: str, archive: Archive, by_video: bool = False) -> list[Annotated]:
    """The queries of a file.

    CSV with the columns file, start_seconds, end_seconds and text (an empty file: there is nothing of the kind in the
    archive), JSON lines as QVHighlights has them (query, vid, relevant_windows), or text lines as Charades-STA has them
    (`ID START END##text`). Videos are named by path, file name, or file name without its suffix.

    Args:
        path: the file.
        archive: what it is about.
        by_video: a text is a query for each video that it is said of; else it is one, and wherever it is true is right.
    Raises:
        UsageError: the file cannot be read, or names a video that the archive does not hold.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a file of queries: {error}") from error
    first = text.lstrip()[:1]
    read = _charades_lines if "##" in text.partition("\n")[0] else _json_lines if first == "{" else _csv_rows
    names = _Names(archive, path)
    truths: dict[tuple[str, str | None], list[Truth]] = {}
    videos: dict[str | None, VideoRow] = {}
    for number, (query, name, stretch) in enumerate(_rows(read, path, text), 1):
        if not query or not query.strip():
            raise UsageError(f"{path}: query {number} has no text")
        if name is None:
            if by_video:
                raise UsageError(f"{path}: query {number} names no video, and each is to be searched in its own")
            truths.setdefault((query, None), [])
            continue
        row = names.find(name, number)
        videos[row.video_id] = row
        if stretch is not None and not stretch[0] < stretch[1]:
            raise UsageError(f"{path}: query {number}: {stretch[0]:g} to {stretch[1]:g} is no range of time")
        if by_video or stretch is not None:  # what one video does not show another may
            found = truths.setdefault((query, row.video_id if by_video else None), [])
            found += [] if stretch is None else [Truth(row.known_id, *stretch)]
    if not truths:
        raise UsageError(f"{path}: no queries in it")
    return [Annotated(query, tuple(found), videos.get(video_id)) for (query, video_id), found in truths.items()]


# A text, the video that it is about, and the stretch that shows it; None for no video and for no such stretch.
Row = tuple[str, str | None, tuple[float, float] | None]


def _rows(read: Callable[[str], list[Row]], path: str, text: str) -> list[Row]:
    try:
        return read(text)
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(
            f"{path}: {type(error).__name__} {error}: wanted CSV with the columns file, start_seconds, end_seconds and "
            "text, JSON lines with query, vid and relevant_windows, or lines ID START END##text"
        ) from error


def _csv_rows(text: str) -> list[Row]:
    rows: list[Row] = []
    for row in csv.DictReader(io.StringIO(text, newline="")):
        name = row["file"].strip() or None
        stretch = None if name is None else (float(row["start_seconds"]), float(row["end_seconds"]))
        rows.append((row["text"], name, stretch))
    return rows


def _json_lines(text: str) -> list[Row]:
    rows: list[Row] = []
    for line in filter(str.strip, text.split("\n")):
        entry = json.loads(line)
        windows = [(float(start), float(end)) for start, end in entry["relevant_windows"]]
        rows += [(entry["query"], entry["vid"], stretch) for stretch in windows]
        rows += [] if windows else [(entry["query"], entry["vid"], None)]
    return rows


def _charades_lines(text: str) -> list[Row]:
    rows: list[Row] = []
    for line in filter(str.strip, text.split("\n")):
        match = re.fullmatch(r"(\S+)\s+([\d.]+)\s+([\d.]+)\s*##(.*)", line.strip())
        if match is None:
            raise ValueError(f"in {line!r}")
        rows.append((match[4].strip(), match[1], (float(match[2]), float(match[3]))))
    return rows


class _Names:
    """Videos by path, URI, file name, and file name without suffix."""

    def __init__(self, archive: Archive, path: str):
        self._archive = archive
        self._path = path
        self._by_stem: dict[str, list[VideoRow]] = {}
        for row in archive.videos.all():
            if row.frame_count and row.status is not Status.DELETED:
                self._by_stem.setdefault(normalize_text(Path(source_text(row.uri)).stem), []).append(row)

    def find(self, name: str, number: int) -> VideoRow:
        alike = self._by_stem.get(normalize_text(name), [])
        if len(alike) == 1:
            return alike[0]
        try:
            row = self._archive.videos.find(name)
        except UsageError as error:
            raise UsageError(f"{self._path}: query {number}: {error}") from error
        if not row.frame_count:
            raise UsageError(f"{self._path}: query {number}: {name} has no frames to be found")
        return row
