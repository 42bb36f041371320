"""search: a query -> its keys -> FAISS -> hits -> moments. Nothing here loads torch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.filter import Filter
from pipeline.moments import fallen, moments_of
from pipeline.query import Query, QueryKeys, check_query, embed
from storage.archive import Archive
from storage.cells import read_keys
from storage.errors import UsageError
from storage.files import source_text
from storage.records import FrameRef, Hit, Moment
from storage.vectors import Index, ids_of, open_index
from workers.bundle import Bundle, find_bundle
from workers.clip_text import TextEncoder

HITS_PER_MOMENT = 8  # a moment holds several neighbouring frames; more hits than moments are asked for
MOST_HITS = 8192  # once there are moments enough; one of more frames than that may be shown in pieces
FRAMES_SHOWN = 32  # to the model for an answer at most, where nothing else is asked for


@dataclass(frozen=True)
class Wanted:
    """How many moments, and how good.

    Attributes:
        limit: at most so many.
        floor: the score below which a frame is no hit.
        per_video: at most so many of one video; None for any number.
    """

    limit: int
    floor: float
    per_video: int | None = None

    def __post_init__(self):
        if self.limit < 1 or (self.per_video is not None and self.per_video < 1):
            raise UsageError(f"{self.limit} moments, {self.per_video} of a video: ask for at least one")


@dataclass(frozen=True)
class SearchResult:
    """Moments, best first, and how much was looked at to find them.

    frames_left_out counts those that would be hits and show what is not wanted.
    """

    moments: tuple[Moment, ...]
    frames_searched: int
    frames_pending: int
    frames_left_out: int


def bundle_of(archive: Archive, model: str | None) -> Bundle:
    """The model that an archive was made with, found under its own name or the one given.

    Raises:
        UsageError: no such model, or another one than the archive's.
    """
    bundle = find_bundle(model or archive.model_name)
    if bundle.model_id != archive.model_id:
        raise UsageError(
            f"model {bundle.name} ({bundle.model_id}) is not the one that made {source_text(archive.uri)} "
            f"({archive.model_name}, {archive.model_id}); name that one with --model"
        )
    return bundle


def search(archive: Archive, bundle: Bundle, query: Query, within: Filter, wanted: Wanted) -> SearchResult:
    """The moments within a part of an archive that fit a query best; `Searcher` is for several queries.

    Args:
        archive: what to search.
        bundle: the archive's model; its text tower embeds the texts.
        query: what to look for.
        within: the part of the archive to search.
        wanted: how many moments.
    Raises:
        UsageError: an empty text, a model without text tower, or a wrong filter.
    """
    return Searcher(archive, bundle).search(query, within, wanted)


class Searcher:
    """An archive at one version with its index and the text tower, opened for any number of searches."""

    def __init__(self, archive: Archive, bundle: Bundle):
        self._archive = archive
        self._bundle = bundle
        self._encoder: TextEncoder | None = None

    @cached_property
    def _index(self) -> Index:
        return open_index(self._archive)

    def search(self, query: Query, within: Filter, wanted: Wanted) -> SearchResult:
        """As the function `search`."""
        check_query(query, self._bundle)
        self._encoder = self._encoder or TextEncoder(self._bundle)
        keys = embed(query, self._encoder)
        index, archive = self._index, self._archive
        pending = index.pending_count(archive)
        if within.is_everything:
            ids, searched = None, index.frame_count
        else:
            frames = [frame for frame in within.frames(archive) if index.covers(frame.part)]
            ids, searched = ids_of(frames), len(frames)
        if not searched:
            return SearchResult((), searched, pending, 0)
        moments, left_out = _find(archive, index, keys, ids, wanted, self._bundle.search_floor)
        return SearchResult(tuple(moments), searched, pending, left_out)


def _find(
    archive: Archive,
    index: Index,
    keys: QueryKeys,
    ids: np.ndarray | None,
    wanted: Wanted,
    unwanted_floor: float,
) -> tuple[Sequence[Moment], int]:
    """The best moments, whole, and how many hits were left out for what they show.

    More hits are asked for until there are moments enough, and each one's neighbours are known to have fallen.
    """
    count = wanted.limit * HITS_PER_MOMENT
    while True:
        found = index.search(keys.wanted, count, ids=ids)
        above = [hit for hit in found if hit.score >= wanted.floor]
        hits, frames = _without(archive, above, archive.hit_frames(above), keys.unwanted, unwanted_floor)
        shown = {(frame.video_number, frame.frame_index): frame for frame in frames}
        moments = moments_of(hits, shown, archive.uris({hit.video_number for hit in hits}))
        moments = [*_spread(moments, wanted.per_video)][: wanted.limit]
        if len(found) < count or len(above) < len(found):  # there are no more
            return moments, len(above) - len(hits)
        enough = len(moments) == wanted.limit
        if enough and (count >= MOST_HITS or found[-1].score <= min(fallen(moment.score) for moment in moments)):
            return moments, len(above) - len(hits)
        count *= 4


def _without(
    archive: Archive, hits: list[Hit], frames: list[FrameRef], unwanted: np.ndarray, floor: float
) -> tuple[list[Hit], list[FrameRef]]:
    """The hits, with their frames, that do not reach the floor with any of the unwanted keys."""
    if not len(unwanted) or not hits:
        return hits, frames
    reaches = (read_keys(archive.frames_uri, frames).astype(np.float32) @ unwanted.T >= floor).any(axis=1)
    kept = np.flatnonzero(~reaches).tolist()
    return [hits[place] for place in kept], [frames[place] for place in kept]


def _spread(moments: Sequence[Moment], per_video: int | None) -> Iterator[Moment]:
    """The best moments of each video, best first."""
    counts: Counter[int] = Counter()
    for moment in moments:
        counts[moment.video_number] += 1
        if per_video is None or counts[moment.video_number] <= per_video:
            yield moment
