"""split: a probed video -> the segments that are decoded, encoded and committed one by one."""

from storage.records import Probe, Segment

# Long enough that seeking and Parquet parts cost little, short enough that a killed job loses little. Segment keys in
# archives depend on it: with another value, the rest of a half-indexed video would be cut differently.
SEGMENT_SECONDS = 300


def split(video_id: str, probe: Probe, segment_seconds: float = SEGMENT_SECONDS) -> list[Segment]:
    """Segments that tile a video, cut at keyframes, each at least segment_seconds long (the last may be shorter).

    They depend on the keyframes that exist, and not on the duration in the header.
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
