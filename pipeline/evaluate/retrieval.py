"""retrieval: how well a search finds known moments.

Source: R@k at an IoU, as in moment retrieval (QVHighlights, arXiv 2107.09609; Charades-STA, arXiv 1705.02101).
"""

import csv
import io
import json
import math
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
    """A range of a video that a text describes, in seconds, half-open."""

    video_id: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Annotated:
    """A text and the ranges that it describes.

    Attributes:
        text: the query.
        truths: all ranges that it describes; empty if the archive does not show it.
        video: the only video to search; None for the whole archive.
    """

    text: str
    truths: tuple[Truth, ...]
    video: VideoRow | None


@dataclass(frozen=True)
class Judged:
    """The result of the search for one text.

    Attributes:
        text: the query.
        is_there: whether the archive shows what it describes.
        is_found: whether the search found any moment.
        ranks: by overlap, the rank (1 is the best) of the first moment that overlaps a truth by this much; None if none
            of the first DEPTH moments does.
    """

    text: str
    is_there: bool
    is_found: bool
    ranks: Mapping[float, int | None]


@dataclass(frozen=True)
class Scores:
    """Means over queries; shares are 0 to 1, or None if there is no such query.

    Attributes:
        recall: by (rank, overlap), the share of queries for which one of the first `rank` moments is right.
        reciprocal_rank: mean of 1 / rank of the first right moment at MRR_OVERLAP, 0 if there is none.
        found_f1: F1 of the decision that the archive shows something, over all queries.
        there, absent: numbers of queries with and without truths.
        found, found_wrongly: how many of these two found any moment.
    """

    recall: Mapping[tuple[int, float], float | None]
    reciprocal_rank: float | None
    found_f1: float | None
    there: int
    absent: int
    found: int
    found_wrongly: int


def overlap(moment: Moment, truth: Truth) -> float:
    """Intersection over union of two ranges; 0 if they are in different videos."""
    if moment.video_id != truth.video_id:
        return 0.0
    both = min(moment.end_seconds, truth.end_seconds) - max(moment.start_seconds, truth.start_seconds)
    whole = max(moment.end_seconds, truth.end_seconds) - min(moment.start_seconds, truth.start_seconds)
    return max(0.0, both) / whole if whole > 0 else 0.0


def judge(annotated: Annotated, moments: Sequence[Moment]) -> Judged:
    """Compares the moments of one query, best first, with its truths."""
    best = [max((overlap(moment, truth) for truth in annotated.truths), default=0.0) for moment in moments[:DEPTH]]
    ranks = {
        least: next((rank for rank, reached in enumerate(best, 1) if reached >= least), None) for least in OVERLAPS
    }
    return Judged(annotated.text, bool(annotated.truths), bool(moments), ranks)


def score(judged: Sequence[Judged]) -> Scores:
    """The scores of all queries; recall and rank are means over the queries with truths."""
    there = [one for one in judged if one.is_there]
    found = sum(one.is_found for one in there)
    found_wrongly = sum(one.is_found for one in judged if not one.is_there)
    reciprocal = [1 / rank if (rank := one.ranks[MRR_OVERLAP]) else 0.0 for one in there]
    misses = len(there) - found
    return Scores(
        recall={
            (rank, least): _mean([(one.ranks[least] or math.inf) <= rank for one in there])
            for rank in RANKS
            for least in OVERLAPS
        },
        reciprocal_rank=_mean(reciprocal),
        found_f1=2 * found / (2 * found + found_wrongly + misses) if there else None,
        there=len(there),
        absent=len(judged) - len(there),
        found=found,
        found_wrongly=found_wrongly,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


# --- annotations


def read_annotations(path: str, archive: Archive, by_video: bool = False) -> list[Annotated]:
    """The queries in a file.

    The file is CSV with the columns file, start_seconds, end_seconds and text, JSON lines of QVHighlights (query, vid,
    relevant_windows), or text lines of Charades-STA (`ID START END##text`). In a CSV, an empty file means that the
    archive does not show the text. Videos are named by path, or by file name with or without suffix.

    Args:
        by_video: whether a text is one query per video that it describes, or one query for the whole archive.
    Raises:
        UsageError: the file cannot be read, or names a video that is not in the archive.
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
                raise UsageError(f"{path}: query {number} names no video, but each query is searched in its own video")
            truths.setdefault((query, None), [])
            continue
        row = names.find(name, number)
        videos[row.video_id] = row
        if stretch is not None and not stretch[0] < stretch[1]:
            raise UsageError(
                f"{path}: query {number}: {stretch[0]:g} to {stretch[1]:g}: the range ends before it starts"
            )
        if by_video or stretch is not None:  # else another video may show the text
            found = truths.setdefault((query, row.video_id if by_video else None), [])
            found += [] if stretch is None else [Truth(row.known_id, *stretch)]
    if not truths:
        raise UsageError(f"{path}: the file has no queries")
    return [Annotated(query, tuple(found), videos.get(video_id)) for (query, video_id), found in truths.items()]


# A text, a video, and the range that shows the text; None for no video and for no such range.
Row = tuple[str, str | None, tuple[float, float] | None]


def _rows(read: Callable[[str], list[Row]], path: str, text: str) -> list[Row]:
    try:
        return read(text)
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UsageError(
            f"{path}: {type(error).__name__} {error}: give CSV with the columns file, start_seconds, end_seconds and "
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
    """Finds videos by path, URI, or file name with or without suffix."""

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
            raise UsageError(f"{self._path}: query {number}: {name} has no frames in the archive")
        return row
