"""The vector index: the search keys of all frames, by which FAISS finds the frames nearest to a query.

    index/index.json    the list of its files, replaced atomically (index_manifest.py)
    index/*.keys        exact keys (exact_keys.py): in a small archive all of them, in a large one the newest
    index/*             the main structure of a large archive: centroids and codes (centroids.py, codes.py)

A search compares each exact key, and looks into the main structure beside them (nearest.py). New keys are added to the
exact ones. When these are many, they move into the main structure, which is copied for that. The index is derived from
the parts: a missing or damaged one is built again from them.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from storage.archive.archive import Archive
from storage.checks import InvalidValue, check_kind, file_uri, read_small
from storage.errors import ArchiveError
from storage.files import exists, join, remove, source_text, write_errors
from storage.vectors.centroids import Centroids, list_count_for, open_centroids, write_centroids
from storage.vectors.codes import (
    CodedKeys,
    build_codes,
    check_codes,
    open_codes,
    write_codes,
)
from storage.vectors.exact_keys import ExactKeys, build_exact, join_exact, open_exact, write_exact
from storage.vectors.index_manifest import (
    LOCK,
    MANIFEST,
    MOST_JSON_BYTES,
    THRESHOLDS,
    TRAINING,
    Covered,
    Damaged,
    IndexManifest,
    KeyFile,
    PartKeys,
    check_sizes,
    locked,
    map_whole,
    read_json,
    read_manifest,
    write_manifest,
)
from storage.vectors.live_parts import LiveParts
from storage.vectors.near_duplicates import sample_runs
from storage.vectors.nearest import Index

EXACT_KEYS = 1 << 15  # with more keys, codes are faster (ops/bench/index.py)
MOST_EXACT_KEYS = 1 << 17  # that are written at once: 200 MB of width 768
BUILD_KEYS = 1 << 23  # whose codes are in memory at once: 2 GB of width 768 where no frames are alike
GROWTH = 4  # centroids are trained again when there are this many times the keys that they were trained for
LEAST_RECALL = 0.95  # of the best ten keys
SAMPLE_PER_LIST = 50  # runs that a centroid is trained on
FIRST_SAMPLE = 1 << 14  # frames that tell how many runs there are
MAX_RETIRED = 0.25  # share of keys of parts that are gone, at which a file is written without them
UPDATE_ROUNDS = 5
OPEN_ROUNDS = 3

_KEPT = {MANIFEST, LOCK, TRAINING, THRESHOLDS}


def open_index(archive: Archive) -> Index:
    """The index of an archive. A missing or damaged one is built again, and stored if the archive can be written.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    manifest_uri = join(archive.index_uri, MANIFEST)
    if not exists(manifest_uri) and not archive.videos.frame_count():
        return Index(archive, LiveParts(archive, IndexManifest()))
    seen = None
    for _ in range(OPEN_ROUNDS):  # a job that replaces the index meanwhile removes the old files
        seen = _bytes_of(manifest_uri)
        with contextlib.suppress(Damaged):
            return _open(archive, read_manifest(archive), False)
    try:
        with locked(archive):
            if _bytes_of(manifest_uri) == seen:  # no other process has built another meanwhile
                drop_index(archive)
        update_index(archive)
        improve_index(archive)
        return _open(archive, read_manifest(archive), True)
    except (ArchiveError, OSError, Damaged) as error:  # read-only: in memory, for this process alone
        if archive.videos.frame_count() > MOST_EXACT_KEYS:
            raise ArchiveError(
                f"{source_text(archive.index_uri)}: missing or damaged, and too large to do without; make the archive "
                f"writable and run `vidx repair` ({' '.join(str(error).split())})"
            ) from error
        return Index(archive, LiveParts(archive, IndexManifest()), rebuilt=True)


def _open(archive: Archive, manifest: IndexManifest, rebuilt: bool) -> Index:
    exact, coded = _open_keys(archive, manifest)
    return Index(archive, LiveParts(archive, manifest), exact, coded, rebuilt)


def _open_keys(archive: Archive, manifest: IndexManifest) -> tuple[ExactKeys, CodedKeys | None]:
    centroids = None if manifest.centroids is None else open_centroids(archive, manifest.centroids)
    return open_exact(archive, manifest.exact), open_codes(archive, centroids, manifest.coded)


def update_index(archive: Archive, max_retired: float = MAX_RETIRED) -> int:
    """Brings the index up to the archive's newest version; gives how many keys were added.

    Args:
        archive: whose frames.
        max_retired: a file is written again when more than this share of its keys is of parts that are gone.
    Raises:
        ArchiveError: a part is missing or damaged, or the index cannot be written.
    """
    added = 0
    for _ in range(UPDATE_ROUNDS):  # another job may have published more meanwhile
        archive.refresh()
        count = _update_once(archive, max_retired)
        if count is None:
            break
        added += count
    return added


def _update_once(archive: Archive, max_retired: float) -> int | None:
    """The count of keys added, None where nothing was to do."""
    before = _whole_manifest(archive)
    total = archive.videos.frame_count()
    if (before is None or before.centroids is None) and total > (EXACT_KEYS if before is None else MOST_EXACT_KEYS):
        added = _train(archive, is_lost=before is None)
        if added:
            return added
    with locked(archive):
        archive.refresh()
        found = _whole_manifest(archive)
        before, live = _live(archive, found or IndexManifest())
        stale = [
            _retired_share(file, kept) > max_retired
            for file, kept in ((before.exact, live.kept_exact), (before.coded, live.kept_coded))
        ]
        if found and not live.new and not any(stale):
            if live.versions != before.versions:
                write_manifest(archive, _seen(before, live))
            return None
        exact_count = before.exact.covered.key_count + sum(count for _, _, count in live.new)
        if before.centroids is None or not (stale[1] or exact_count > MOST_EXACT_KEYS):
            after = replace(before, exact=_add_exact(archive, before.exact, live))
        else:
            after = _merge(archive, before, live)
        write_manifest(archive, _seen(after, live))
    return sum(file.covered.count_of(live.new) for file in (after.exact, after.coded))


def _live(archive: Archive, manifest: IndexManifest) -> tuple[IndexManifest, LiveParts]:
    """The manifest, and what is published beside it; an empty manifest instead of one that cannot be the archive's."""
    try:
        return manifest, LiveParts(archive, manifest)
    except Damaged:
        return IndexManifest(), LiveParts(archive, IndexManifest())


def _seen(manifest: IndexManifest, live: LiveParts) -> IndexManifest:
    """The manifest, up to date with the present versions of the shards."""
    exact, coded = (replace(file, gone=live.gone(file)) for file in (manifest.exact, manifest.coded))
    return replace(manifest, exact=exact, coded=coded, versions=live.versions)


def _whole_manifest(archive: Archive) -> IndexManifest | None:
    """The manifest; None where the index is missing or visibly damaged."""
    try:
        manifest = read_manifest(archive)
        check_sizes(archive, manifest)
        return manifest
    except Damaged:
        return None


def _retired_share(file: KeyFile, kept: np.ndarray) -> float:
    """The share of a file's keys that are of parts which are not published any more."""
    count = file.covered.key_count
    return 1 - int(file.covered.key_counts[kept].sum()) / count if count else 0.0


def _add_exact(archive: Archive, file: KeyFile, live: LiveParts) -> KeyFile:
    """The exact keys that are live, and those of new parts, as a new file."""
    try:
        new = build_exact(archive, live.new)
        return write_exact(
            archive, join_exact([(open_exact(archive, file), live.kept_exact), (new, new.covered.every)])
        )
    except Damaged:
        return write_exact(archive, build_exact(archive, [*_parts_of(file, live.kept_exact), *live.new]))


def _parts_of(file: KeyFile, kept: np.ndarray) -> list[PartKeys]:
    """The parts of a file that are chosen by kept, (P,) bool."""
    return Covered.join([(file.covered, kept)]).parts()


def _merge(archive: Archive, before: IndexManifest, live: LiveParts) -> IndexManifest:
    """The main structure with the exact keys and those of new parts in it, and without parts that are gone."""
    try:
        assert before.centroids is not None
        centroids = open_centroids(archive, before.centroids)
        coded = open_codes(archive, centroids, before.coded)
        if coded is not None:
            for file in before.coded.files:
                map_whole(archive, file)  # so that no damage is copied as if it were right
            check_codes(coded)
    except Damaged:
        return _build(archive, archive.frames.parts()) or IndexManifest()
    parts = [*_parts_of(before.exact, live.kept_exact), *live.new]
    held = [] if coded is None else [(coded, live.kept_coded)]
    return replace(before, exact=KeyFile(), coded=_add_codes(archive, centroids, held, parts))


def _add_codes(
    archive: Archive,
    centroids: Centroids,
    held: Sequence[tuple[CodedKeys, np.ndarray]],
    parts: Sequence[PartKeys],
) -> KeyFile:
    """Codes that are held, and those of other parts, as new files; so many in memory at once.

    Args:
        archive: whose keys.
        centroids: of the codes.
        held: codes, each with (P,) bool: the parts that stay.
        parts: the others.
    """
    written: KeyFile | None = None
    for group in _groups(parts, BUILD_KEYS):
        if written is not None:
            codes = open_codes(archive, centroids, written)
            held = [] if codes is None else [(codes, codes.covered.every)]
        new = build_codes(archive, centroids, group)
        more = write_codes(archive, [*held, (new, new.covered.every)])
        for file in () if written is None else (*written.files, written.parts):
            if file is not None:
                remove(join(archive.index_uri, file.name))
        written = more
    assert written is not None
    return written


def _groups(parts: Sequence[PartKeys], most: int) -> Iterator[Sequence[PartKeys]]:
    """The parts in groups of about so many keys, at least one group."""
    start, count = 0, 0
    for place, (_, _, row_count) in enumerate(parts):
        if count and count + row_count > most:
            yield parts[start:place]
            start, count = place, 0
        count += row_count
    yield parts[start:]


def improve_index(archive: Archive, most_keys: float = math.inf) -> bool:
    """Chooses between exact search and codes by the count of keys, and trains the centroids again when it helps.

    It helps when there are GROWTH times as many keys as they were trained for, or when a search finds less than
    LEAST_RECALL of the best keys. Recall is measured each time that the keys have grown by a quarter. The old index
    serves until the new one is in place.

    Args:
        archive: whose index.
        most_keys: of an index that is trained; training takes about a minute for a million keys.
    Returns:
        Whether the index is as good as it can be; False if it has too many keys and should be trained.
    Raises:
        ArchiveError: a part is missing or damaged, or the index cannot be written.
    """
    try:
        manifest = read_manifest(archive)
        count, is_coded = manifest.key_count, manifest.centroids is not None
        if is_coded and count <= EXACT_KEYS // 2:
            _uncode(archive)
        elif count > max(EXACT_KEYS, GROWTH * manifest.trained_count):
            if count > most_keys:
                return False
            _train(archive)
        elif is_coded and manifest.exact.covered.key_count > EXACT_KEYS:
            with locked(archive):
                archive.refresh()
                before, live = _live(archive, read_manifest(archive))
                write_manifest(archive, _seen(_merge(archive, before, live), live))
            return improve_index(archive, most_keys)
        elif not is_coded or count < 1.25 * manifest.checked_count:
            return True
        elif _open(archive, manifest, False).recall() < LEAST_RECALL:
            if count > most_keys:
                return False
            _train(archive)
        else:
            with locked(archive):
                write_manifest(archive, replace(read_manifest(archive), checked_count=count))
            return True
    except Damaged:
        return True  # another job has replaced or dropped it just now; the next job looks again
    update_index(archive)
    return True


def _train(archive: Archive, is_lost: bool = False) -> int:
    """Trains centroids and builds the main structure of all keys; gives how many keys it has.

    Args:
        archive: whose keys.
        is_lost: there is no index: wait for another process that trains, and then leave its index.
    """
    with locked(archive, TRAINING, is_lost) as is_alone:
        if not is_alone or (is_lost and _whole_manifest(archive) is not None):
            return 0
        archive.refresh()
        versions = archive.parts.versions()
        made = _build(archive, archive.frames.parts())
        if made is None:
            return 0
        made = replace(made, versions=versions)
        with locked(archive):
            try:
                check_sizes(archive, made)
            except Damaged:
                return 0  # somebody has tidied the folder meanwhile; the next job makes it
            write_manifest(archive, made)
        return made.key_count


def _build(archive: Archive, parts: Sequence[PartKeys]) -> IndexManifest | None:
    """An index of codes from nothing, not yet in place; None where the parts have no keys."""
    key_count = sum(count for _, _, count in parts)
    _, runs_per_key = sample_runs(archive, parts, FIRST_SAMPLE)
    if not runs_per_key:
        return None
    list_count = list_count_for(max(1.0, key_count * runs_per_key))
    sample, _ = sample_runs(archive, parts, round(list_count * SAMPLE_PER_LIST / runs_per_key))
    centroids = Centroids.train(sample, min(list_count, len(sample)))
    coded = _add_codes(archive, centroids, [], parts)
    count = coded.covered.key_count
    return IndexManifest(KeyFile(), coded, write_centroids(archive, centroids), count, count)


def _uncode(archive: Archive) -> None:
    """Makes an index of exact keys, for an archive that has become small."""
    with locked(archive):
        archive.refresh()
        versions = archive.parts.versions()
        exact = write_exact(archive, build_exact(archive, archive.frames.parts()))
        write_manifest(archive, IndexManifest(exact, versions=versions))


def named_files(archive: Archive) -> set[str]:
    """Names of the files that the index consists of. Where the manifest is damaged, those that it names are missing."""
    try:
        return _KEPT | read_manifest(archive).names()
    except Damaged:
        return _KEPT


def index_faults(archive: Archive) -> Iterator[tuple[str, str]]:
    """URI and fault of each file of the index that differs from what was written, or from the parts.

    A missing index is no fault: it is built again.

    Raises:
        ArchiveError: a part is missing or damaged.
    """
    manifest = join(archive.index_uri, MANIFEST)
    try:
        check_kind(manifest)
    except InvalidValue as error:
        yield manifest, f"damaged: {error}"
        return
    while (before := _bytes_of(manifest)) is not None:
        found = [*_faults_by_manifest(archive, manifest)]
        if _bytes_of(manifest) in (None, before):
            yield from found
            return
        archive.refresh()  # a job has replaced the index meanwhile, and removed files of this one


def _bytes_of(uri: str) -> bytes | None:
    """A file's content, or None where it cannot be read."""
    try:
        return read_small(uri, MOST_JSON_BYTES)
    except (OSError, InvalidValue):
        return None


def _faults_by_manifest(archive: Archive, uri: str) -> Iterator[tuple[str, str]]:
    try:
        manifest = read_manifest(archive)
    except Damaged as error:
        yield join(archive.index_uri, error.file) if error.file else uri, f"damaged: {error}"
        return
    thresholds = join(archive.index_uri, THRESHOLDS)
    if exists(thresholds):
        try:
            read_json(thresholds)
        except Damaged as error:
            yield thresholds, f"damaged: {error}"
    is_whole = True
    for file in manifest.files:
        try:
            map_whole(archive, file)
        except Damaged as error:
            is_whole = False
            yield join(archive.index_uri, file.name), f"damaged: {error}"
    if not is_whole:
        return
    try:
        exact, coded = _open_keys(archive, manifest)
        if coded is not None:
            check_codes(coded)
    except Damaged as error:
        yield uri, f"damaged: {error}"
        return
    files: list[ExactKeys | CodedKeys] = [exact] if coded is None else [exact, coded]
    for path, _, _ in archive.frames.parts():
        for keys in files:
            if path in keys.covered.order and not keys.holds(archive, path):
                yield uri, f"the keys of {path} differ from the stored ones"


def drop_index(archive: Archive) -> None:
    """Forgets the index, so that the next update builds it from the parts.

    Raises:
        ArchiveError: the index cannot be written.
    """
    names: set[str] = set()
    with contextlib.suppress(Damaged):
        names = read_manifest(archive).names()
    with write_errors(archive.index_uri):
        remove(join(archive.index_uri, MANIFEST))
        for name in names:
            with contextlib.suppress(InvalidValue):
                remove(file_uri(archive.index_uri, name))
        try:
            read_json(join(archive.index_uri, THRESHOLDS))
        except Damaged:
            remove(join(archive.index_uri, THRESHOLDS))
