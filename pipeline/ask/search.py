"""search: a query -> its keys -> hits in the index -> moments. Nothing here loads torch."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.ask.filter import Filter
from pipeline.ask.moments import MomentFinder
from pipeline.ask.query import Query, QueryEncoder, QueryKeys
from pipeline.ask.thresholds import Threshold, Thresholds
from storage.archive.archive import Archive
from storage.archive.frames import Rows
from storage.errors import UsageError
from storage.files import source_text
from storage.parts.read import read_keys
from storage.records import FrameRef, Moment
from storage.vectors.nearest import Index
from storage.vectors.vector_index import open_index
from workers.models.bundle import Bundle, find_bundle

HITS_PER_MOMENT = 8  # a moment holds several neighbouring frames, so a search asks for more hits than moments
MOST_HITS = 8192  # no more hits are asked for if there are enough moments
FRAMES_SHOWN = 32  # default of the frames that the model is shown for an answer


@dataclass(frozen=True)
class SearchLimits:
    """How many moments to return, and the lowest score.

    Attributes:
        limit: maximum number of moments.
        threshold: the lowest score of a hit; None for that of the model or the archive (thresholds.py).
        leniency: lowers the threshold by this share of it.
        per_video: maximum number of moments of one video; None for no limit.
        near_misses: maximum number of moments below the threshold to return besides.
    """

    limit: int
    threshold: float | None = None
    per_video: int | None = None
    near_misses: int = 0
    leniency: float = 0.0

    def __post_init__(self):
        if self.limit < 1 or (self.per_video is not None and self.per_video < 1):
            raise UsageError(f"{self.limit} moments, {self.per_video} per video: ask for at least 1")


@dataclass(frozen=True)
class SearchResult:
    """The moments that a search found, best first, and what it searched.

    Attributes:
        moments: the moments.
        threshold: the lowest score of a hit, and where it comes from.
        frames_searched: frames in the part of the archive that was searched.
        frames_pending: frames of the archive that no search finds, because they have no search keys.
        frames_left_out: hits that were excluded because they show what is unwanted.
        near_misses: the best moments below the threshold, if they were asked for.
        method: how the frames were compared, for people.
    """

    moments: tuple[Moment, ...]
    threshold: Threshold
    frames_searched: int
    frames_pending: int
    frames_left_out: int = 0
    near_misses: tuple[Moment, ...] = ()
    method: str = ""


def bundle_of(archive: Archive, model: str | None, tower: str | None = None) -> Bundle:
    """The model that an archive was made with.

    Args:
        model, tower: where the model and its CLIP are now; None if they were not moved.
    Raises:
        UsageError: there is no such model, or it is not the archive's.
    """
    bundle = find_bundle(model or archive.model_name, (archive.model_tower or None) if tower is None else tower)
    if bundle.model_id != archive.model_id:
        raise UsageError(
            f"model {bundle.name} ({bundle.model_id}) is not the model of {source_text(archive.uri)} "
            f"({archive.model_text}, {archive.model_id}); name that model with --model, and its CLIP with --tower"
        )
    return bundle


def search(archive: Archive, bundle: Bundle, query: Query, within: Filter, wanted: SearchLimits) -> SearchResult:
    """The moments in a part of an archive that fit a query best; `Searcher` is for several queries.

    Raises:
        UsageError: a text is empty, the model cannot search this way, there is no such picture or moment, or the filter
            is wrong.
    """
    return Searcher(archive, bundle).search(query, within, wanted)


class Searcher:
    """Searches one version of an archive; keeps the index and the text tower open between searches."""

    def __init__(self, archive: Archive, bundle: Bundle):
        self._archive = archive
        self._bundle = bundle

    @cached_property
    def _index(self) -> Index:
        return open_index(self._archive)

    @cached_property
    def _encoder(self) -> QueryEncoder:
        return QueryEncoder(self._archive, self._bundle, Thresholds(self._archive, self._bundle, self._index))

    def search(self, query: Query, within: Filter, wanted: SearchLimits) -> SearchResult:
        """The moments that fit a query best; see the function `search`."""
        index = self._index
        keys = self._encoder.embed(
            query, None if wanted.threshold is None else Threshold(wanted.threshold, "as asked for")
        )
        threshold = replace(keys.threshold, score=keys.threshold.score - wanted.leniency * abs(keys.threshold.score))
        rows = None if within.is_everything else within.rows(self._archive)
        searched = index.frame_count if rows is None else index.count(rows)
        if not searched:
            return SearchResult((), threshold, searched, index.pending_count)
        moments, left_out = _find(self._archive, index, keys, rows, wanted, (threshold.score, math.inf))
        near: Sequence[Moment] = ()
        if wanted.near_misses:
            more = replace(wanted, limit=wanted.near_misses)
            near, _ = _find(self._archive, index, keys, rows, more, (-math.inf, threshold.score))
        counts = (searched, index.pending_count, left_out)
        return SearchResult(tuple(moments), threshold, *counts, tuple(near), index.method(rows))

    def best_score(self, query: Query, frames: Sequence[FrameRef]) -> tuple[float, Threshold]:
        """The best score of some frames for a query, and the threshold of the query.

        Raises:
            UsageError: as for `search`, or the frames have no search keys.
        """
        keys = self._encoder.embed(query, None)
        return float(
            (read_keys(self._archive.frames_uri, frames).astype(np.float32) @ keys.wanted).max()
        ), keys.threshold


def _find(
    archive: Archive,
    index: Index,
    keys: QueryKeys,
    rows: Rows | None,
    wanted: SearchLimits,
    scores: tuple[float, float],
) -> tuple[Sequence[Moment], int]:
    """The best moments with scores in a half-open range, and the number of hits excluded for what they show.

    The index is asked for more hits until there are enough moments and no other hit can belong to a better one: the
    score of a moment is a mean, so it is not above the score of its best frame.
    """
    finder, count = MomentFinder(archive, keys, rows), wanted.limit * HITS_PER_MOMENT
    while True:
        found = index.search(keys.wanted, count, rows)
        hits = [hit for hit in found if scores[0] <= hit.score < scores[1]]
        moments, left_out = finder.find(hits, *scores)
        moments = [*_spread(moments, wanted.per_video)][: wanted.limit]
        are_all = len(found) < count or found[-1].score < scores[0] or count >= index.frame_count
        are_enough = len(moments) == wanted.limit
        if are_all or (are_enough and (count >= MOST_HITS or found[-1].score <= moments[-1].known_score)):
            return moments, left_out
        count *= 4


def _spread(moments: Sequence[Moment], per_video: int | None) -> Iterator[Moment]:
    """The moments, at most `per_video` of each video."""
    counts: Counter[int] = Counter()
    for moment in moments:
        counts[moment.video_number] += 1
        if per_video is None or counts[moment.video_number] <= per_video:
            yield moment
