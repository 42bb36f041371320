"""moments: hits -> stretches of video, best first."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from storage.records import FrameRef, Hit, Moment

# A moment ends where the score has fallen by this share of its peak. CLIP's cosines for text and picture lie close
# together (right ones at 0.2 to 0.3, others at 0.1 to 0.2), so that a tenth already separates scenes.
FALL = 0.1


def moments_of(
    hits: Sequence[Hit], frames: Mapping[tuple[int, int], FrameRef], uris: Mapping[int, str]
) -> list[Moment]:
    """Hits that follow one another in a video, without a frame between them, as one moment each.

    A moment grows from its best frame to both sides while the neighbouring frame is a hit and its score has not
    fallen by more than FALL of the peak; what is left makes moments of its own.

    Args:
        hits: any order, each frame at most once.
        frames: (video_number, frame_index) -> the stored frame of each hit.
        uris: video_number -> URI.
    Returns:
        Moments, best first; ties in order of video and time.
    """
    ordered = sorted(hits, key=lambda hit: (hit.video_number, hit.frame_index))
    moments = []
    for number, group in groupby(ordered, key=lambda hit: hit.video_number):
        run: list[tuple[Hit, FrameRef]] = []
        for hit in group:
            frame = frames[number, hit.frame_index]
            if run and not adjoin(run[-1][1], frame):
                moments += _grow(run, uris[number])
                run = []
            run.append((hit, frame))
        moments += _grow(run, uris[number])
    return sorted(moments, key=lambda moment: (-moment.score, moment.video_number, moment.start_seconds))


def fallen(peak: float) -> float:
    """The score below which a moment with that peak ends."""
    return peak - FALL * abs(peak)


def adjoin(earlier: FrameRef, later: FrameRef) -> bool:
    """Whether nothing lies between two frames of a video: spans tile it, so that neighbours touch.

    Half a millisecond allows for the rounding of ticks to seconds.
    """
    return later.time_seconds - (earlier.time_seconds + earlier.duration_seconds) < 5e-4


def _grow(run: list[tuple[Hit, FrameRef]], uri: str) -> list[Moment]:
    """Splits a run of adjoining hits into moments around its peaks."""
    moments = []
    left = [run]
    while left:
        frames = left.pop()
        peak = max(range(len(frames)), key=lambda i: frames[i][0].score)
        floor = fallen(frames[peak][0].score)
        start, end = peak, peak + 1
        while start > 0 and frames[start - 1][0].score >= floor:
            start -= 1
        while end < len(frames) and frames[end][0].score >= floor:
            end += 1
        moments.append(_moment(frames[start:end], frames[peak], uri))
        left += [rest for rest in (frames[:start], frames[end:]) if rest]
    return moments


def _moment(frames: list[tuple[Hit, FrameRef]], best: tuple[Hit, FrameRef], uri: str) -> Moment:
    last = frames[-1][1]
    return Moment(
        video_id=last.video_id,
        video_number=last.video_number,
        uri=uri,
        start_seconds=frames[0][1].time_seconds,
        end_seconds=last.time_seconds + last.duration_seconds,
        best_seconds=best[1].time_seconds,
        score=best[0].score,
    )
