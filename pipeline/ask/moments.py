"""moments: hits -> ranges of video, best first.

A moment grows from its best frame in both directions, frame by frame, until one of these ends it:

- The picture changes: the distance of two neighbouring search keys is above CHANGE, and above CHANGE_TIMES the median
  distance in this part of the video. Because of the median, a moving camera does not end a moment.
- The score has fallen by the share FALL of the best frame's score, or is below the lowest score of a hit.
- The next frame is excluded by a filter or shows something unwanted, belongs to a better moment, or follows a gap.

The score of a moment is the mean score of its frames, so that a single frame during a change matters little. Moments
shorter than LEAST_SECONDS (a fade, a flash) are ranked after all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.ask.query import QueryKeys
from storage.archive.archive import Archive
from storage.archive.frames import Rows, Times, read_times
from storage.errors import DamagedError
from storage.files import join, source_text
from storage.parts.read import part_keys
from storage.records import FrameRef, Hit, Moment

CHANGE = 0.03  # cosine distance; above that of frames of one shot at one frame per second (ops/bench/retrieval.py)
CHANGE_TIMES = 8
# CLIP's cosines of texts and pictures lie close together: 0.2 to 0.3 if they match, 0.1 to 0.2 if not. A tenth is
# enough to separate scenes.
FALL = 0.1
LEAST_SECONDS = 0.5
TOUCH_SECONDS = 5e-4  # spans of neighbours touch, except for the rounding of ticks to seconds
PARTS_KEPT = 64  # in the cache


def fallen(peak: float) -> float:
    """The score below which a moment with that peak ends."""
    return peak - FALL * abs(peak)


def adjoin(earlier: FrameRef, later: FrameRef) -> bool:
    """Whether two stored frames of a video are neighbours, so that their spans touch."""
    return later.time_seconds - (earlier.time_seconds + earlier.duration_seconds) < TOUCH_SECONDS


@dataclass(frozen=True, repr=False)
class _Look:
    """The frames of a part, independent of the query.

    Attributes:
        keys: (T, E) float16.
        times: of these frames.
        change: the cosine distance above which two neighbours show different things.
        begins: (T,) bool, whether a frame shows something else than the frame before, or follows a gap; False for the
            first frame.
    """

    keys: np.ndarray
    times: Times
    change: float
    begins: np.ndarray


@lru_cache(maxsize=PARTS_KEPT)
def _look(frames_uri: str, path: str, width: int) -> _Look:
    stored = part_keys(frames_uri, path)
    if stored is None or stored.shape[1] != width:
        place = source_text(join(frames_uri, path))
        raise DamagedError(f"{place}: damaged: its search keys do not have the width of the archive's model")
    keys = stored.astype(np.float32)
    times = read_times(frames_uri, path)
    distances = 1 - np.einsum("te,te->t", keys[1:], keys[:-1])
    change = max(CHANGE, CHANGE_TIMES * float(np.median(distances))) if len(distances) else CHANGE
    gaps = times.time_seconds[1:] - (times.time_seconds + times.duration_seconds)[:-1]
    begins = np.zeros(len(keys), bool)
    begins[1:] = (distances > change) | (gaps >= TOUCH_SECONDS)
    return _Look(stored, times, change, begins)


@dataclass(frozen=True, repr=False)
class _View:
    """The frames of a part, for one query.

    Attributes:
        scores: (T,) float32.
        passes: (T,) bool, whether a frame passes the filter and shows nothing unwanted.
    """

    scores: np.ndarray
    passes: np.ndarray


_Place = tuple[int, int]  # the number of a part among those of its video, and a row in it


class MomentFinder:
    """Makes moments of the hits of one query."""

    def __init__(self, archive: Archive, keys: QueryKeys, rows: Rows | None):
        """Opens nothing before the first hits; `rows` are the frames that pass the filter, None for all frames."""
        self._archive = archive
        self._keys = keys
        self._rows = rows
        self._views: dict[str, _View] = {}
        self._paths: dict[int, list[str]] = {}

    def find(self, hits: Sequence[Hit], least: float, below: float) -> tuple[list[Moment], int]:
        """Moments, best first, and the number of hits excluded for what they show.

        Args:
            hits: best first, each frame at most once.
            least, below: the half-open range of scores that frames of a moment have.
        Raises:
            ArchiveError: a part is missing or damaged.
        """
        taken: set[tuple[str, int]] = set()
        found: list[tuple[bool, Moment]] = []
        left_out = 0
        uris = self._archive.videos.uris({hit.video_number for hit in hits})
        for frame in self._archive.frames.of_hits(hits):
            paths = self._parts_of(frame.video_number)
            if (frame.part, frame.row) in taken:
                continue
            place = (paths.index(frame.part), frame.row)
            if not self._view(frame.part).passes[frame.row]:
                left_out += 1
                continue
            places = self._grow(paths, place, (least, below), taken)
            taken |= {(paths[part], row) for part, row in places}
            moment = self._moment(frame, uris[frame.video_number], paths, places)
            if not any(_holds(moment, example) for example in self._keys.examples):
                is_short = moment.end_seconds - moment.start_seconds < LEAST_SECONDS
                found.append((is_short, moment))
        found.sort(key=lambda each: (each[0], -each[1].known_score, each[1].video_number, each[1].start_seconds))
        return [moment for _, moment in found], left_out

    def _grow(
        self, paths: Sequence[str], peak: _Place, scores: tuple[float, float], taken: set[tuple[str, int]]
    ) -> list[_Place]:
        """The places of a moment's frames, in order of time, without those of other moments."""
        least, below = max(scores[0], fallen(float(self._view(paths[peak[0]]).scores[peak[1]]))), scores[1]
        places = [peak]
        for step in (-1, 1):
            at = peak
            while (following := self._next(paths, at, step)) is not None:
                path = paths[following[0]]
                view = self._view(path)
                if (path, following[1]) in taken:
                    break
                if not (view.passes[following[1]] and least <= view.scores[following[1]] < below):
                    break
                at = following
                places.append(at)
        return sorted(places)

    def _next(self, paths: Sequence[str], at: _Place, step: int) -> _Place | None:
        """The neighbouring frame if it shows the same, else None."""
        part, row = at
        look = self._look(paths[part])
        if 0 <= row + step < len(look.begins):
            return None if look.begins[max(row, row + step)] else (part, row + step)
        if not 0 <= part + step < len(paths):
            return None
        other = self._look(paths[part + step])
        earlier, later = (look, other) if step > 0 else (other, look)
        gap = later.times.time_seconds[0] - earlier.times.time_seconds[-1] - earlier.times.duration_seconds[-1]
        distance = 1 - float(earlier.keys[-1].astype(np.float32) @ later.keys[0].astype(np.float32))
        if gap >= TOUCH_SECONDS or distance > max(earlier.change, later.change):
            return None
        return part + step, 0 if step > 0 else len(other.begins) - 1

    def _moment(self, hit: FrameRef, uri: str, paths: Sequence[str], places: Sequence[_Place]) -> Moment:
        scores = [float(self._view(paths[part]).scores[row]) for part, row in places]
        best = places[int(np.argmax(scores))]
        first, last = (self._times(paths, place) for place in (places[0], places[-1]))
        return Moment(
            video_id=hit.video_id,
            video_number=hit.video_number,
            uri=uri,
            start_seconds=first[0],
            end_seconds=last[0] + last[1],
            best_seconds=self._times(paths, best)[0],
            score=float(np.mean(scores)),
        )

    def _times(self, paths: Sequence[str], place: _Place) -> tuple[float, float]:
        times = self._look(paths[place[0]]).times
        return float(times.time_seconds[place[1]]), float(times.duration_seconds[place[1]])

    def _parts_of(self, video_number: int) -> list[str]:
        """The paths of a video's parts, in order of time."""
        if video_number not in self._paths:
            bounds = self._archive.parts.bounds([video_number])
            places = bounds.of(video_number)
            places = places[np.argsort(bounds.first_seconds[places], kind="stable")]
            self._paths[video_number] = bounds.path[places].tolist()
        return self._paths[video_number]

    def _look(self, path: str) -> _Look:
        return _look(self._archive.frames_uri, path, len(self._keys.wanted))

    def _view(self, path: str) -> _View:
        if path not in self._views:
            look, keys = self._look(path), self._keys
            stored = look.keys.astype(np.float32)
            passes = np.ones(len(stored), bool)
            if self._rows is not None:
                passes[:] = False
                if path in self._rows:
                    passes[slice(None) if self._rows[path] is None else self._rows[path]] = True
            if len(keys.unwanted):
                passes &= ~(stored @ keys.unwanted.T >= keys.unwanted_threshold).any(axis=1)
            self._views[path] = _View(stored @ keys.wanted, passes)
        return self._views[path]


def _holds(moment: Moment, frame: FrameRef) -> bool:
    is_within = moment.start_seconds <= frame.time_seconds < moment.end_seconds
    return moment.video_number == frame.video_number and is_within
