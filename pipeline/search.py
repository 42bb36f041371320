"""search: a text -> its search key -> FAISS -> hits -> moments. Nothing here loads torch."""

from dataclasses import dataclass

from pipeline.moments import moments_of
from storage.archive import Archive
from storage.errors import NothingFound, UsageError
from storage.files import source_text
from storage.records import FrameRef, Moment, VideoRow
from storage.vectors import ids_of, open_index
from workers.bundle import Bundle, find_bundle
from workers.clip_text import TextEncoder

HITS_PER_MOMENT = 8  # a moment holds several neighbouring frames; more hits than moments are asked for


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
        """The stored frames in the range, in order of video and time."""
        number = self.video.video_number if self.video else None
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
        NothingFound: the range holds no frames that can be searched.
    """
    if not text.strip():
        raise UsageError("the text to search is empty; describe what the moment shows")
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
    if searched == 0:
        where = "the archive" if within.is_everything else "the chosen range"
        raise NothingFound(f"{where} holds no searchable frames ({pending} pending); index videos with `vidx index`")
    floor = bundle.search_floor if floor is None else floor
    query = TextEncoder(bundle).embed(text)
    hits = [hit for hit in index.search(query, limit * HITS_PER_MOMENT, ids=ids) if hit.score >= floor]
    shown = {(frame.video_number, frame.frame_index): frame for frame in archive.hit_frames(hits)}
    moments = moments_of(hits, shown, archive.uris({hit.video_number for hit in hits}))
    return SearchResult(tuple(moments[:limit]), searched, pending)
