"""Opening a video through PyAV and reading its packets: nothing but the one file, and no error unheard."""

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Discard, Disposition

from storage.errors import VideoProblem
from storage.records import Choice, Probe, Reason, Segment
from workers.decode.damage import Damage
from workers.decode.encryption import ENCRYPTED_DETAIL, looks_encrypted, names_key
from workers.decode.structure import begins_as_jpeg, cut_short, end_of_recording, is_picture, name_content
from workers.sources.video_file import VideoFile

# Containers of one file that hold video, and audio ones, so that a song is told from a file of no kind.
DEMUXERS = (
    "mov,matroska,avi,mpegts,mpeg,ogg,flv,asf,mxf,nut,rm,ivf,gxf,dv,nsv,nuv,wtv,yuv4mpegpipe,"
    "h261,h263,h264,hevc,vvc,m4v,mpegvideo,mjpeg,mpjpeg,vc1,obu,av1,cavsvideo,dirac,"
    "mp3,aac,ac3,eac3,dts,flac,wav,w64,aiff,au,caf,amr,ape,wv,tta,mpc,mpc8,tak,dsf,aa,loas,truehd,mlp"
)
_READ_FAILURES = 64  # in a row, after which the rest of a file is given up


def _unknown_type(cls: type[SideDataType], value: object) -> SideDataType:
    """A member for a kind of side data that PyAV does not know."""
    member: Any = object.__new__(cls)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return member


# FFmpeg 8.1 gives frames side data of kinds that PyAV 18.1 raises for, however the frame is asked (EXIF, views of
# spatial video). Mended after 18.1: github.com/PyAV-Org/PyAV/pull/2392.
SideDataType._missing_ = classmethod(_unknown_type)  # type: ignore[method-assign, assignment]  # as an enum has it

# FFmpeg's error lines are read here (av.logging.Capture) and go nowhere else.
av.logging.set_level(av.logging.ERROR)
av.logging.set_skip_repeated(False)
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False


@dataclass(frozen=True)
class DecodeTask:
    """Which frames of a file are wanted, and how it may be read.

    Attributes:
        file, probe: the video.
        segment: the stretch of it.
        fps, choice: which of its frames, as Sampling has them.
        threads: of the decoder.
        max_pixels: of a frame; larger ones are refused.
        alive: called now and then; raises where nobody waits for the frames any more, or they take too long.
    """

    file: VideoFile
    probe: Probe
    segment: Segment
    fps: Fraction
    choice: Choice
    threads: int
    max_pixels: int
    alive: Callable[[], None]


class OpenVideo:
    """A file opened by PyAV, with its video stream; a context manager.

    Nothing but the given descriptor is read: FFmpeg gets no path, and every file that a format asks for is refused.

    Attributes:
        lines: FFmpeg's error lines (level, who, words) since they were last cleared.
        time_base: seconds per tick of the stream.

    Raises:
        VideoProblem: no format on the list, no video stream, no decoder for it, or a picture above max_pixels.
    """

    def __init__(self, file: VideoFile, max_pixels: int, threads: int):
        self.file = file
        self.max_pixels = max_pixels
        self._capture = av.logging.Capture(local=False)
        self.lines = self._capture.__enter__()
        try:
            self.container = open_container(file, max_pixels, self.lines)
        except BaseException:
            self._capture.__exit__(None, None, None)
            raise
        try:
            self.stream = self._checked(self.container.streams.best("video"))
            assert self.stream.time_base is not None  # FFmpeg gives each stream one
            self.time_base = self.stream.time_base
            for other in self.container.streams:
                if other.index != self.stream.index:
                    other.discard = Discard.all
            context = self.stream.codec_context
            context.thread_count = threads
            context.thread_type = "AUTO" if threads > 1 else "NONE"
            context.options = {"max_pixels": str(max_pixels)}
        except BaseException:
            self.close()
            raise

    def _checked(self, stream: av.stream.Stream | None) -> av.VideoStream:
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = sorted({other.type for other in self.container.streams})
            picture = " (its picture is a cover, not a video)" if stream is not None else ""
            raise VideoProblem(
                Reason.NO_VIDEO_STREAM, f"streams in the file: {', '.join(kinds) or 'none'}, no video{picture}"
            )
        if stream.codec_context is None:
            raise VideoProblem(Reason.UNSUPPORTED_CODEC, "there is no decoder for the codec of its video stream")
        if names_key(stream):
            raise VideoProblem(Reason.ENCRYPTED, ENCRYPTED_DETAIL)
        check_pixels(stream.codec_context.width, stream.codec_context.height, self.max_pixels)
        return stream

    def __enter__(self) -> "OpenVideo":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the container, not the file."""
        self.container.close()
        self._capture.__exit__(None, None, None)

    def packets(self, damage: Damage, alive: Callable[[], None]) -> Iterator[av.Packet]:
        """The stream's packets, on from where the file stands; goes on behind read errors while any come.

        Matroska's reader ends a damaged file early with no other sign than an error line.
        """
        packets = self.container.demux(self.stream)
        failures = 0
        while failures < _READ_FAILURES:
            alive()
            self.lines.clear()
            try:
                packet = next(packets, None)
            except IndexError:  # PyAV 18 ends so where a stream appeared midway
                packet = None
            except av.error.MemoryError as error:
                raise out_of_memory() from error
            except av.FFmpegError as error:
                failures += 1
                damage.note(None, f"the file cannot be read on: {error.strerror}")
                packets = self.container.demux(self.stream)
                continue
            failures = 0
            for _, who, words in self.lines:
                if who == self.format_name:
                    damage.note(None, words.strip())
            self.lines.clear()
            if packet is None:
                return
            if packet.size:  # empty: Theora's sign to show the frame before once more; PyAV's to drain
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
    """Raises VideoProblem(TOO_LARGE) where FFmpeg has refused a picture size by itself."""
    for _, _, words in lines:
        match = re.search(r"Picture size (\d+)x(\d+)", words)
        if match:
            check_pixels(int(match[1]), int(match[2]), max_pixels)


def open_container(file: VideoFile, max_pixels: int, lines: list) -> av.container.InputContainer:
    """A file opened by PyAV, which reads nothing else; as OpenVideo."""
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
    """A file of JPEG pictures one after the other, which FFmpeg takes for a picture; None for a single picture."""
    try:
        with _open(file, options, "mjpeg") as container:
            pictures = [bytes(packet) for packet in itertools.islice(container.demux(video=0), 2) if packet.size]
        if len(pictures) == 2 and pictures[1].startswith(b"\xff\xd8\xff"):
            return _open(file, options, "mjpeg")
    except av.FFmpegError:
        pass
    return None


def _refuse_open(url: str, flags: int, options: dict) -> None:
    raise VideoProblem(Reason.REFUSED_FORMAT, f"it asks for another file: {url}")


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
    if isinstance(error, av.error.ArgumentError):  # what FFmpeg answers for a format that is not on the list
        return VideoProblem(Reason.REFUSED_FORMAT, "its format is not among the video formats that are read")
    return VideoProblem(Reason.NOT_A_VIDEO, f"no video format is recognised in it ({error.strerror})")


def out_of_memory() -> VideoProblem:
    """What it means that a decoder ran into the limit on its memory."""
    return VideoProblem(Reason.TOO_LARGE, "decoding it needs more memory than a decoder is allowed")
