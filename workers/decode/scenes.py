"""Where scenes begin, by PySceneDetect; of the extra `scenes`, and loaded by decoder processes that need it alone."""

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from scenedetect import ContentDetector, FrameTimecode

from workers.decode.clock import TimedFrame

SIDE = 256  # the longer side of what is compared: PySceneDetect's own default is about that


class SceneStarts:
    """Whether a scene begins with a frame: it differs from the one before as PySceneDetect's default demands."""

    def __init__(self):
        self._detector = ContentDetector(min_scene_len=0)
        self._reformatter = VideoReformatter()
        self._count = 0

    def __call__(self, frame: TimedFrame) -> bool:
        """To be asked of every frame in order."""
        self._count += 1
        return bool(self._detector.process_frame(FrameTimecode(self._count, 1.0), self._small(frame.picture)))

    def _small(self, picture: av.VideoFrame) -> np.ndarray:
        scale = min(1.0, SIDE / max(picture.width, picture.height))
        width, height = (max(1, round(side * scale)) for side in (picture.width, picture.height))
        return self._reformatter.reformat(picture, width, height, "bgr24", threads=1).to_ndarray()
