"""Scripts of nano's videos: shots with a background, and pictograms that come, stay, drift and leave.

A script says for every instant what can be seen, so that what the questions are answered from needs no look at pixels.
Coordinates are fractions of the frame's width and height, times are seconds. Everything follows from the generator.
"""

from colorsys import hsv_to_rgb
from dataclasses import dataclass, field

import numpy as np

from ops.nano.pictograms import THINGS, stands_out

# hue in degrees, saturation, value: the ranges that a background's colour is drawn from
PALETTE = {
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.1)),
    "blue": ((208, 236), (0.65, 1.0), (0.5, 0.95)),
    "brown": ((18, 30), (0.6, 0.8), (0.3, 0.45)),
    "gray": ((0, 360), (0.0, 0.06), (0.4, 0.62)),
    "green": ((95, 145), (0.5, 1.0), (0.4, 0.85)),
    "orange": ((24, 34), (0.8, 1.0), (0.88, 1.0)),
    "pink": ((322, 345), (0.28, 0.5), (0.92, 1.0)),
    "purple": ((268, 290), (0.5, 0.9), (0.4, 0.75)),
    "red": ((-8, 8), (0.8, 1.0), (0.6, 0.95)),
    "white": ((0, 360), (0.0, 0.04), (0.93, 1.0)),
    "yellow": ((50, 60), (0.65, 1.0), (0.92, 1.0)),
}
COLOURS = tuple(PALETTE)
OUTSIDE = -1  # the background of a shot that shows nothing of this world
STYLES = ("plain", "gradient", "stripes", "checks", "dots", "clouds")
SIZES = (0.23, 0.36)  # a pictogram's side, as a fraction of the square root of the frame's area
MOST_THINGS = 4  # in sight at once
MOST_ALIKE = 3
CLEAR = 0.6  # a fading picture shows its things from this brightness on
SHAPES = ((192, 192), (224, 224), (256, 256), (256, 192), (320, 240), (192, 256), (256, 144), (320, 180))


@dataclass(frozen=True)
class Stay:
    """One pictogram from coming in to being gone.

    Attributes:
        thing: its number.
        width, height: of the frame's.
        x, y: its centre when it has come in.
        drift: how far the centre moves until it begins to leave, (dx, dy).
        enters, settled, leaves, gone: begins to come in, is whole from, is whole until, is out of sight from.
        entry, departure: "cut", "fade" or "slide".
        edge: the side a slide comes from and goes to: (-1, 0) left, (1, 0) right, (0, -1) top, (0, 1) bottom.
    """

    thing: int
    width: float
    height: float
    x: float
    y: float
    drift: tuple[float, float]
    enters: float
    settled: float
    leaves: float
    gone: float
    entry: str
    departure: str
    edge: tuple[int, int]

    def place(self, time: float) -> tuple[float, float, float]:
        """Centre and opacity at an instant between `enters` and `gone`."""
        progress = np.clip((time - self.settled) / max(self.leaves - self.settled, 1e-6), 0, 1)
        x, y = self.x + self.drift[0] * progress, self.y + self.drift[1] * progress
        away, how = 0.0, ""
        if time < self.settled:
            away, how = (self.settled - time) / (self.settled - self.enters), self.entry
        elif time > self.leaves:
            away, how = (time - self.leaves) / (self.gone - self.leaves), self.departure
        if how == "fade":
            return x, y, 1 - away
        if how == "slide":
            out_x = (1 + self.width / 2 - x) if self.edge[0] > 0 else -(x + self.width / 2)
            out_y = (1 + self.height / 2 - y) if self.edge[1] > 0 else -(y + self.height / 2)
            return x + abs(self.edge[0]) * out_x * away, y + abs(self.edge[1]) * out_y * away, 1.0
        return x, y, 1.0

    def swept(self) -> tuple[float, float, float, float]:
        """The box that it covers while it is whole: left, top, right, bottom."""
        left, right = sorted((self.x, self.x + self.drift[0]))
        top, bottom = sorted((self.y, self.y + self.drift[1]))
        return left - self.width / 2, top - self.height / 2, right + self.width / 2, bottom + self.height / 2


@dataclass(frozen=True)
class Shot:
    """A stretch with one background.

    Attributes:
        background: index into COLOURS, or OUTSIDE.
        style: of STYLES, or the kind of an outside picture.
        picture_seed: what the background's details follow from.
        fade_in, fade_out: seconds from and to black.
    """

    start: float
    end: float
    background: int
    style: str
    picture_seed: int
    fade_in: float
    fade_out: float
    stays: tuple[Stay, ...]

    def brightness(self, time: float) -> float:
        """1 but during a fade."""
        rising = (time - self.start) / self.fade_in if self.fade_in else 1.0
        falling = (self.end - time) / self.fade_out if self.fade_out else 1.0
        return float(np.clip(min(rising, falling), 0, 1))


@dataclass(frozen=True)
class Script:
    """A whole video.

    Attributes:
        rate: frames per second.
        noise: standard deviation of the camera's noise, in levels of 255.
    """

    width: int
    height: int
    rate: float
    noise: float
    shots: tuple[Shot, ...]

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.shots[-1].end

    def shot_at(self, time: float) -> Shot:
        """The shot that an instant belongs to."""
        return next((shot for shot in self.shots if time < shot.end), self.shots[-1])


@dataclass(frozen=True)
class Sight:
    """What can be seen at one instant.

    Attributes:
        background: index into COLOURS, OUTSIDE, or None during a fade.
        things: numbers of the pictograms that are whole, in no order.
        boxes: (len(things), 4): centre x, centre y, width, height.
        partial: numbers of those that are coming or going.
    """

    background: int | None
    things: tuple[int, ...]
    boxes: np.ndarray = field(repr=False, compare=False)
    partial: frozenset[int]


def sight(script: Script, time: float) -> Sight:
    """The truth about an instant."""
    shot = script.shot_at(time)
    fading = shot.brightness(time) < CLEAR
    things, boxes, partial = [], [], set()
    for stay in shot.stays:
        if not stay.enters <= time < stay.gone:
            continue
        if fading or not stay.settled <= time <= stay.leaves:
            partial.add(stay.thing)
            continue
        x, y, _ = stay.place(time)
        things.append(stay.thing)
        boxes.append((x, y, stay.width, stay.height))
    background = None if fading else shot.background
    return Sight(background, tuple(things), np.array(boxes).reshape(-1, 4), frozenset(partial))


def draw_colour(source: np.random.Generator, background: int) -> tuple[float, float, float]:
    """A shade of a background's colour: red, green, blue in 0..255."""
    return _levels(*(float(source.uniform(*bounds)) for bounds in PALETTE[COLOURS[background]]))


def _levels(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    red, green, blue = hsv_to_rgb(hue / 360 % 1, saturation, value)
    return red * 255, green * 255, blue * 255


# --- making scripts


def write_script(source: np.random.Generator, seconds: float) -> Script:
    """A video as people would index one: shots of all kinds, one after another."""
    width, height = SHAPES[source.integers(len(SHAPES))]
    rate = float(source.choice([8, 10, 12.5, 15, 24, 25]))
    noise = float(source.choice([0, 1.5, 3, 5, 8]))
    shots, time = [], 0.0
    while seconds - time > 0.5:
        kind = source.choice(["busy", "still", "empty", "long"], p=[0.68, 0.2, 0.08, 0.04])
        length = {"busy": (12, 40), "still": (4, 12), "empty": (2, 6), "long": (60, 180)}[kind]
        end = min(seconds, time + float(source.uniform(*length)))
        if seconds - end < 4:
            end = seconds
        shots.append(_shot(source, kind, time, end, width / height))
        time = end
    return Script(width, height, rate, noise, tuple(shots))


def write_slides(source: np.random.Generator, count: int, outside: list[str], outside_share: float) -> Script:
    """A video of one frame a second in which every frame is another still shot, for training on single pictures.

    Args:
        outside: kinds of pictures from outside the world.
        outside_share: how many of the frames show such.
    """
    width, height = SHAPES[source.integers(len(SHAPES))]
    shots = []
    for number in range(count):
        if source.random() < outside_share:
            seed = int(source.integers(1 << 31))
            shots.append(Shot(number, number + 1, OUTSIDE, str(source.choice(outside)), seed, 0, 0, ()))
        else:
            shots.append(_shot(source, "slide", number, number + 1, width / height))
    return Script(width, height, 1.0, float(source.choice([0, 1.5, 3, 5, 8])), tuple(shots))


def _shot(source: np.random.Generator, kind: str, start: float, end: float, aspect: float) -> Shot:
    background = int(source.integers(len(COLOURS)))
    style = str(source.choice(STYLES, p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1]))
    fade_in, fade_out = (float(source.choice([0, 0.5], p=[0.75, 0.25])) for _ in range(2))
    if kind == "slide":
        fade_in = fade_out = 0.0
    stays: list[Stay] = []
    if kind == "busy":
        _come_and_go(source, stays, background, start, end, aspect)
    elif kind != "empty":
        counts = [0.06, 0.2, 0.24, 0.25, 0.25]
        wanted = int(source.choice(len(counts), p=counts)) if kind == "slide" else int(source.integers(1, 5))
        _add_group(source, stays, background, wanted, aspect, (start, start, end, end), "cut", kind != "slide")
    return Shot(start, end, background, style, int(source.integers(1 << 31)), fade_in, fade_out, tuple(stays))


def _come_and_go(
    source: np.random.Generator, stays: list[Stay], background: int, start: float, end: float, aspect: float
) -> None:
    """Fills a shot with arrivals; how long each stays is drawn so that up to four are in sight at once."""
    time = start
    if source.random() < 0.6:
        length = source.uniform(3, 14)
        _add_group(
            source,
            stays,
            background,
            int(source.integers(1, 3)),
            aspect,
            _times(source, start, length, end, 0.0),
            "cut",
            True,
        )
    time += float(source.uniform(1.2, 3.5))
    while time < end - 2.5:
        length = float(source.uniform(2.2, 14))
        takes = float(source.choice([0.0, 0.3, 0.5]))
        entry = "cut" if takes == 0 else str(source.choice(["fade", "slide"]))
        _add_group(source, stays, background, 1, aspect, _times(source, time, length, end, takes), entry, True)
        time += float(source.uniform(1.3, 4.0))


def _times(source: np.random.Generator, enters: float, length: float, end: float, takes: float) -> tuple[float, ...]:
    """enters, settled, leaves, gone; what would leave just before the shot's end stays until it."""
    settled = enters + takes
    leaves = settled + length
    if leaves + 1.0 >= end:
        return enters, settled, end, end
    return enters, settled, leaves, leaves + float(source.choice([0.0, 0.3, 0.5]))


def _add_group(
    source: np.random.Generator,
    stays: list[Stay],
    background: int,
    wanted: int,
    aspect: float,
    times: tuple[float, ...],
    entry: str,
    moves: bool,
) -> None:
    """Adds up to `wanted` pictograms where there is room, now and then several of one thing."""
    enters, _, leaves, gone = times
    beside = [stay for stay in stays if stay.enters < gone and enters < stay.gone]
    room = MOST_THINGS - len(beside)
    taken = {stay.thing for stay in beside}
    while wanted > 0 and room > 0:
        thing = int(source.integers(len(THINGS)))
        if thing in taken or not stands_out(thing, _middle(background)):
            continue
        taken.add(thing)
        copies = int(source.choice([1, 2, 3], p=[0.82, 0.12, 0.06])) if room > 1 else 1
        copies = min(copies, room, wanted if wanted > 1 else MOST_ALIKE)
        departure = "cut" if gone == leaves else str(source.choice(["fade", "slide"]))
        for _ in range(copies):
            drift = _drift(source) if moves and source.random() < 0.4 else (0.0, 0.0)
            stay = _find_room(source, beside, thing, aspect, times, entry, departure, drift)
            if stay is None:
                break
            stays.append(stay)
            beside.append(stay)
            room -= 1
        wanted -= copies


def _middle(background: int) -> tuple[float, float, float]:
    return _levels(*(sum(bounds) / 2 for bounds in PALETTE[COLOURS[background]]))


def _drift(source: np.random.Generator) -> tuple[float, float]:
    angle, length = source.uniform(0, 2 * np.pi), source.uniform(0.03, 0.15)
    return float(length * np.cos(angle)), float(length * np.sin(angle))


def _find_room(
    source: np.random.Generator,
    beside: list[Stay],
    thing: int,
    aspect: float,
    times: tuple[float, ...],
    entry: str,
    departure: str,
    drift: tuple[float, float],
) -> Stay | None:
    """A place where it overlaps nothing, in 60 tries."""
    size = float(source.uniform(*SIZES))
    width, height = size * aspect**-0.5, size * aspect**0.5
    edges = ((-1, 0), (1, 0), (0, -1), (0, 1))
    for _ in range(60):
        x = float(source.uniform(width / 2 + max(0, -drift[0]), 1 - width / 2 - max(0, drift[0])))
        y = float(source.uniform(height / 2 + max(0, -drift[1]), 1 - height / 2 - max(0, drift[1])))
        edge = edges[source.integers(4)]
        stay = Stay(thing, width, height, x, y, drift, *times, entry, departure, edge)
        left, top, right, bottom = stay.swept()
        boxes = [other.swept() for other in beside]
        if all(right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top for box in boxes):
            return stay
    return None
