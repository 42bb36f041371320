"""contact sheet: a page with the thumbnails of moments, HTML or PNG; needs no video."""

import base64
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.results.output import write_output
from pipeline.text import printable
from pipeline.times import clock
from storage.archive.archive import Archive
from storage.errors import DamagedError, UsageError
from storage.files import source_text
from storage.parts.read import read_thumbnails
from storage.records import FrameRef, Moment

SUFFIXES = (".html", ".png")
_CARD_CELLS = 30  # width of a card in a terminal
_LARGEST = 1024  # pixels; no thumbnail is wider or higher
_COLUMNS, _LINES = 5, 2  # cards in a row of the PNG, lines of text on a card
_SIDE, _GAP, _FONT_SIZE = 240, 12, 15  # pixels


@dataclass(frozen=True)
class _Card:
    """The texts and the thumbnail of a moment; the thumbnail is a JPEG file, or empty if none is stored."""

    start: str
    end: str
    best: str
    score: str
    name: str
    source: str
    thumbnail: bytes

    @property
    def picture(self) -> str:
        """The thumbnail in Base64."""
        return base64.b64encode(self.thumbnail).decode()


def write_contact_sheet(path: str, title: str, archive: Archive, moments: Sequence[Moment]) -> None:
    """Writes a page with one card per moment, which shows its best frame.

    Raises:
        UsageError: the file cannot be written.
        ArchiveError: a part is missing or damaged.
    """
    cards = _cards(archive, moments)
    if Path(path).suffix.lower() == ".html":
        template = (files("pipeline.results") / "contact_sheet.html").read_text(encoding="utf-8")
        page = Environment(autoescape=True).from_string(template).render(title=printable(title), cards=cards)
        data = page.encode()
    else:
        file = io.BytesIO()
        _sheet(cards, _COLUMNS).save(file, "PNG")
        data = file.getvalue()
    write_output(path, data)


def check_show() -> None:
    """Checks that pictures can be shown.

    Raises:
        UsageError: standard output is not a terminal, or the library is missing.
    """
    if not sys.stdout.isatty():
        raise UsageError("--show: standard output is not a terminal; use --contact-sheet FILE")
    if not os.get_terminal_size(sys.stdout.fileno()).columns:
        raise UsageError("--show: the size of this terminal is unknown; use --contact-sheet FILE")
    if find_spec("textual_image") is None:
        raise UsageError("--show needs textual-image; install it with pip install 'vidx[show]'")


def show_moments(archive: Archive, moments: Sequence[Moment]) -> None:
    """Draws thumbnails in the terminal: with its protocol for pictures, or else with half blocks."""
    from rich.console import Console
    from textual_image.renderable import Image as Shown  # asks the terminal what it can do

    console = Console()
    columns = max(1, min(_COLUMNS, console.width // _CARD_CELLS))
    console.print(Shown(_sheet(_cards(archive, moments), columns), width=min(console.width, columns * _CARD_CELLS)))


def _cards(archive: Archive, moments: Sequence[Moment]) -> list[_Card]:
    best = [_best_frame(archive, moment) for moment in moments]
    thumbnails = read_thumbnails(archive.frames_uri, best)
    return [
        _Card(
            start=clock(moment.start_seconds),
            end=clock(moment.end_seconds),
            best=clock(moment.best_seconds),
            score="" if moment.score is None else f"{moment.score:.3f}",
            name=printable(source_text(moment.uri).rsplit("/", 1)[-1]),
            source=printable(source_text(moment.uri)),
            thumbnail=thumbnail,
        )
        for moment, thumbnail in zip(moments, thumbnails, strict=True)
    ]


def _best_frame(archive: Archive, moment: Moment) -> FrameRef:
    shown = archive.frames.at(moment.video_number, moment.best_seconds)
    if shown is None:
        raise UsageError(f"{source_text(moment.uri)}: this video was just taken out of the archive; search again")
    return shown


def _sheet(cards: Sequence[_Card], most_columns: int) -> Image.Image:
    """The cards in a grid; there is no title, because the built-in font has few scripts."""
    font = ImageFont.load_default(_FONT_SIZE)
    columns = min(most_columns, max(1, len(cards)))
    rows = -(-len(cards) // columns)
    width, height = _SIDE + _GAP, _SIDE * 9 // 16 + _LINES * (_FONT_SIZE + 4) + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, max(1, rows) * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for place, card in enumerate(cards):
        left, top = _GAP + place % columns * width, _GAP + place // columns * height
        size = (_SIDE, _SIDE * 9 // 16)
        none = Image.new("RGB", size, "lightgray")
        picture = ImageOps.contain(_picture(card), size) if card.thumbnail else none
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top))
        below = top + _SIDE * 9 // 16 + 3
        for line in (f"{card.start} - {card.end}   {card.score}", card.name):
            draw.text((left, below), _fitting(draw, line, font), fill="black", font=font)
            below += _FONT_SIZE + 4
    return sheet


def _picture(card: _Card) -> Image.Image:
    """The thumbnail, decoded; it may come from a stranger.

    Raises:
        ArchiveError: it is not a small JPEG.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of large pictures
            picture = Image.open(io.BytesIO(card.thumbnail), formats=("JPEG",))
        if max(picture.size) > _LARGEST:
            raise ValueError(f"{picture.width} x {picture.height} pixels")
        picture.load()
        return picture
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DamagedError(f"{card.source}: damaged: its thumbnail at {card.best} is not a small JPEG") from error


def _fitting(draw: ImageDraw.ImageDraw, line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while draw.textlength(line, font) > _SIDE:
        line = f"{line[:-4]}..."
    return line
