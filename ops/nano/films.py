"""From scripts to encoded video files, and back to what the model sees of their frames."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ops.nano.render import frame
from ops.nano.scenes import Script
from workers.decode.picture import model_pixels
from workers.models.preprocess import PictureSettings, frame_parts


@dataclass(frozen=True)
class Encoding:
    """How a video is written.

    Attributes:
        suffix: of the file, which says the container.
        options: of the encoder.
    """

    codec: str
    suffix: str
    options: tuple[tuple[str, str], ...]


# As videos in archives are: mostly h264, some older, some newer; sharp to rather coarse.
ENCODINGS = (
    *(Encoding("libx264", ".mp4", (("crf", crf), ("preset", "veryfast"))) for crf in ("20", "25", "30", "34")),
    Encoding("libx264", ".mkv", (("crf", "27"), ("preset", "veryfast"), ("g", "60"), ("bf", "2"))),
    Encoding("mpeg4", ".mp4", (("b", "900k"), ("g", "12"))),
    Encoding("mpeg4", ".avi", (("b", "500k"), ("g", "50"))),
    Encoding("libx265", ".mp4", (("crf", "29"), ("preset", "ultrafast"), ("x265-params", "log-level=none:pools=1"))),
    Encoding("libvpx", ".webm", (("crf", "20"), ("b", "600k"), ("deadline", "realtime"), ("cpu-used", "8"))),
    Encoding("mpeg2video", ".ts", (("b", "1200k"), ("g", "15"))),
)


def encode_script(script: Script, path: Path, encoding: Encoding, noise: np.random.Generator) -> None:
    """Renders a script and writes it as a video file, one thread, the same bytes for the same generator."""
    rate = Fraction(script.rate).limit_denominator(1000)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:  # no random ids in the container
        stream = container.add_stream(
            encoding.codec, rate=_allowed_rate(encoding, rate), options=dict(encoding.options)
        )
        stream.width, stream.height = script.width, script.height
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for number in range(round(script.duration * script.rate)):
            picture = av.VideoFrame.from_ndarray(frame(script, number / script.rate, noise), format="rgb24")
            picture.pts, picture.time_base = number, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _allowed_rate(encoding: Encoding, rate: Fraction) -> Fraction:
    """MPEG-2 knows eight rates; the frames' own times count, so the next higher one will do."""
    return Fraction(25) if encoding.codec == "mpeg2video" and rate != 24 else rate


def read_frames(path: Path, pictures: PictureSettings) -> np.ndarray:
    """Every frame of a video as the model's tower sees it: (T, S, S, 3) uint8."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        frames = [model_pixels(picture.to_ndarray(format="rgb24")) for picture in container.decode(stream)]
    return frame_parts(np.stack(frames), 1, pictures)[:, 0]
