"""search: a text -> its search key -> FAISS -> hits -> moments. Nothing here loads torch."""

from dataclasses import dataclass

import numpy as np

from pipeline.moments import fallen, moments_of
from storage.archive import Archive
from storage.errors import UsageError
from storage.files import is_text, source_text
from storage.records import FrameRef, Moment, VideoRow
from storage.vectors import Index, ids_of, open_index
from workers.bundle import Bundle, find_bundle
from workers.clip_text import TextEncoder

HITS_PER_MOMENT = 8  # a moment holds several neighbouring frames; more hits than moments are asked for
MOST_HITS = 8192  # a moment of more frames than that may be shown in pieces


@dataclass(frozen=True)
class Range:
    """The part of an archive that a query is narrowed to; None leaves that side open.

    start_seconds and end_seconds are positions that a player shows, half-open; a frame counts where its span
    meets the range.
    """

    video: VideoRow | None = None
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out."""
        return self.video is None and self.start_seconds is None and self.end_seconds is None

    def frames(self, archive: Archive) -> list[FrameRef]:
        """The stored frames in the range, in order of video and time; a failed video has none."""
        number = self.video.video_number if self.video else None
        if self.video is not None and number is None:
            return []
        return archive.frames(
            video_numbers=None if number is None else [number],
            start_seconds=self.start_seconds,
            end_seconds=self.end_seconds,
        )


@dataclass(frozen=True)
class SearchResult:
    """Moments, best first, and how much was looked at to find them."""

    moments: tuple[Moment, ...]
    frames_searched: int
    frames_pending: int


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


def check_text(what: str, text: str) -> None:
    """Refuses what no tokenizer takes.

    Raises:
        UsageError: the text is empty, or not text.
    """
    if not text.strip():
        raise UsageError(f"the {what} is empty; say what the videos show")
    if not is_text(text):
        raise UsageError(f"the {what} holds bytes that are no UTF-8; type it as text")


def search(archive: Archive, bundle: Bundle, text: str, within: Range, limit: int, floor: float | None) -> SearchResult:
    """The moments within a range that a text describes best.

    Args:
        archive: what to search.
        bundle: the archive's model; its text tower embeds the text.
        text: any text; what the tower cannot take in is cut at its end.
        within: the part of the archive to search.
        limit: at most so many moments.
        floor: cosine below which a frame is no hit; None takes the model's.
    Raises:
        UsageError: an empty text, or a model without text tower.
    """
    check_text("text to search", text)
    if not bundle.has_text_search:
        raise UsageError(
            f"model {bundle.name} has no text tower, so text cannot be searched; "
            "`vidx ask --all` takes frames without a search"
        )
    index = open_index(archive)
    pending = index.pending_count(archive)
    if within.is_everything:
        ids, searched = None, index.frame_count
    else:
        frames = [frame for frame in within.frames(archive) if index.covers(frame.part)]
        ids, searched = ids_of(frames), len(frames)
    floor = bundle.search_floor if floor is None else floor
    moments = _find(archive, index, TextEncoder(bundle).embed(text), ids, limit, floor) if searched else []
    return SearchResult(tuple(moments), searched, pending)


def _find(
    archive: Archive, index: Index, query: np.ndarray, ids: np.ndarray | None, limit: int, floor: float
) -> list[Moment]:
    """The best moments, whole: more hits are asked for until each moment's neighbours are known to have fallen."""
    count = limit * HITS_PER_MOMENT
    while True:
        found = index.search(query, count, ids=ids)
        hits = [hit for hit in found if hit.score >= floor]
        shown = {(frame.video_number, frame.frame_index): frame for frame in archive.hit_frames(hits)}
        moments = moments_of(hits, shown, archive.uris({hit.video_number for hit in hits}))[:limit]
        everything = len(found) < count or len(hits) < len(found) or count >= MOST_HITS
        if everything or (len(moments) == limit and found[-1].score <= min(fallen(m.score) for m in moments)):
            return moments
        count *= 4
