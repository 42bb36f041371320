"""The things of nano's world: words, their plurals, and the pictograms that show them.

The pictures come from Noto Color Emoji (SIL Open Font License 1.1; Debian's fonts-noto-color-emoji). The font is needed
to render and to train, never to use the model, and is not part of the repository.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path(os.environ.get("VIDX_EMOJI_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
STRIKE = 109  # the font's one bitmap size

_CODEPOINTS = """
anchor 2693, apple 1F34E, ball 26BD, balloon 1F388, banana 1F34C, bear 1F43B, bee 1F41D, bell 1F514, bicycle 1F6B2,
book 1F4D6, bottle 1F37E, burger 1F354, bus 1F68C, butterfly 1F98B, cactus 1F335, cake 1F382, camera 1F4F7,
candle 1F56F, car 1F697, carrot 1F955, castle 1F3F0, cat 1F408, chair 1FA91, clock 23F0, cloud 2601, computer 1F4BB,
cow 1F404, crab 1F980, crown 1F451, cup 2615, dog 1F415, donut 1F369, door 1F6AA, dress 1F457, drum 1F941, duck 1F986,
elephant 1F418, fire 1F525, fish 1F41F, flower 1F33B, frog 1F438, ghost 1F47B, gift 1F381, guitar 1F3B8, hammer 1F528,
hat 1F3A9, heart 2764, helicopter 1F681, horse 1F40E, house 1F3E0, key 1F511, ladder 1FA9C, lamp 1F4A1, leaf 1F341,
lemon 1F34B, lion 1F981, lock 1F512, moon 1F319, mushroom 1F344, octopus 1F419, owl 1F989, pear 1F350, pencil 270F,
penguin 1F427, phone 1F4F1, piano 1F3B9, pig 1F416, pineapple 1F34D, pizza 1F355, plane 2708, rabbit 1F407,
rainbow 1F308, robot 1F916, rocket 1F680, rooster 1F413, sheep 1F411, ship 1F6A2, shirt 1F455, shoe 1F45F,
skull 1F480, snail 1F40C, snake 1F40D, snowman 26C4, spider 1F577, star 2B50, strawberry 1F353, sun 2600,
television 1F4FA, tent 26FA, tractor 1F69C, train 1F682, tree 1F333, truck 1F69A, trumpet 1F3BA, turtle 1F422,
umbrella 2614, unicorn 1F984, volcano 1F30B, watermelon 1F349, whale 1F433
"""
_PLURALS = {
    "bus": "buses",
    "butterfly": "butterflies",
    "cactus": "cactuses",
    "dress": "dresses",
    "fish": "fish",
    "leaf": "leaves",
    "octopus": "octopuses",
    "sheep": "sheep",
    "strawberry": "strawberries",
}


@dataclass(frozen=True)
class Thing:
    """A word of the world and its pictogram."""

    word: str
    codepoint: int

    @property
    def plural(self) -> str:
        """As in "two buses"."""
        return _PLURALS.get(self.word, f"{self.word}s")

    @property
    def one(self) -> str:
        """With its article: "an owl"."""
        return with_article(self.word)


def with_article(word: str) -> str:
    """Such as "an owl"."""
    return f"an {word}" if word[0] in "aeiou" and word != "unicorn" else f"a {word}"


def _read_things() -> tuple[Thing, ...]:
    entries = (entry.split() for entry in _CODEPOINTS.replace("\n", " ").split(","))
    return tuple(sorted((Thing(word, int(code, 16)) for word, code in entries), key=lambda thing: thing.word))


THINGS = _read_things()  # in alphabetical order, which is the order of every list in an answer
NUMBER = {thing.word: number for number, thing in enumerate(THINGS)}


def check_font() -> None:
    """Looks for the font.

    Raises:
        FileNotFoundError: it is not installed; the message says how to get it.
    """
    if not FONT.is_file():
        raise FileNotFoundError(
            f"{FONT}: the pictograms' font is missing; install it (Debian: apt install fonts-noto-color-emoji) or set "
            "VIDX_EMOJI_FONT to a NotoColorEmoji.ttf with bitmaps"
        )


@cache
def pictogram(number: int) -> Image.Image:
    """A thing's picture, RGBA, cut to what is drawn and centred on a square."""
    font = _font()
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((12, 12), chr(THINGS[number].codepoint), font=font, embedded_color=True)
    cut = canvas.crop(canvas.getchannel("A").point(lambda value: 255 * (value > 16)).getbbox())
    side = max(cut.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square


@cache
def sprite(number: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """A thing's picture at a size.

    Returns:
        Colours times opacity, (height, width, 3) float32 in 0..255, and opacity, (height, width, 1) in 0..1.
    """
    picture = np.asarray(pictogram(number).convert("RGBa").resize((width, height), Image.Resampling.BOX), np.float32)
    return picture[..., :3], picture[..., 3:] / 255


@cache
def stands_out(number: int, colour: tuple[float, float, float]) -> bool:
    """Whether at least 40 % of a thing can be told from a colour."""
    picture = np.asarray(pictogram(number), np.float32).reshape(-1, 4)
    solid = picture[picture[:, 3] > 128, :3]
    return bool((np.abs(solid - colour).sum(axis=1) > 150).mean() > 0.4)


@cache
def _font() -> ImageFont.FreeTypeFont:
    check_font()
    return ImageFont.truetype(str(FONT), STRIKE)
