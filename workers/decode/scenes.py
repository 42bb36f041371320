"""First frames of scenes, found by PySceneDetect (the extra `scenes`)."""

from av.video.reformatter import VideoReformatter
from scenedetect import ContentDetector, FrameTimecode

from workers.decode.clock import TimedFrame

SIDE = 256  # longer side of the compared pictures, about PySceneDetect's own default


class SceneStarts:
    """Whether a scene begins with a frame, by PySceneDetect's default threshold."""

    def __init__(self):
        self._detector = ContentDetector(min_scene_len=0)
        self._reformatter = VideoReformatter()
        self._count = 0

    def __call__(self, frame: TimedFrame) -> bool:
        """Must be called for every frame, in order."""
        self._count += 1
        picture = frame.picture
        scale = min(1.0, SIDE / max(picture.width, picture.height))
        width, height = (max(1, round(side * scale)) for side in (picture.width, picture.height))
        pixels = self._reformatter.reformat(picture, width, height, "bgr24", threads=1).to_ndarray()
        return bool(self._detector.process_frame(FrameTimecode(self._count, 1.0), pixels))
