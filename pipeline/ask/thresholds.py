"""thresholds: the scores from which on something counts as found.

For texts the model's own, where its card states one. Else the archive says: whatever it shows, most of some hundred
texts about all kinds of things describe nothing in it, and what they score at best is what a text scores by chance. The
floor lies so far above the middle of those scores that of texts about nothing in the archive one in a hundred passes;
median and median deviation, so that the few that do describe something count little. For pictures it is the cosine that
one in a hundred pairs of frames of different videos reaches.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from storage.archive.archive import Archive
from storage.checked import Wrong, finite, member, text, whole
from storage.errors import UsageError
from storage.files import join
from storage.parts.read import part_keys
from storage.vectors.contents import FLOORS, Damaged, read_json, write_json
from storage.vectors.vector_index import Index, open_index
from workers.models.bundle import Bundle
from workers.vision.clip_text import TextEncoder

TEXT_FLOOR = 0.15  # where nothing can be measured: CLIP's texts reach 0.2 to 0.3 with the pictures that they describe
PICTURE_FLOOR = 0.75
DEVIATIONS = 2.33 * 1.4826  # one in a hundred of a normal distribution, in median deviations
PAIR_QUANTILE = 0.99
PICTURES = 256  # frames that are compared with one another
LEAST_VIDEOS = 20
GROWTH = 1.25  # times as many frames, and the floors are worked out anew


@dataclass(frozen=True)
class Floor:
    """A score, and where it comes from, for people."""

    score: float
    source: str


class Floors:
    """The floors of an archive: as they were kept with it, else worked out."""

    def __init__(self, archive: Archive, bundle: Bundle, index: Index):
        self._archive = archive
        self._bundle = bundle
        self._index = index

    @cached_property
    def text(self) -> Floor:
        """For the cosine of a text and a frame."""
        if self._bundle.card.search_floor is not None:
            return Floor(self._bundle.card.search_floor, "stated by the model")
        return _kept(self._archive, "text") or text_floor(self._bundle, self._index)

    @cached_property
    def picture(self) -> Floor:
        """For the cosine of two pictures."""
        return _kept(self._archive, "picture") or picture_floor(self._archive)


def update_floors(archive: Archive, bundle: Bundle) -> None:
    """Works the floors out, and keeps them with the archive, where it has grown or shrunk since that was done last.

    Raises:
        ArchiveError: a part is missing or damaged, or the archive cannot be written.
    """
    frames, (counted, _) = archive.videos.frame_count(), _content(archive)
    if not frames or counted / GROWTH < frames < counted * GROWTH:
        return
    content = {"model_id": archive.model_id, "frames": frames, "picture": asdict(picture_floor(archive))}
    if bundle.card.search_floor is None and bundle.has_text_search:
        try:
            content["text"] = asdict(text_floor(bundle, open_index(archive)))
        except UsageError:
            return  # a text tower that cannot be used: who searches by text is told
    write_json(join(archive.index_uri, FLOORS), content)


def text_floor(bundle: Bundle, index: Index) -> Floor:
    """What texts about nothing in particular do not reach."""
    encoder = TextEncoder(bundle)
    texts = files("pipeline.ask").joinpath("unrelated_texts.txt").read_text(encoding="utf-8").splitlines()
    best = [hit.score for text in texts for hit in index.search(encoder.embed(text), 1)]
    if not best:
        return Floor(TEXT_FLOOR, "CLIP's in general, as the archive holds nothing")
    middle = float(np.median(best))
    spread = float(np.median(np.abs(np.array(best) - middle)))
    return Floor(round(middle + DEVIATIONS * spread, 4), f"the best scores here of {len(texts)} unrelated texts")


def picture_floor(archive: Archive) -> Floor:
    """What frames of different videos do not reach."""
    first: dict[int, str] = {}
    for part in archive.frames.parts():
        first.setdefault(part.video_number, part.path)
    random = np.random.default_rng(len(first))
    chosen = sorted(random.choice(sorted(first), min(PICTURES, len(first)), replace=False).tolist()) if first else []
    found = [part_keys(archive.frames_uri, first[number], np.zeros(1, np.int64)) for number in chosen]
    keys = [stored[0].astype(np.float32) for stored in found if stored is not None]
    if len(keys) < LEAST_VIDEOS:
        return Floor(PICTURE_FLOOR, f"CLIP's in general, as the archive has fewer than {LEAST_VIDEOS} videos")
    products = np.stack(keys) @ np.stack(keys).T
    score = round(float(np.quantile(products[np.triu_indices(len(keys), 1)], PAIR_QUANTILE)), 4)
    return Floor(score, f"the cosines of frames of {len(keys)} different videos")


def _kept(archive: Archive, kind: str) -> Floor | None:
    """What is kept with the archive for "text" or "picture"."""
    return _content(archive)[1].get(kind)


def _content(archive: Archive) -> tuple[int, dict[str, Floor]]:
    """What is kept with the archive: of how many frames, and the floors by kind.

    Nothing where it is damaged or another model's, so that it is worked out anew.
    """
    try:
        content = read_json(join(archive.index_uri, FLOORS))
        if member(content, "model_id") != archive.model_id:
            return 0, {}
        kinds = [kind for kind in ("text", "picture") if kind in content]
        return whole("frames", member(content, "frames")), {kind: _floor(content[kind]) for kind in kinds}
    except (Damaged, Wrong):
        return 0, {}


def _floor(values: Any) -> Floor:
    return Floor(finite("score", member(values, "score"), -1, 1), text("source", member(values, "source")))
