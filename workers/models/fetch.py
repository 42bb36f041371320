"""Fetch: a model of the hub into the local cache, and safetensors of it where it has pickled weights alone.

Settings come first, so that what is no model of ours is refused before its weights are downloaded; then the weights, as
safetensors where the repository has them. Pickled ones are converted once (unpickle.py), into a cache of our own in the
hub's layout, by which the name then finds them.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import UsageError
from workers.models.bundle import MODEL_TYPE
from workers.models.checkpoint import read_json, shard_names
from workers.models.hub import (
    HubId,
    converted_cache,
    find_snapshot,
    has_settings,
    hub_cache,
    hub_directory,
    is_complete,
    is_hub_id,
    parse_hub_id,
)
from workers.models.unpickle import convert

MODEL_TYPES = (MODEL_TYPE, "clip", "clip_vision_model")
_SETTINGS = re.compile(r"[\w.-]+\.(json|txt|jinja)|README\.md", re.ASCII)  # never code
# Indexes and single files, the better kind first, with what the files are called that an index names.
_WEIGHTS = (
    ("model.safetensors.index.json", ".safetensors"),
    ("model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", ".bin"),
    ("pytorch_model.bin", ".bin"),
)


@dataclass(frozen=True)
class Fetching:
    """Where a fetch stands.

    Attributes:
        step: "download" or "convert".
        name, file: of the repository, and of the file at work.
        done_bytes, total_bytes: of all files of this step.
    """

    step: str
    name: str
    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Fetched:
    """A repository that is at hand.

    Attributes:
        name: as it was asked for.
        directory: where its files lie.
        model_type: what its config.json says.
        tower: the vision tower that a model names, a hub id or a folder; empty for a tower.
        downloaded_bytes: what it took; 0 where all was there.
        is_converted: its weights were pickled.
        kept: what the process that has just unpickled them could not give up here, "network" or "files".
    """

    name: str
    directory: Path
    model_type: str
    tower: str
    downloaded_bytes: int
    is_converted: bool
    kept: frozenset[str] = frozenset()


Report = Callable[[Fetching], None]


def fetch(name: str, tower: str | None, report: Report) -> list[Fetched]:
    """Brings a model or a vision tower, and the tower that a model needs, into the local cache.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        tower: the one to take instead of that which the model names, a hub id or a directory.
        report: hears how far it is.
    Returns:
        The repository, and the tower's where that is one of the hub.
    Raises:
        UsageError: it is not there, is no such model, or has weights that are refused.
    """
    model = _fetch_one(name, report)
    needed = model.tower if tower is None else tower
    is_away = not any(path.is_dir() for path in (model.directory / needed, Path(needed)))
    return [model, _fetch_one(needed, report)] if needed and is_away and is_hub_id(needed) else [model]


def _fetch_one(name: str, report: Report) -> Fetched:
    hub_id, downloaded_bytes = parse_hub_id(name), 0
    try:
        directory = hub_directory(name)
    except UsageError:
        snapshot = _pickled_snapshot(hub_id)
        directory, downloaded_bytes = (snapshot, 0) if snapshot else _download(name, hub_id, report)
    kept: frozenset[str] = frozenset()
    if not is_complete(directory):
        directory, kept = _convert(name, hub_id, directory, report)
    config = read_json(directory / "config.json")
    tower = str(config.get("mm_vision_tower", "")) if config.get("model_type") == MODEL_TYPE else ""
    is_converted = not directory.is_relative_to(hub_cache())
    return Fetched(name, directory, str(config.get("model_type")), tower, downloaded_bytes, is_converted, kept)


def _pickled_snapshot(hub_id: HubId) -> Path | None:
    """A snapshot of the hub's cache that lacks nothing but safetensors."""
    directory = find_snapshot(hub_cache(), hub_id)
    if directory is None or not has_settings(directory):
        return None
    return directory if _pickled_names(directory) else None


def _pickled_names(directory: Path) -> list[str]:
    """The files of pickled weights in a directory; none where one is missing."""
    index = directory / "pytorch_model.bin.index.json"
    names = shard_names(index, ".bin") if index.is_file() else ["pytorch_model.bin"]
    return names if all((directory / name).is_file() for name in names) else []


# --- downloading


def _download(name: str, hub_id: HubId, report: Report) -> tuple[Path, int]:
    """The snapshot of a repository, with safetensors or else pickled weights; and the bytes of what it took."""
    with _hub_errors(name):
        from huggingface_hub import HfApi

        found = HfApi().model_info(hub_id.repository, revision=hub_id.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        kind = next((kind for kind in _WEIGHTS if kind[0] in sizes), None)
        if kind is None:
            others = ", ".join(sorted(file for file in sizes if not _SETTINGS.fullmatch(file))[:5]) or "none"
            raise UsageError(f"{name}: has neither safetensors nor pytorch_model.bin; weights found: {others}")
        settings = [file for file in sizes if _SETTINGS.fullmatch(file) and (".index." not in file or file == kind[0])]
        if "config.json" not in settings:
            raise UsageError(f"{name}: has no config.json; is this a model?")
        take = _Taker(name, hub_id, sizes, report)
        directory = take.files(["config.json"]).parent  # from here on, its branch is known in the cache
        model_type = read_json(directory / "config.json").get("model_type")
        if model_type not in MODEL_TYPES:
            raise UsageError(f"{name}: model_type is {model_type!r}; only {', '.join(MODEL_TYPES)} can be used")
        take.files(settings)
        index, suffix = directory / kind[0], kind[1]
        weights = shard_names(index, suffix) if index.suffix == ".json" else [kind[0]]
        lacking = [file for file in weights if file not in sizes]
        if lacking:
            raise UsageError(f"{name}: {lacking[0]}, which {kind[0]} names, is not in the repository")
        take.check_room(weights, directory)
        take.files(weights, is_told=True)
        return directory, take.taken_bytes


class _Taker:
    """Downloads files of one repository, of those that are not in the cache yet.

    Attributes:
        taken_bytes: of files that were downloaded.
    """

    def __init__(self, name: str, hub_id: HubId, sizes: Mapping[str, int], report: Report):
        self.taken_bytes = 0
        self._name = name
        self._hub_id = hub_id
        self._sizes = sizes
        self._report = report

    def files(self, names: Sequence[str], is_told: bool = False) -> Path:
        """Where the last one lies; told are those that take long."""
        from huggingface_hub import hf_hub_download

        total = sum(self._sizes[name] for name in names)
        done, path = 0, ""
        for name in names:
            heard: list[int] = []

            def hear(count: int, name: str = name, done: int = done, heard: list[int] = heard) -> None:
                heard.append(count)
                if is_told:
                    self._report(Fetching("download", self._name, name, done + count, total))

            hear(0)
            path = hf_hub_download(
                self._hub_id.repository, name, revision=self._hub_id.revision, tqdm_class=_counting_class(hear)
            )
            done += self._sizes[name]
            self.taken_bytes += self._sizes[name] if any(heard) else 0
        return Path(path)

    def check_room(self, names: Sequence[str], directory: Path) -> None:
        """Refuses what the disk has no room for, before it is full."""
        needed = sum(self._sizes[name] for name in names if not (directory / name).is_file())
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise UsageError(
                f"{self._name}: {needed / 1e9:.1f} GB of weights, and the disk of {directory} has {free / 1e9:.1f} GB "
                "free; HF_HOME names another folder"
            )


def _counting_class(hear: Callable[[int], None]) -> type:
    """A class of progress bars that shows nothing; how many bytes of a file are there is heard."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options | {"disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            """Nothing."""

        def update(self, count: float | None = 1) -> bool | None:
            shown = super().update(count)
            if self.unit == "B":
                hear(int(self.n))
            return shown

        def close(self) -> None:
            self.disable = True  # or it would write a line
            super().close()

    return Bar


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub or the way to it says, in one line."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells each try
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(
            f"{name}: the hub gives it to those only who have accepted its terms there; do so, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{name}: the hub has no such repository, or a private one; check the name, or log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        raise UsageError(f"{name}: the hub says: {str(error).strip().splitlines()[0]}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise UsageError(
            f"{name}: the hub is out of reach; what was downloaded stays, and is not asked for again"
        ) from error
    except OSError as error:
        why = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise UsageError(f"{name}: cannot be downloaded: {why}; HF_HOME names another folder") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):  # by its version
            raise UsageError(f"{name}: the hub is out of reach: {' '.join(str(error).split())}") from error
        raise
    finally:
        logging.set_verbosity(verbosity)


# --- converting


def _convert(name: str, hub_id: HubId, source: Path, report: Report) -> tuple[Path, frozenset[str]]:
    """The repository in the cache of converted ones, weights as safetensors; and Fetched.kept."""
    pickled = _pickled_names(source)
    total = sum((source / file).stat().st_size for file in pickled)
    try:
        folder = converted_cache() / hub_id.folder
        target = folder / "snapshots" / source.name
        target.mkdir(parents=True, exist_ok=True)
        done, kept = 0, set()
        for file in pickled:

            def tell(count: int, file: str = file, done: int = done) -> None:
                report(Fetching("convert", name, file, done + count, total))

            kept |= convert(source / file, target / _converted_name(file), tell)
            done += (source / file).stat().st_size
        index = source / "pytorch_model.bin.index.json"
        if index.is_file():
            text = index.read_text(encoding="utf-8")
            for file in pickled:
                text = text.replace(f'"{file}"', f'"{_converted_name(file)}"')
            (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        settings = [file for file in source.iterdir() if _SETTINGS.fullmatch(file.name) and ".index." not in file.name]
        for path in sorted(settings, key=lambda path: path.name == "config.json"):  # with it the folder is complete
            shutil.copyfile(path, target / path.name)
        reference = folder / "refs" / hub_id.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(source.name, encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"{name}: cannot be converted: {error.strerror}{f': {error.filename}' if error.filename else ''}; "
            "VIDX_CACHE names another folder"
        ) from error
    return target, frozenset(kept)


def _converted_name(file: str) -> str:
    return file.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
