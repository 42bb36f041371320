"""Damage that is found while a video is read, and the rules for what counts as damage."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import av

from storage.errors import VideoProblem

# FFmpeg's messages about data that cannot be read. Its other error lines (missing references after a cut, clocks)
# also appear for files that play from end to end.
_DAMAGE = re.compile(
    r"error while decoding|concealing|damaged|corrupt|invalid mb|invalid nal|illegal|overread|ended prematurely"
    r"|missing picture|splitting the input|could not find ref|partial file|truncat|not all references|bytestream"
    r"|exceed.* (?:packet|data)|cabac_max_bin|invalid (?:data|slice|start|block|as first byte)|slice mismatch",
    re.IGNORECASE,
)
# Messages about frames that need earlier frames or headers, as at the start of a cut recording.
_NEEDS_EARLIER = re.compile(r"\bref|missing picture|non-existing|no frame|mmco|recovery|keyframe", re.IGNORECASE)
_MOST_MARKS = 1000


@dataclass
class Damage:
    """The damage in a part of a video.

    Attributes:
        marks: the first thousand places: time in ticks (None: unknown), and FFmpeg's message.
        count: of all places.
        passed_over: the first message that is not counted, because it concerns the start of a cut recording.
        has_whole_picture: whether an undamaged frame was decoded.
        suspect_count: packets that the container calls incomplete and that the decoder does not complain about.
        end: the problem that ended decoding early.
    """

    marks: list[tuple[int | None, str]] = field(default_factory=list)
    count: int = 0
    passed_over: str | None = None
    has_whole_picture: bool = False
    suspect_count: int = 0
    end: VideoProblem | None = None

    def note(self, ticks: int | None, detail: str) -> None:
        """Adds a place."""
        self.count += 1
        if len(self.marks) < _MOST_MARKS:
            self.marks.append((ticks, detail))

    def before(self, end_ticks: int | None) -> list[str]:
        """Messages of the places before end_ticks."""
        return [detail for ticks, detail in self.marks if end_ticks is None or ticks is None or ticks < end_ticks]

    @property
    def first_detail(self) -> str | None:
        """The first message, for a video without a whole frame."""
        return self.marks[0][1] if self.marks else self.passed_over


def damage_message(lines: Iterable[tuple]) -> str | None:
    """The first of FFmpeg's error lines that reports damage."""
    return next((text.strip() for _, _, text in lines if _DAMAGE.search(text)), None)


class DamageWatch:
    """Checks packets and frames while they are decoded, and notes their damage.

    A recording may begin in the middle of a group of pictures. So nothing is noted before its first keyframe, and no
    missing references before its first whole frame. A damaged first keyframe is noted.

    Args:
        damage: to be filled.
        start_ticks: damage before this time is not noted. Frames before it may lack their references after a seek.
        is_transport: whether this is MPEG-TS. There FFmpeg calls a packet incomplete after any jump of its counter,
            also where recordings were joined. Such packets are only counted.
    """

    def __init__(self, damage: Damage, start_ticks: int | None, is_transport: bool):
        self._damage = damage
        self._start_ticks = start_ticks
        self._is_transport = is_transport
        self._has_begun = start_ticks is not None  # a seek lands on a keyframe
        self._begins_ticks: int | None = None
        self._troubled: set[int | None] = set()  # times of damaged packets before the first whole frame

    def packet(self, packet: av.Packet | None, ticks: int | None, trouble: str | None) -> None:
        """Checks a packet that was decoded.

        Args:
            packet: None at the end.
            ticks: when its frame is shown, if known.
            trouble: the decoder's message of damage, if any.
        """
        if packet is not None and packet.is_discard:
            return
        if packet is not None and packet.is_keyframe and not self._has_begun:
            self._has_begun, self._begins_ticks = True, ticks
        if trouble is None and packet is not None and packet.is_corrupt:
            if self._is_transport:
                self._damage.suspect_count += not _before(ticks, self._start_ticks)
            else:
                trouble = "a packet is incomplete"
        if trouble is None:
            return
        if not self._damage.has_whole_picture:
            self._troubled.add(ticks)
        self._note(ticks, trouble, may_lack_references=bool(_NEEDS_EARLIER.search(trouble)))

    def frame(self, pts: int | None, ticks: int, is_corrupt: bool) -> None:
        """Checks a decoded frame.

        Args:
            pts: the time that its packet states.
            ticks: when it is shown.
            is_corrupt: whether the decoder marked it as corrupt.
        """
        if is_corrupt:
            self._note(ticks, "a frame is damaged", may_lack_references=True)
        elif not self._damage.has_whole_picture and pts not in self._troubled:
            self._damage.has_whole_picture = True
            self._troubled.clear()

    def _note(self, ticks: int | None, detail: str, may_lack_references: bool) -> None:
        if _before(ticks, self._start_ticks):
            return
        is_cut_start = may_lack_references and not self._damage.has_whole_picture
        if self._has_begun and not _before(ticks, self._begins_ticks) and not is_cut_start:
            self._damage.note(ticks, detail)
        else:
            self._damage.passed_over = self._damage.passed_over or detail


def _before(ticks: int | None, other: int | None) -> bool:
    return ticks is not None and other is not None and ticks < other
