"""fuse: a question's text with the frames it is asked about, from the best source of pre-fusion at hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from storage.archive import Archive
from storage.cells import cell_shape, keeps, read_compressor_out, read_patches
from storage.errors import VideoProblem
from storage.files import local_path
from storage.records import FrameRef, VideoRow
from workers.content import check_still_there, in_video
from workers.decode import Decoder, allowed_pixels
from workers.encode import exact_inputs
from workers.llava_mini import FusionInputs, LlavaMini, fuse_question, patches_inputs, tokens_inputs

STORED_AT_ONCE = 256  # frames whose stored rows are in memory together
DECODED_AT_ONCE = 64  # frames whose pixels are: 338 kB each


@dataclass(frozen=True)
class Fused:
    """A question fused with its frames.

    Attributes:
        features: (L, H) float32, the mean over the frames.
        source: what pre-fusion read: "exact", "patches" or "tokens".
        note: why it is another source than the one wanted, or nothing.
        video_bytes_read: of video files.
    """

    features: Tensor
    source: str
    note: str
    video_bytes_read: int


def fuse(archive: Archive, model: LlavaMini, ids: Sequence[int], frames: Sequence[FrameRef], wanted: str) -> Fused:
    """The question fused with every frame.

    Args:
        archive: where the frames are stored.
        model: the archive's model.
        ids: the prompt.
        frames: in order of video and time.
        wanted: "exact", "patches", "tokens", or "stored" for the best that needs no video. What is not at hand for
            every frame is replaced by the best that is, and the note says so.
    """
    stored = "patches" if keeps(archive.frames_uri, "patches", frames) else "tokens"
    note, bytes_read = "", 0
    if wanted == "exact":
        numbers = {frame.video_number for frame in frames}
        rows = {row.video_number: row for row in archive.videos() if row.video_number in numbers}
        with Decoder(max_pixels=_allowed_pixels(rows.values())) as decoder:
            try:
                features = fuse_question(model, ids, decoded_inputs(rows, model, frames, decoder))
                return Fused(features, "exact", "", decoder.bytes_read)
            except VideoProblem as problem:
                note = f"fused with {stored} instead of exact: {problem.detail}"
            bytes_read = decoder.bytes_read
    elif wanted == "patches" and stored == "tokens":
        note = (
            "fused with tokens instead of patches: not all of these frames were indexed with a patch tier (--patches)"
        )
    source = "tokens" if wanted == "tokens" else stored
    features = fuse_question(model, ids, stored_inputs(archive, model, frames, source))
    return Fused(features, source, note, bytes_read)


def _allowed_pixels(rows: Iterable[VideoRow]) -> int:
    """Room for the largest of these videos, all of which were allowed when they were indexed."""
    return max(allowed_pixels(row.probe) for row in rows)


def stored_inputs(
    archive: Archive, model: LlavaMini, frames: Sequence[FrameRef], source: str
) -> Iterator[FusionInputs]:
    """What is stored of the frames: "patches", or "tokens" alone."""
    uri = archive.frames_uri
    if source == "tokens":
        for batch in _chunks(frames, STORED_AT_ONCE):
            yield tokens_inputs(model.vision, read_compressor_out(uri, batch))
        return
    for _, alike in groupby(frames, key=lambda frame: cell_shape(uri, "patches", frame)):  # --patches may have changed
        for batch in _chunks(list(alike), STORED_AT_ONCE):
            yield patches_inputs(model.vision, read_compressor_out(uri, batch), read_patches(uri, batch))


def decoded_inputs(
    rows: Mapping[int, VideoRow], model: LlavaMini, frames: Sequence[FrameRef], decoder: Decoder
) -> Iterator[FusionInputs]:
    """The frames decoded and encoded once more.

    Raises:
        VideoProblem: a video is gone, changed, or does not give its frames again; the detail names it.
    """
    for row in rows.values():
        check_still_there(row)  # all first: a video out of reach is found before anything is decoded
    for number, group in groupby(frames, key=lambda frame: frame.video_number):
        row = rows[number]
        for batch in _chunks(list(group), DECODED_AT_ONCE):
            try:
                pixels = decoder.frames_at(local_path(row.uri), row.probe, [frame.ticks for frame in batch])
            except VideoProblem as problem:
                raise in_video(row, problem) from problem
            yield from exact_inputs(model.vision, pixels)


def _chunks(frames: Sequence[FrameRef], size: int) -> Iterable[Sequence[FrameRef]]:
    return (frames[start : start + size] for start in range(0, len(frames), size))
