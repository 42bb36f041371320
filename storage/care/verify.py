"""verify: checks that every byte of an archive is as it was written, and that its tables agree with one another."""

import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from storage.archive.archive import Archive, archive_exists, open_archive
from storage.archive.delta import cut_short_commit, damaged_checkpoints, file_sizes, open_table
from storage.archive.frames import read_times
from storage.archive.part_table import table_folders
from storage.archive.settings import archive_uri
from storage.archive.shard import PartBounds
from storage.checks import InvalidValue, check_kind
from storage.errors import DamagedError
from storage.files import checksum_in_name, checksum_of, file_size, join, source_text
from storage.parts.read import part_identity
from storage.processes import usable_cores
from storage.vectors.vector_index import index_faults

BEYOND_REPAIR = (
    "this cannot be repaired: restore the archive from a copy, or index the videos again into a new --archive"
)


@dataclass(frozen=True)
class Fault:
    """Something in an archive that is not as it was written.

    Attributes:
        path: the path of the file or folder.
        detail: what is wrong with it.
        table: the table that it belongs to, "index", or None for a log.
        file: its name in the table, if one file is damaged.
        sources: the paths of the videos whose frames it holds.
        video_number: the number of a video that has frames twice.
        is_mendable: whether `repair` can mend it.
    """

    path: str
    detail: str
    table: str | None
    file: str | None = None
    sources: tuple[str, ...] = ()
    video_number: int | None = None
    is_mendable: bool = True


@dataclass(frozen=True)
class Verification:
    """What was checked, and the faults."""

    files: int
    size_bytes: int
    frames: int
    faults: tuple[Fault, ...]


def verify(uri: str, report: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Reads the whole archive and checks it.

    Each file is compared with its checksum, each part with the log and with the videos table, and the index with the
    keys of the parts. No frame may be stored twice.

    Args:
        uri: the archive's.
        report: called after each file with the number of files read and of all.
    Raises:
        UsageError: there is no archive.
    """
    if not archive_exists(uri):
        open_archive(uri)  # raises the error
    uri = archive_uri(uri)
    files, faults = [], []
    for name, folder in table_folders(uri):
        table_uri = join(uri, name, folder)
        try:
            sizes = file_sizes(open_table(table_uri))
            files += [(name, posixpath.join(folder, path), size) for path, size in sizes.items()]
        except DamagedError as error:
            path, _, detail = str(error).partition(": ")
            mendable = bool(cut_short_commit(table_uri) or damaged_checkpoints(table_uri))
            faults.append(Fault(path, detail, None, is_mendable=mendable))
    if faults:
        return Verification(0, 0, 0, tuple(faults))  # without the logs it is unknown which files it has
    damaged = {}
    with ThreadPoolExecutor(usable_cores()) as pool:  # reading and checksums release the interpreter lock
        found = pool.map(lambda file: _file_fault(join(uri, file[0], file[1]), file[2]), files)
        for done, ((name, path, _), detail) in enumerate(zip(files, found, strict=True), 1):
            report(done, len(files))
            if detail:
                damaged[name, path] = detail
    size_bytes = sum(size for _, _, size in files)
    if any(name != "frames" for name, _ in damaged):
        faults = [
            Fault(source_text(join(uri, name, path)), detail, name, path) for (name, path), detail in damaged.items()
        ]
        return Verification(len(files), size_bytes, 0, tuple(faults))  # it is unknown whose frames the parts hold
    archive = open_archive(uri)
    bounds = archive.parts.bounds()
    faults = [*_part_faults(archive, bounds, {path: detail for (_, path), detail in damaged.items()})]
    faults += _row_faults(archive, bounds)
    if not faults:
        faults += [Fault(source_text(place), detail, "index") for place, detail in index_faults(archive)]
    return Verification(len(files), size_bytes, int(bounds.row_count.sum()), tuple(faults))


def _file_fault(uri: str, size: int) -> str:
    """What is wrong with the bytes of a file; empty if nothing is."""
    try:
        check_kind(uri)
        if (found := file_size(uri)) != size:
            return f"damaged: it has {found} bytes, and {size} were written"
        wanted = checksum_in_name(uri.rsplit("/", 1)[-1])
        if wanted is None:
            return "its name carries no checksum, so another program wrote it"
        found = checksum_of(uri)
        return "" if found == wanted else f"damaged: its checksum is {found:08x}, and {wanted:08x} was written"
    except InvalidValue as error:
        return f"damaged: {error}"
    except FileNotFoundError:
        return "missing, though the archive names it"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _part_faults(archive: Archive, bounds: PartBounds, damaged: Mapping[str, str]) -> Iterator[Fault]:
    """Damaged parts, those that are not what the log says of them, and frames that are stored twice."""
    sources = {number: source_text(uri) for number, uri in archive.videos.uris().items()}
    ticks: dict[int, list[np.ndarray]] = defaultdict(list)
    for place, path in enumerate(bounds.path.tolist()):
        number = int(bounds.video_number[place])
        shown = (sources[number],) if number in sources else ()
        uri = join(archive.frames_uri, path)
        detail = damaged.get(path, "")
        if not detail:
            try:
                times = read_times(archive.frames_uri, path)
                owner = part_identity(archive.frames_uri, path)["video_number"]
            except DamagedError as error:  # another program has written it
                yield Fault(source_text(uri), str(error).partition(": ")[2], "frames", path, shown)
                continue
            held = (len(times.ticks), *_ends(times.frame_index), *_ends(times.time_seconds))
            said = (bounds.row_count, bounds.first_index, bounds.last_index, bounds.first_seconds, bounds.last_seconds)
            if (owner, held) == (number, tuple(column[place] for column in said)):
                ticks[number].append(times.ticks)
                continue
            detail = f"the log says another video, other times or another number of rows than its {len(times.ticks)}"
        yield Fault(source_text(uri), detail, "frames", path, shown)
    for number, pieces in ticks.items():
        joined = np.concatenate(pieces)
        twice = len(joined) - len(np.unique(joined))
        if twice:
            shown = (sources[number],) if number in sources else ()
            detail = f"{twice} frames are stored twice"
            yield Fault(source_text(archive.frames_uri), detail, "frames", None, shown, number)


def _ends(values: np.ndarray) -> tuple:
    return values.min(), values.max()


def _row_faults(archive: Archive, bounds: PartBounds) -> Iterator[Fault]:
    """Videos whose rows say more frames than are stored, or another number than the table of numbers.

    A row may say fewer frames than are stored: a job commits frames before it publishes the row.
    """
    stored = bounds.frame_counts()
    given, place = archive.numbers.known(), source_text(join(archive.uri, "videos"))
    rows = archive.videos.arrow()  # all columns, so that all are checked
    columns = (rows.column(name).to_pylist() for name in ("uri", "video_id", "sampling", "video_number", "frame_count"))
    for uri, video_id, sampling, number, frame_count in zip(*columns, strict=True):
        if number is None:
            continue
        if frame_count > stored[number]:
            source = source_text(uri)
            detail = f"the row of {source} says {frame_count} frames, and {stored[number]} are stored"
            yield Fault(place, detail, "videos", None, (source,))
        if given.get((video_id, sampling)) != number:
            source = source_text(uri)
            detail = f"the row of {source} has the number {number}, which is not its own"
            yield Fault(place, detail, "videos", None, (source,))
