"""thresholds: the lowest scores that count as found.

For texts, the model's card may state a threshold. Otherwise it is measured in the archive: about a hundred texts on
unrelated subjects (unrelated_texts.txt) are searched, and their best scores are what a text scores by chance. The
threshold lies above their median, by as many median deviations as one in a hundred of a normal distribution exceeds. A
median is used because a few of the texts may describe something in the archive.

For pictures, the threshold is the cosine that one in a hundred pairs of frames of different videos reaches.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from storage.archive.archive import Archive
from storage.checks import InvalidValue, check_integer, check_number, check_text, get_value
from storage.errors import UsageError
from storage.files import join
from storage.parts.read import part_keys
from storage.vectors.index_manifest import THRESHOLDS, Damaged, read_json, write_json
from storage.vectors.nearest import Index
from storage.vectors.vector_index import open_index
from workers.models.bundle import Bundle
from workers.vision.clip_text import TextEncoder

# Used where nothing can be measured: CLIP's texts reach 0.2 to 0.3 with the pictures that they describe.
TEXT_THRESHOLD = 0.15
PICTURE_THRESHOLD = 0.75
DEVIATIONS = 2.33 * 1.4826  # median deviations that one in a hundred of a normal distribution exceeds
PAIR_QUANTILE = 0.99
PICTURES = 256  # frames that are compared with each other
LEAST_VIDEOS = 20
GROWTH = 1.25  # the thresholds are measured again when the frame count has changed by this factor


@dataclass(frozen=True)
class Threshold:
    """The lowest score of a hit, and where it comes from."""

    score: float
    source: str


class Thresholds:
    """The thresholds of an archive; measured here if they are not stored with it."""

    def __init__(self, archive: Archive, bundle: Bundle, index: Index):
        self._archive = archive
        self._bundle = bundle
        self._index = index

    @cached_property
    def text(self) -> Threshold:
        """The threshold for cosines of texts and frames."""
        if self._bundle.card.search_floor is not None:
            return Threshold(self._bundle.card.search_floor, "stated by the model")
        return _stored(self._archive)[1].get("text") or text_threshold(self._bundle, self._index)

    @cached_property
    def picture(self) -> Threshold:
        """The threshold for cosines of two pictures."""
        return _stored(self._archive)[1].get("picture") or picture_threshold(self._archive)


def update_thresholds(archive: Archive, bundle: Bundle) -> None:
    """Measures the thresholds and stores them with the archive, if it has grown or shrunk enough since the last time.

    Raises:
        ArchiveError: a part is missing or damaged, or the archive cannot be written.
    """
    frames, (counted, _) = archive.videos.frame_count(), _stored(archive)
    if not frames or counted / GROWTH < frames < counted * GROWTH:
        return
    content = {"model_id": archive.model_id, "frames": frames, "picture": asdict(picture_threshold(archive))}
    if bundle.card.search_floor is None and bundle.has_text_search:
        try:
            content["text"] = asdict(text_threshold(bundle, open_index(archive)))
        except UsageError:
            return  # the text tower cannot be used; a search by text says so
    write_json(join(archive.index_uri, THRESHOLDS), content)


def text_threshold(bundle: Bundle, index: Index) -> Threshold:
    """The threshold for texts, measured with unrelated texts."""
    encoder = TextEncoder(bundle)
    texts = files("pipeline.ask").joinpath("unrelated_texts.txt").read_text(encoding="utf-8").splitlines()
    best = [hit.score for text in texts for hit in index.search(encoder.embed(text), 1)]
    if not best:
        return Threshold(TEXT_THRESHOLD, "typical for CLIP: the archive is empty")
    middle = float(np.median(best))
    spread = float(np.median(np.abs(np.array(best) - middle)))
    return Threshold(round(middle + DEVIATIONS * spread, 4), f"measured with {len(texts)} unrelated texts")


def picture_threshold(archive: Archive) -> Threshold:
    """The threshold for pictures, measured with frames of different videos."""
    numbers = archive.videos.published().numbers.tolist()
    random = np.random.default_rng(len(numbers))
    chosen = random.choice(numbers, min(PICTURES, len(numbers)), replace=False).tolist() if numbers else []
    bounds = archive.parts.bounds(chosen)
    places = [bounds.of(number) for number in sorted(chosen)]
    paths = [bounds.path[own[bounds.first_seconds[own].argmin()]] for own in places if len(own)]
    found = [part_keys(archive.frames_uri, path, np.zeros(1, np.int64)) for path in paths]
    keys = [stored[0].astype(np.float32) for stored in found if stored is not None]
    if len(keys) < LEAST_VIDEOS:
        return Threshold(PICTURE_THRESHOLD, f"typical for CLIP: the archive has fewer than {LEAST_VIDEOS} videos")
    products = np.stack(keys) @ np.stack(keys).T
    score = round(float(np.quantile(products[np.triu_indices(len(keys), 1)], PAIR_QUANTILE)), 4)
    return Threshold(score, f"measured with frames of {len(keys)} different videos")


def _stored(archive: Archive) -> tuple[int, dict[str, Threshold]]:
    """The number of frames for which thresholds are stored, and the thresholds by kind, "text" or "picture".

    If the file is damaged or of another model, the number is 0.
    """
    try:
        content = read_json(join(archive.index_uri, THRESHOLDS))
        if get_value(content, "model_id") != archive.model_id:
            return 0, {}
        kinds = [kind for kind in ("text", "picture") if kind in content]
        frames = check_integer("frames", get_value(content, "frames"))
        return frames, {kind: _threshold(content[kind]) for kind in kinds}
    except (Damaged, InvalidValue):
        return 0, {}


def _threshold(values: Any) -> Threshold:
    score = check_number("score", get_value(values, "score"), -1, 1)
    return Threshold(score, check_text("source", get_value(values, "source")))
