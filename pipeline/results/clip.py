"""cut: a moment of a video -> a new file."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.results.output import check_output
from pipeline.times import clock
from storage.errors import UsageError, VideoProblem
from storage.files import NO_LINKS, file_path, source_text
from storage.records import Reason, VideoRow
from workers.decode.client import Decoder, allowed_pixels
from workers.sources.identity import check_still_there, in_video

FORMATS = {  # FFmpeg's names, by suffix
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".avi": "avi",
    ".ts": "mpegts",
    ".mts": "mpegts",
    ".m2ts": "mpegts",
}


@dataclass(frozen=True)
class Clip:
    """A new file, and the positions in the source at which a player shows its start and end, in seconds."""

    file: str
    start_seconds: float
    end_seconds: float
    streams: int


def clip(row: VideoRow, start_seconds: float, end_seconds: float, file: str | None, *, overwrite: bool = False) -> Clip:
    """Copies a moment and its sound into a file, from the keyframe before it; nothing is encoded again.

    Args:
        start_seconds, end_seconds: positions that a player shows, half-open.
        file: the suffix names the format; None for VIDEO_START-END in the current folder.
    Raises:
        UsageError: the video is gone or changed, has no picture at this time, or has a codec that the format cannot
            hold; or the file exists or cannot be written.
    """
    source = Path(os.fsdecode(file_path(row.uri)))  # its very bytes, in any locale
    if row.probe is None:
        raise UsageError(
            f"{source_text(row.uri)}: nothing can be cut from it, because it could not be read when indexed"
        )
    times = f"{clock(start_seconds)}-{clock(end_seconds)}".replace(":", ".")
    suffix = source.suffix if source.suffix.lower() in FORMATS else ".mkv"
    out = file or f"{source.stem}_{times}{suffix}"
    check_output(out, FORMATS)
    partial = f"{out}.{os.getpid()}.part"
    try:
        check_still_there(row)
        if os.path.exists(out) and os.path.samefile(out, file_path(row.uri)):
            raise UsageError(f"{out}: this is the video itself; name another file")
        if os.path.lexists(out) and not overwrite:
            raise UsageError(f"{out}: this file exists; name another file, or overwrite it with --force")
        done = _write(row, start_seconds, end_seconds, partial, FORMATS[Path(out).suffix.lower()])
        _put(partial, out, overwrite)
    except FileExistsError as error:
        raise UsageError(f"{out}: this file has just been created; name another file, or use --force") from error
    except VideoProblem as problem:
        may_fit = problem.reason is Reason.UNSUPPORTED_CODEC and not out.endswith(".mkv")
        raise UsageError(problem.detail + ("; an .mkv file can hold most codecs" if may_fit else "")) from problem
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    return Clip(out, done["start_seconds"], done["end_seconds"], int(done["stream_count"]))


def _put(partial: str, out: str, overwrite: bool) -> None:
    """Gives a complete file its name.

    Raises:
        FileExistsError: the name is taken, and must not be overwritten.
    """
    if not overwrite:
        try:
            os.link(partial, out)
            return
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    os.replace(partial, out)


def _write(row: VideoRow, start_seconds: float, end_seconds: float, path: str, container: str) -> dict[str, float]:
    with open(path, "wb", buffering=0) as new, Decoder(max_pixels=allowed_pixels(row.known_probe)) as decoder:

        def write(offset: int, data: bytes) -> None:
            new.seek(offset)
            new.write(data)

        try:
            return decoder.cut(file_path(row.uri), row.known_probe, start_seconds, end_seconds, container, write)
        except VideoProblem as problem:
            raise in_video(row, problem) from problem
