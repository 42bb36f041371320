"""From a script to pixels."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ops.nano.pictograms import sprite
from ops.nano.scenes import OUTSIDE, Script, draw_colour

# Photographs that Debian's packages carry, shown only in training, as what nano does not know.
PHOTOS = ("/usr/share/backgrounds/mate/nature", "/usr/share/doc/opencv-doc")
OUTSIDE_KINDS = ("leaves", "clouds", "shapes", "lines")
_NOISE_SIDE = 512


def frame(script: Script, time: float, noise: np.random.Generator | None) -> np.ndarray:
    """One picture, (height, width, 3) uint8.

    Args:
        noise: where the camera's noise is taken from; None for none.
    """
    shot = script.shot_at(time)
    pixels = _background(shot.background, shot.style, shot.picture_seed, script.width, script.height).copy()
    for stay in shot.stays:
        if stay.enters <= time < stay.gone:
            x, y, opacity = stay.place(time)
            _paste(pixels, stay.thing, x, y, stay.width, stay.height, opacity)
    brightness = shot.brightness(time)
    if brightness < 1:
        pixels *= brightness
    if noise is not None and script.noise:
        top, left = noise.integers(_NOISE_SIDE - script.height), noise.integers(_NOISE_SIDE - script.width)
        pixels += _noise()[top : top + script.height, left : left + script.width] * np.float32(script.noise)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _paste(pixels: np.ndarray, thing: int, x: float, y: float, width: float, height: float, opacity: float) -> None:
    rows, columns = pixels.shape[:2]
    across, down = max(1, round(width * columns)), max(1, round(height * rows))
    left, top = round(x * columns - across / 2), round(y * rows - down / 2)
    first_column, last_column = max(0, left), min(columns, left + across)
    first_row, last_row = max(0, top), min(rows, top + down)
    if first_column >= last_column or first_row >= last_row:
        return
    colours, alpha = sprite(thing, across, down)
    part = np.s_[first_row - top : last_row - top, first_column - left : last_column - left]
    under = pixels[first_row:last_row, first_column:last_column]
    under *= 1 - alpha[part] * np.float32(opacity)
    under += colours[part] * np.float32(opacity)


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3), np.float32)


@lru_cache(maxsize=4)
def _background(background: int, style: str, seed: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) float32."""
    source = np.random.default_rng(seed)
    if background == OUTSIDE:
        return outside_picture(source, style, width, height)
    first = np.array(draw_colour(source, background), np.float32)
    if style == "plain":
        return np.broadcast_to(first, (height, width, 3)).copy()
    second = np.array(draw_colour(source, background), np.float32)
    if style != "gradient":  # a pattern in two shades: at least so far apart that it can be seen
        second = np.clip(first * source.uniform(0.8, 0.92), 0, 255) if first.max() > 40 else first + 18
    mix = _pattern(source, style, width, height)[..., None]
    return (first * (1 - mix) + second * mix).astype(np.float32)


def _pattern(source: np.random.Generator, style: str, width: int, height: int) -> np.ndarray:
    """How much of the second shade each pixel has: (height, width) in 0..1."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = source.uniform(0, 2 * np.pi)
    along = columns * np.cos(angle) + rows * np.sin(angle)
    period = source.uniform(0.06, 0.25) * (width * height) ** 0.5
    if style == "gradient":
        return (along - along.min()) / (along.max() - along.min())
    if style == "stripes":
        return (along % period < period / 2).astype(np.float32)
    if style == "checks":
        return ((columns // (period / 2) + rows // (period / 2)) % 2).astype(np.float32)
    if style == "dots":
        return (((columns % period - period / 2) ** 2 + (rows % period - period / 2) ** 2) < (period / 4) ** 2) * 1.0
    return fractal(source, width, height)


def fractal(source: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Clouds: noise whose spectrum falls with the frequency, (height, width) in 0..1."""
    spectrum = np.fft.rfft2(source.standard_normal((height, width)))
    fall = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width)
    values = np.fft.irfft2(spectrum / np.maximum(fall, 1) ** source.uniform(0.9, 1.8), s=(height, width))
    low, high = np.percentile(values, [1, 99])
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


# --- what is not of this world


def outside_kinds() -> list[str]:
    """Kinds of pictures from outside the world; photographs only where their packages are installed."""
    return [*OUTSIDE_KINDS, *["photo"] * (2 * len(OUTSIDE_KINDS) if _photos() else 0)]


def outside_picture(source: np.random.Generator, kind: str, width: int, height: int) -> np.ndarray:
    """A picture that shows nothing of the world: (height, width, 3) float32."""
    if kind == "photo":
        return _photo(source, width, height)
    if kind == "clouds":
        layers = [fractal(source, width, height) for _ in range(3)]
        colours = source.uniform(0, 255, (4, 3))
        picture = np.broadcast_to(colours[0], (height, width, 3))
        for layer, colour in zip(layers, colours[1:], strict=True):
            picture = picture * (1 - layer[..., None]) + colour * layer[..., None]
        return picture.astype(np.float32)
    return _drawn(source, kind, width, height)


def _drawn(source: np.random.Generator, kind: str, width: int, height: int) -> np.ndarray:
    """Drawn: shapes of all sizes as in natural pictures ("leaves"), few big ones ("shapes"), a screen ("lines")."""
    base = tuple(int(value) for value in source.uniform(0, 255, 3))
    picture = Image.new("RGB", (width, height), base)
    draw = ImageDraw.Draw(picture)
    side = (width * height) ** 0.5
    tint = source.uniform(0, 255, 3)
    spread = source.uniform(20, 110)
    for _ in range({"leaves": int(source.integers(60, 400)), "shapes": int(source.integers(3, 14)), "lines": 40}[kind]):
        size = side * (source.uniform(0.02, 0.4) if kind != "leaves" else 0.02 * source.uniform(0.002, 1) ** -0.5)
        x, y = source.uniform(-0.1, 1.1) * width, source.uniform(-0.1, 1.1) * height
        colour = tuple(int(value) for value in np.clip(source.normal(tint, spread), 0, 255))
        tall = size * source.uniform(0.3, 1.5)
        box = (x - size / 2, y - tall / 2, x + size / 2, y + tall / 2)
        if kind == "lines":
            end = (x + source.uniform(-1, 1) * size * 2, y) if source.random() < 0.7 else (x, y + size)
            draw.line([(x, y), end], fill=colour, width=int(source.integers(1, 4)))
            if source.random() < 0.25:
                draw.rectangle(box, fill=colour)
        elif source.random() < 0.5:
            draw.ellipse(box, fill=colour)
        else:
            corners = [(x + source.uniform(-0.7, 0.7) * size, y + source.uniform(-0.7, 0.7) * tall) for _ in range(4)]
            draw.polygon(corners, fill=colour)
    pixels = np.asarray(picture, np.float32)
    if source.random() < 0.5:
        pixels = pixels * (0.6 + 0.4 * fractal(source, width, height)[..., None])
    return pixels


def _photo(source: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A part of a photograph; a part with nothing in it would be an empty scene, so another one is taken."""
    photos = _photos()
    while True:
        picture = _open_photo(photos[source.integers(len(photos))])
        share = source.uniform(0.3, 1.0)
        across = picture.width * share
        down = min(picture.height, across * height / width * source.uniform(0.8, 1.25))
        left, top = source.uniform(0, picture.width - across), source.uniform(0, picture.height - down)
        part = picture.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
        pixels = np.asarray(part, np.float32)
        if pixels.std(axis=(0, 1)).max() > 25:
            break
    if source.random() < 0.5:
        pixels = pixels[:, ::-1]
    contrast, shift = source.uniform(0.6, 1.2), source.uniform(-40, 40, 3)
    return np.clip((pixels - 128) * contrast + 128 + shift, 0, 255).astype(np.float32)


@lru_cache(maxsize=1)
def _photos() -> tuple[Path, ...]:
    return tuple(sorted(path for folder in PHOTOS for path in Path(folder).rglob("*.jp*g")))


@lru_cache(maxsize=256)
def _open_photo(path: Path) -> Image.Image:
    picture = Image.open(path)
    picture.draft("RGB", (900, 900))
    picture = picture.convert("RGB")
    picture.thumbnail((900, 900))
    return picture
