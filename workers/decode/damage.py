"""What was found wrong while a video was read, and the rules that tell damage from what every player passes over."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import av

from storage.errors import VideoProblem

# FFmpeg's own words for picture data that could not be read; other error lines (references that a cut left
# dangling, clocks) appear in files that play from end to end.
_DAMAGE = re.compile(
    r"error while decoding|concealing|damaged|corrupt|invalid mb|invalid nal|illegal|overread|ended prematurely"
    r"|missing picture|splitting the input|could not find ref|partial file|truncat|not all references|bytestream"
    r"|exceed.* (?:packet|data)|cabac_max_bin|invalid (?:data|slice|start|block|as first byte)|slice mismatch",
    re.IGNORECASE,
)
# What a decoder says of pictures that need earlier ones or headers, where a recording begins without them.
_NEEDS_EARLIER = re.compile(r"\bref|missing picture|non-existing|no frame|mmco|recovery|keyframe", re.IGNORECASE)
_KEPT = 1000  # details


@dataclass
class Damage:
    """What is wrong with a stretch of video: when, in ticks (None: unknown), and in FFmpeg's words.

    Attributes:
        marks: the first thousand details.
        count: of all of them.
        passed_over: the first detail about pictures before the first whole one, which may be how a recording begins.
        has_whole_picture: whether one picture has come out undamaged.
        suspects: packets that the container calls incomplete and the decoder has nothing to say about.
        end: what decoding ended with before the end.
    """

    marks: list[tuple[int | None, str]] = field(default_factory=list)
    count: int = 0
    passed_over: str | None = None
    has_whole_picture: bool = False
    suspects: int = 0
    end: VideoProblem | None = None

    def note(self, ticks: int | None, detail: str) -> None:
        """Counts all, keeps the first few."""
        self.count += 1
        if len(self.marks) < _KEPT:
            self.marks.append((ticks, detail))

    def before(self, end_ticks: int | None) -> list[str]:
        """Details of what lies before end_ticks."""
        return [detail for ticks, detail in self.marks if end_ticks is None or ticks is None or ticks < end_ticks]

    @property
    def first_detail(self) -> str | None:
        """What is told of a video that has no whole picture."""
        return self.marks[0][1] if self.marks else self.passed_over


def words_of_damage(lines: Iterable[tuple]) -> str | None:
    """The first of FFmpeg's error lines that speaks of damage."""
    return next((words.strip() for _, _, words in lines if _DAMAGE.search(words)), None)


class DamageWatch:
    """Judges packets and frames as they pass, and notes the damage.

    A recording may begin in the middle of a group of pictures: until its first keyframe nothing is noted, and until
    its first whole picture nothing about missing references. A damaged first keyframe is noted.

    Args:
        damage: is filled in.
        start_ticks: damage before this time is not noted: pictures that a seek drops may lack their references.
        is_transport: whether this is MPEG-TS, where a packet is called incomplete after any jump of its counter, as
            where recordings were joined: it is only counted.
    """

    def __init__(self, damage: Damage, start_ticks: int | None, is_transport: bool):
        self._damage = damage
        self._start_ticks = start_ticks
        self._is_transport = is_transport
        self._has_begun = start_ticks is not None  # a seek lands on a keyframe
        self._begins_ticks: int | None = None
        self._troubled: set[int | None] = set()  # times of packets that were not decoded well, till a whole picture

    def packet(self, packet: av.Packet | None, ticks: int | None, trouble: str | None) -> None:
        """A packet after its decoding.

        Args:
            packet: None at the end.
            ticks: when its picture is shown, if known.
            trouble: what the decoder said, if that is damage.
        """
        if packet is not None and packet.is_discard:
            return
        if packet is not None and packet.is_keyframe and not self._has_begun:
            self._has_begun, self._begins_ticks = True, ticks
        if trouble is None and packet is not None and packet.is_corrupt:
            if self._is_transport:
                self._damage.suspects += not _before(ticks, self._start_ticks)
            else:
                trouble = "a packet is incomplete"
        if trouble is None:
            return
        if not self._damage.has_whole_picture:
            self._troubled.add(ticks)
        self._tell(ticks, trouble)

    def frame(self, pts: int | None, ticks: int, is_corrupt: bool) -> None:
        """A frame that came out of the decoder.

        Args:
            pts: its time as its packet had it.
            ticks: when it is shown.
            is_corrupt: whether the decoder marked it so.
        """
        if is_corrupt:
            self._tell(ticks, "a picture is damaged", by_itself=False)
        elif not self._damage.has_whole_picture and pts not in self._troubled:
            self._damage.has_whole_picture = True
            self._troubled.clear()

    def _tell(self, ticks: int | None, detail: str, by_itself: bool = True) -> None:
        if _before(ticks, self._start_ticks):
            return
        may_be_how_it_begins = not self._damage.has_whole_picture and (not by_itself or _NEEDS_EARLIER.search(detail))
        if self._has_begun and not _before(ticks, self._begins_ticks) and not may_be_how_it_begins:
            self._damage.note(ticks, detail)
        else:
            self._damage.passed_over = self._damage.passed_over or detail


def _before(ticks: int | None, other: int | None) -> bool:
    return ticks is not None and other is not None and ticks < other
