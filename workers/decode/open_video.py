"""Opening a video through PyAV and reading its packets; no other file is read, and no error line is lost."""

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition

from storage.errors import VideoProblem
from storage.records import Choice, Probe, Reason, Segment
from workers.decode.damage import Damage
from workers.decode.encryption import ENCRYPTED_DETAIL, looks_encrypted
from workers.decode.structure import begins_as_jpeg, cut_short, end_of_recording, is_picture, name_content
from workers.sources.video_file import VideoFile

# Containers that hold video in one file. Audio formats are included so that the message can say "no video stream".
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,mxf,nut,rm,ivf,gxf,dv,nsv,nuv,wtv,yuv4mpegpipe,"
    "h261,h263,h264,hevc,vvc,m4v,mpegvideo,mjpeg,mpjpeg,vc1,obu,av1,cavsvideo,dirac,"
    "mp3,aac,ac3,eac3,dts,flac,wav,w64,aiff,au,caf,amr,ape,wv,tta,mpc,mpc8,tak,dsf,aa,loas,truehd,mlp"
)
_READ_FAILURES = 64  # read errors in a row after which the rest of a file is not read


def _unknown_type(cls: type[SideDataType], value: object) -> SideDataType:
    """An enum member for a kind of side data that PyAV does not know."""
    member: Any = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


# PyAV 18.1 raises for kinds of side data that FFmpeg 8.1 added (EXIF, views of spatial video).
# Fixed after 18.1: github.com/PyAV-Org/PyAV/pull/2392.
SideDataType._missing_ = classmethod(_unknown_type)  # type: ignore[method-assign, assignment]  # as an enum has it

# FFmpeg's error lines are captured by OpenVideo (av.logging.Capture) and not printed.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False


@dataclass(frozen=True)
class VideoInput:
    """A file to read, and how.

    Attributes:
        file: the file.
        max_pixels: of a frame; larger frames are refused.
        threads: of the decoder.
        alive: called often; raises if reading takes too long, or nobody waits for the result.
    """

    file: VideoFile
    max_pixels: int
    threads: int
    alive: Callable[[], None]


@dataclass(frozen=True)
class DecodeTask:
    """A request for frames of a video: those of a segment, with fps and choice as in Sampling."""

    source: VideoInput
    probe: Probe
    segment: Segment
    fps: Fraction
    choice: Choice


class OpenVideo:
    """A file opened by PyAV, with its video stream; a context manager.

    Only the given descriptor is read. FFmpeg gets no path, and opening any other file is refused.

    Attributes:
        lines: FFmpeg's error lines (level, component, text) since they were last cleared.
        time_base: seconds per tick of the stream.

    Raises:
        VideoProblem: the format or codec is not supported, there is no video stream, or frames exceed max_pixels.
    """

    def __init__(self, source: VideoInput):
        self.file = source.file
        self.max_pixels = source.max_pixels
        self._alive = source.alive
        with ExitStack() as opened:
            capture = av.logging.Capture(local=False)
            self.lines: list = opened.enter_context(capture)  # type: ignore[arg-type]  # as PyAV declares its __exit__
            self.container = opened.enter_context(open_container(source, self.lines))
            self.stream = self._checked(self.container.streams.best("video"))
            assert self.stream.time_base is not None  # FFmpeg sets it for every stream
            self.time_base = self.stream.time_base
            for other in self.container.streams:
                if other.index != self.stream.index:
                    other.discard = Discard.all
            context = self.stream.codec_context
            context.thread_count = source.threads
            context.thread_type = "AUTO" if source.threads > 1 else "NONE"
            context.options = {"max_pixels": str(source.max_pixels)}
            self._opened = opened.pop_all()

    def _checked(self, stream: av.stream.Stream | None) -> av.VideoStream:
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = sorted({other.type for other in self.container.streams})
            picture = " (its picture is a cover)" if stream is not None else ""
            raise VideoProblem(
                Reason.NO_VIDEO_STREAM, f"streams in the file: {', '.join(kinds) or 'none'}, no video{picture}"
            )
        if stream.codec_context is None:
            raise VideoProblem(Reason.UNSUPPORTED_CODEC, "FFmpeg has no decoder for the codec of the video stream")
        if "enc_key_id" in stream.metadata:  # Matroska and WebM
            raise VideoProblem(Reason.ENCRYPTED, ENCRYPTED_DETAIL)
        check_pixels(stream.codec_context.width, stream.codec_context.height, self.max_pixels)
        return stream

    def __enter__(self) -> "OpenVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the container; the file stays open."""
        self._opened.close()

    def packets(self, damage: Damage) -> Iterator[av.Packet]:
        """The stream's packets from the current position on; continues after read errors, which are noted as damage.

        Error lines of the container's reader are noted too: Matroska's reports a damaged file in no other way.
        """
        packets = self.container.demux(self.stream)
        failures = 0
        while failures < _READ_FAILURES:
            self._alive()
            self.lines.clear()
            try:
                packet = next(packets, None)
            except IndexError:  # PyAV 18 raises it at the end if a stream appeared midway
                packet = None
            except av.error.MemoryError as error:
                raise out_of_memory() from error
            except av.FFmpegError as error:
                failures += 1
                damage.note(None, f"reading the file failed: {error.strerror}")
                packets = self.container.demux(self.stream)
                continue
            failures = 0
            for _, component, text in self.lines:
                if component == self.format_name:
                    damage.note(None, text.strip())
            self.lines.clear()
            if packet is None:
                return
            if packet.size:  # an empty packet repeats a frame in Theora, and ends the stream in PyAV
                yield packet

    @property
    def format_name(self) -> str:
        """FFmpeg's name of the container format."""
        return self.container.format.name


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises VideoProblem(TOO_LARGE) for a frame of more than max_pixels."""
    if width * height > max_pixels:
        raise VideoProblem(
            Reason.TOO_LARGE,
            f"frames of {width} x {height} pixels are above the limit of {max_pixels} (--max-pixels)",
        )


def check_refused_size(lines: list, max_pixels: int) -> None:
    """Raises VideoProblem(TOO_LARGE) if FFmpeg itself has refused the size of a frame."""
    for _, _, text in lines:
        match = re.search(r"Picture size (\d+)x(\d+)", text)
        if match:
            check_pixels(int(match[1]), int(match[2]), max_pixels)


def open_container(source: VideoInput, lines: list) -> av.container.InputContainer:
    """Opens a file with PyAV, which can read no other file; raises as OpenVideo."""
    file, max_pixels = source.file, source.max_pixels
    options = {
        "format_whitelist": DEMUXERS,
        "protocol_whitelist": "file",
        "max_pixels": str(max_pixels),
        "enable_drefs": "0",
    }
    try:
        container = _open(file, options)
    except av.error.MemoryError as error:
        raise out_of_memory() from error
    except av.FFmpegError as error:
        pictures = _open_jpeg_stream(file, options) if begins_as_jpeg(file) else None
        if pictures is None:
            raise _unopened(file, error) from error
        container = pictures
    check_refused_size(lines, max_pixels)
    return container


def _open(file: VideoFile, options: dict[str, str], kind: str | None = None) -> av.container.InputContainer:
    file.seek(0)
    file.size = end_of_recording(file)
    return av.open(
        file, "r", format=kind, io_open=_refuse_open, options=options, metadata_errors="replace", buffer_size=1 << 18
    )


def _open_jpeg_stream(file: VideoFile, options: dict[str, str]) -> av.container.InputContainer | None:
    """Opens a sequence of JPEG pictures, which FFmpeg takes for one picture; None if there is only one."""
    try:
        with _open(file, options, "mjpeg") as container:
            pictures = [bytes(packet) for packet in itertools.islice(container.demux(video=0), 2) if packet.size]
        if len(pictures) == 2 and pictures[1].startswith(b"\xff\xd8\xff"):
            return _open(file, options, "mjpeg")
    except av.FFmpegError:
        pass
    return None


def _refuse_open(url: str, flags: int, options: dict) -> None:
    raise VideoProblem(Reason.REFUSED_FORMAT, f"the file refers to another file: {url}")


def _unopened(file: VideoFile, error: av.FFmpegError) -> VideoProblem:
    picture = is_picture(file)
    if picture is not None:
        return VideoProblem(Reason.NOT_A_VIDEO, f"this is {picture}, not a video")
    missing = cut_short(file)
    if missing is not None:
        return VideoProblem(Reason.TRUNCATED, f"the file is cut short: {missing}")
    content = name_content(file)
    if content is not None:
        return VideoProblem(Reason.NOT_A_VIDEO, f"this is {content}, not a video")
    if looks_encrypted(file):
        return VideoProblem(Reason.ENCRYPTED, ENCRYPTED_DETAIL)
    if isinstance(error, av.error.ArgumentError):  # raised for formats that are not in DEMUXERS
        return VideoProblem(Reason.REFUSED_FORMAT, "its format is not among the supported video formats")
    return VideoProblem(Reason.NOT_A_VIDEO, f"FFmpeg recognises no video format in it ({error.strerror})")


def out_of_memory() -> VideoProblem:
    """The problem of a video whose decoding exceeds the memory limit."""
    return VideoProblem(Reason.TOO_LARGE, "decoding needs more memory than a decoder may use")
