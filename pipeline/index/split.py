"""split: one probed video -> the segments that are decoded, encoded and committed on their own."""

from storage.records import Probe, Segment

# Long enough that seeking and a Parquet part cost little, short enough that a killed job loses little. It is
# part of every archive's segment keys: with another value a half-done video would be cut elsewhere.
SEGMENT_SECONDS = 300


def split(video_id: str, probe: Probe, segment_seconds: float = SEGMENT_SECONDS) -> list[Segment]:
    """Segments of at least segment_seconds each, cut at keyframes, that tile the video.

    The number of segments follows the keyframes that exist, never the duration that a header claims.
    """
    length = segment_seconds / probe.time_base
    start_ticks, first_index, origin = None, 0, probe.first_ticks
    segments = []
    for ticks, frame_index in probe.cuts:
        if ticks - origin >= length:
            segments.append(Segment(video_id, start_ticks, ticks, first_index))
            start_ticks, first_index, origin = ticks, frame_index, ticks
    segments.append(Segment(video_id, start_ticks, None, first_index))
    return segments
