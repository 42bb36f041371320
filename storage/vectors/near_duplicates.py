"""Runs: frames of a part that follow one another and look alike. The index has one code for each run, not each frame.

A camera that shows one thing for a while gives many keys that hardly differ; a run's mean tells about where all of them
are. Where no two neighbours look alike every run is of one frame.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from storage.archive.archive import Archive
from storage.vectors.exact_keys import keys_of

ALIKE = 0.95  # least cosine between the first key of a run and the others
LONGEST = 32  # frames


def run_starts(keys: np.ndarray) -> np.ndarray:
    """(R,) int64: the first row of each run of a part's keys, (T, E) float32, L2-normalised."""
    starts, at = [], 0
    while at < len(keys):
        starts.append(at)
        alike = keys[at + 1 : at + LONGEST] @ keys[at] >= ALIKE
        at += 1 + (len(alike) if alike.all() else int(alike.argmin()))
    return np.array(starts, np.int64)


def run_means(keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(R, E) float32: the mean of each run's keys."""
    return np.add.reduceat(keys, starts, axis=0) / np.diff(starts, append=len(keys))[:, None].astype(np.float32)


def sample_runs(archive: Archive, parts: Sequence[tuple[str, int, int]], frame_count: int) -> tuple[np.ndarray, float]:
    """(S, E) float32, the means of the runs of parts with about so many frames, evenly spread; and runs per frame.

    Args:
        archive: whose keys.
        parts: paths, video numbers and row counts.
        frame_count: of the parts that are looked at.
    Raises:
        ArchiveError: a part is missing or damaged.
    """
    found: list[np.ndarray] = []
    frames = 0
    for path, _, row_count in _evenly(parts, frame_count):
        stored = keys_of(archive, path, row_count, found[0].shape[1] if found else None)
        if stored is not None and len(stored):
            keys = stored.astype(np.float32)
            found.append(run_means(keys, run_starts(keys)))
            frames += len(keys)
    means = np.concatenate(found) if found else np.empty((0, 0), np.float32)
    return means, len(means) / max(1, frames)


def _evenly(parts: Sequence[tuple[str, int, int]], frame_count: int) -> Iterable[tuple[str, int, int]]:
    """Parts that hold every so manyth of all frames, in steps, and are met once however large they are."""
    total = sum(row_count for _, _, row_count in parts)
    share, wanted = min(1.0, frame_count / max(1, total)), 0.0
    for part in parts:
        wanted += share * part[2]
        if wanted > 0:
            yield part
            wanted -= part[2]
