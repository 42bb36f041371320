"""fuse: frames and a question -> the model's answer, with pre-fusion from the best available source."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from storage.archive.archive import Archive
from storage.errors import VideoProblem
from storage.files import file_path
from storage.parts.read import cell_shape, has_column, read_compressor_out, read_patches, read_tokens
from storage.records import FrameRef, VideoRow
from workers.decode.client import Decoder, allowed_pixels
from workers.llm.engine import SamplingParams
from workers.llm.model import LlavaMini
from workers.llm.shown_frames import ShownFrames
from workers.sources.identity import check_still_there, in_video
from workers.vision.encode import exact_inputs
from workers.vision.prefusion import FusionInputs, patches_inputs, tokens_inputs

SOURCES = ("exact", "patches", "tokens")  # what pre-fusion can read
STORED_AT_ONCE = 256  # frames whose stored rows are in memory together
DECODED_AT_ONCE = 64  # frames whose pixels are in memory together, 338 kB each


class Showing:
    """Frames of an archive that its model is shown.

    Attributes:
        frames: in order of video and time.
        source: what pre-fusion reads: "exact", "patches" or "tokens".
        note: why this is not the wanted source; empty if it is.
        video_bytes_read: bytes read from video files so far.
    """

    def __init__(self, archive: Archive, model: LlavaMini, frames: Sequence[FrameRef], wanted: str, most_bytes: int):
        """Reads the tokens of the frames, and nothing else yet.

        Args:
            wanted: "exact", "patches", "tokens", or "stored" for the best source that needs no video. A source that is
                not available for every frame is replaced by the best one that is; then `note` says why.
            most_bytes: limit of what is kept for further questions.
        """
        self.frames = tuple(frames)
        self.note, self.video_bytes_read = "", 0
        self._archive = archive
        self._model = model
        self._most_bytes = most_bytes
        self._tokens = read_tokens(archive.frames_uri, frames, model.vision.bundle.token_shape)
        stored = "patches" if has_column(archive.frames_uri, "patches", frames) else "tokens"
        if wanted == "patches" and stored == "tokens":
            self.note = (
                "fused with tokens instead of patches: some of these frames were indexed without patch rows (--patches)"
            )
        self._stored = stored
        self._best = wanted if wanted in ("exact", "tokens") else stored
        self._show(self._best)

    def _show(self, source: str) -> None:
        self.source = source
        stored = partial(stored_inputs, self._archive, self._model, self.frames, source)
        inputs = self._decoded if source == "exact" else stored
        self._shown = ShownFrames(self._model, self._tokens, inputs, self._most_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes kept for further questions."""
        return self._shown.size_bytes

    def reply(self, ids: Sequence[int], most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """The answer to a prompt, token id by token id."""
        if self.source != self._best:  # a video that was missing may be back
            self.note = ""
            self._show(self._best)
        try:
            yield from self._shown.reply(ids, most_tokens, sampling)
        except VideoProblem as problem:  # raised before the first id, if at all
            self.note = f"fused with {self._stored} instead of exact: {problem.detail}"
            self._show(self._stored)
            yield from self._shown.reply(ids, most_tokens, sampling)

    def _decoded(self) -> Iterator[FusionInputs]:
        numbers = {frame.video_number for frame in self.frames}
        rows = self._archive.videos.of_numbers(numbers)
        most_pixels = max(allowed_pixels(row.known_probe) for row in rows.values())  # they were all accepted before
        with Decoder(max_pixels=most_pixels) as decoder:
            try:
                yield from decoded_inputs(rows, self._model, self.frames, decoder)
            finally:
                self.video_bytes_read += decoder.bytes_read


def stored_inputs(
    archive: Archive, model: LlavaMini, frames: Sequence[FrameRef], source: str
) -> Iterator[FusionInputs]:
    """The inputs of pre-fusion from stored rows; the source is "patches" or "tokens"."""
    uri, shape = archive.frames_uri, model.vision.bundle.compressed_shape
    if source == "tokens":
        for batch in _chunks(frames, STORED_AT_ONCE):
            yield tokens_inputs(model.vision, read_compressor_out(uri, batch, shape))
        return
    for _, alike in groupby(frames, key=lambda frame: cell_shape(uri, "patches", frame)):  # --patches may have changed
        for batch in _chunks(list(alike), STORED_AT_ONCE):
            yield patches_inputs(
                model.vision, read_compressor_out(uri, batch, shape), read_patches(uri, batch, width=shape[1])
            )


def decoded_inputs(
    rows: Mapping[int, VideoRow], model: LlavaMini, frames: Sequence[FrameRef], decoder: Decoder
) -> Iterator[FusionInputs]:
    """The inputs of pre-fusion from the videos, whose frames are decoded and encoded again.

    Raises:
        VideoProblem: a video is gone, changed, or does not give its frames again; the detail names it.
    """
    for row in rows.values():
        check_still_there(row)  # a missing video is found before anything is decoded
    for number, group in groupby(frames, key=lambda frame: frame.video_number):
        row, ticks = rows[number], [frame.ticks for frame in group]
        times_rise = row.problem is None  # a problem may say that the clock restarts
        try:
            path, probe = file_path(row.uri), row.known_probe
            for pixels in decoder.batches_at(path, probe, ticks, DECODED_AT_ONCE, times_rise):
                yield from exact_inputs(model.vision, pixels)
        except VideoProblem as problem:
            raise in_video(row, problem) from problem


def _chunks(frames: Sequence[FrameRef], size: int) -> Iterable[Sequence[FrameRef]]:
    return (frames[start : start + size] for start in range(0, len(frames), size))
