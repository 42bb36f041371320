"""fuse: the frames that a question is asked about, shown to the model from the best source of pre-fusion at hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from storage.archive.archive import Archive
from storage.errors import VideoProblem
from storage.files import file_path
from storage.parts.read import cell_shape, has_column, read_compressor_out, read_patches, read_tokens
from storage.records import FrameRef, VideoRow
from workers.decode.client import Decoder, allowed_pixels
from workers.llm.engine import SamplingParams
from workers.llm.frame_cache import ShownFrames
from workers.llm.model import LlavaMini
from workers.sources.identity import check_still_there, in_video
from workers.vision.encode import exact_inputs
from workers.vision.llava_mini import FusionInputs, patches_inputs, tokens_inputs

SOURCES = ("exact", "patches", "tokens")  # of what pre-fusion reads
STORED_AT_ONCE = 256  # frames whose stored rows are in memory together
DECODED_AT_ONCE = 64  # frames whose pixels are: 338 kB each


class Showing:
    """Frames of an archive, shown to its model.

    Attributes:
        frames: in order of video and time.
        source: what pre-fusion reads: "exact", "patches" or "tokens".
        note: why it is another source than the one wanted, or nothing.
        video_bytes_read: of video files, so far.
    """

    def __init__(self, archive: Archive, model: LlavaMini, frames: Sequence[FrameRef], wanted: str, most_bytes: int):
        """Nothing is read yet but the frames' tokens.

        Args:
            archive: where the frames are stored.
            model: the archive's model.
            frames: in order of video and time.
            wanted: "exact", "patches", "tokens", or "stored" for the best that needs no video. What is not at hand for
                every frame is replaced by the best that is, and the note says so.
            most_bytes: may be kept for further questions.
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
                "fused with tokens instead of patches: not all of these frames were indexed with a patch tier "
                "(--patches)"
            )
        self._stored = stored
        self._best = wanted if wanted in ("exact", "tokens") else stored
        self._show(self._best)

    def _show(self, source: str) -> None:
        self.source = source
        inputs = self._decoded if source == "exact" else self._stored_inputs
        self._shown = ShownFrames(self._model, self._tokens, inputs, self._most_bytes)

    @property
    def size_bytes(self) -> int:
        """What is kept for further questions."""
        return self._shown.size_bytes

    def reply(self, ids: Sequence[int], most_tokens: int, sampling: SamplingParams) -> Iterator[int]:
        """The answer to a prompt, id by id, as ShownFrames.reply."""
        if self.source != self._best:  # what was out of reach may be back
            self.note = ""
            self._show(self._best)
        try:
            yield from self._shown.reply(ids, most_tokens, sampling)
        except VideoProblem as problem:  # which comes before the first id, or not at all
            self.note = f"fused with {self._stored} instead of exact: {problem.detail}"
            self._show(self._stored)
            yield from self._shown.reply(ids, most_tokens, sampling)

    def _stored_inputs(self) -> Iterator[FusionInputs]:
        return stored_inputs(self._archive, self._model, self.frames, self.source)

    def _decoded(self) -> Iterator[FusionInputs]:
        numbers = {frame.video_number for frame in self.frames}
        rows = {row.video_number: row for row in self._archive.videos.all() if row.video_number in numbers}
        with Decoder(max_pixels=_allowed_pixels(rows.values())) as decoder:
            try:
                yield from decoded_inputs(rows, self._model, self.frames, decoder)
            finally:
                self.video_bytes_read += decoder.bytes_read


def _allowed_pixels(rows: Iterable[VideoRow]) -> int:
    """Room for the largest of these videos, all of which were allowed when they were indexed."""
    return max(allowed_pixels(row.known_probe) for row in rows)


def stored_inputs(
    archive: Archive, model: LlavaMini, frames: Sequence[FrameRef], source: str
) -> Iterator[FusionInputs]:
    """What is stored of the frames: "patches", or "tokens" alone."""
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
    """The frames decoded and encoded once more.

    Raises:
        VideoProblem: a video is gone, changed, or does not give its frames again; the detail names it.
    """
    for row in rows.values():
        check_still_there(row)  # all first: a video out of reach is found before anything is decoded
    for number, group in groupby(frames, key=lambda frame: frame.video_number):
        row, ticks = rows[number], [frame.ticks for frame in group]
        times_rise = row.problem is None  # or it says that the clock begins anew
        try:
            path, probe = file_path(row.uri), row.known_probe
            for pixels in decoder.batches_at(path, probe, ticks, DECODED_AT_ONCE, times_rise):
                yield from exact_inputs(model.vision, pixels)
        except VideoProblem as problem:
            raise in_video(row, problem) from problem


def _chunks(frames: Sequence[FrameRef], size: int) -> Iterable[Sequence[FrameRef]]:
    return (frames[start : start + size] for start in range(0, len(frames), size))
