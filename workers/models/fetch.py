"""Fetch: downloads a model from the hub into the local cache, and converts pickled weights to safetensors.

Settings are downloaded and checked before the weights. Weights are downloaded as safetensors if the repository has
them. Pickled weights are converted once (unpickle.py) into a cache of vidx, which has the hub's layout.
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
_SETTINGS = re.compile(r"[\w.-]+\.(json|txt|jinja)|README\.md", re.ASCII)  # code is never downloaded
# Indexes and single files of weights, in order of preference, with the suffix of the files that an index names.
_WEIGHTS = (
    ("model.safetensors.index.json", ".safetensors"),
    ("model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", ".bin"),
    ("pytorch_model.bin", ".bin"),
)


@dataclass(frozen=True)
class Fetching:
    """Progress of a fetch.

    Attributes:
        step: "download" or "convert".
        name, file: of the repository, and of its current file.
        done_bytes, total_bytes: of all files of this step.
    """

    step: str
    name: str
    file: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Fetched:
    """A repository in the local cache.

    Attributes:
        name: as given by the user.
        directory: of its files.
        model_type: from its config.json.
        tower: the vision tower that a model names, a hub id or a directory; empty for a tower.
        downloaded_bytes: 0 if all files were there.
        is_converted: whether its weights were pickled.
        kept: steps of the sandbox ("network", "files") that this machine did not allow while weights were converted.
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
    """Downloads a model and its vision tower, or a tower alone, into the local cache.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        tower: hub id or directory of a tower that replaces the one that the model names.
        report: called with the progress.
    Returns:
        The repository, and the tower's if it is on the hub.
    Raises:
        UsageError: the repository cannot be downloaded, is no such model, or has weights that are refused.
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
        snapshot = find_snapshot(hub_cache(), hub_id)
        if snapshot is not None and has_settings(snapshot) and _pickled_names(snapshot):
            directory = snapshot
        else:
            directory, downloaded_bytes = _download(name, hub_id, report)
    kept: frozenset[str] = frozenset()
    if not is_complete(directory):
        directory, kept = _convert(name, hub_id, directory, report)
    config = read_json(directory / "config.json")
    tower = str(config.get("mm_vision_tower", "")) if config.get("model_type") == MODEL_TYPE else ""
    is_converted = not directory.is_relative_to(hub_cache())
    return Fetched(name, directory, str(config.get("model_type")), tower, downloaded_bytes, is_converted, kept)


def _pickled_names(directory: Path) -> list[str]:
    """The files of pickled weights in a directory; none if one is missing."""
    index = directory / "pytorch_model.bin.index.json"
    names = shard_names(index, ".bin") if index.is_file() else ["pytorch_model.bin"]
    return names if all((directory / name).is_file() for name in names) else []


# --- downloading


def _download(name: str, hub_id: HubId, report: Report) -> tuple[Path, int]:
    """Downloads a repository; returns its directory and the number of downloaded bytes."""
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
            raise UsageError(f"{name}: has no config.json, which a model needs")
        config, config_bytes = _download_files(name, hub_id, ["config.json"], sizes, None)
        directory = config.parent
        model_type = read_json(directory / "config.json").get("model_type")
        if model_type not in MODEL_TYPES:
            raise UsageError(f"{name}: model_type is {model_type!r}; only {', '.join(MODEL_TYPES)} can be used")
        _, settings_bytes = _download_files(name, hub_id, settings, sizes, None)
        index, suffix = directory / kind[0], kind[1]
        weights = shard_names(index, suffix) if index.suffix == ".json" else [kind[0]]
        lacking = [file for file in weights if file not in sizes]
        if lacking:
            raise UsageError(f"{name}: {lacking[0]} is not in the repository, but {kind[0]} names it")
        needed = sum(sizes[file] for file in weights if not (directory / file).is_file())
        free = shutil.disk_usage(directory).free
        if needed > free:
            raise UsageError(
                f"{name}: has {needed / 1e9:.1f} GB of weights, but the disk of {directory} has only "
                f"{free / 1e9:.1f} GB free; HF_HOME names another folder"
            )
        _, weight_bytes = _download_files(name, hub_id, weights, sizes, report)
        return directory, config_bytes + settings_bytes + weight_bytes


def _download_files(
    name: str, hub_id: HubId, names: Sequence[str], sizes: Mapping[str, int], report: Report | None
) -> tuple[Path, int]:
    """Downloads files that are not in the cache yet.

    Returns:
        The path of the last one, and how many bytes were downloaded.
    """
    from huggingface_hub import hf_hub_download

    total = sum(sizes[file] for file in names)
    done, downloaded, path = 0, 0, ""
    for file in names:
        counts: list[int] = []

        def count(file_bytes: int, file: str = file, done: int = done, counts: list[int] = counts) -> None:
            counts.append(file_bytes)
            if report is not None:
                report(Fetching("download", name, file, done + file_bytes, total))

        count(0)
        path = hf_hub_download(hub_id.repository, file, revision=hub_id.revision, tqdm_class=_counting_class(count))
        done += sizes[file]
        downloaded += sizes[file] if any(counts) else 0
    return Path(path), downloaded


def _counting_class(count: Callable[[int], None]) -> type:
    """A class of progress bars that show nothing and call a function with the bytes of the file so far."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options | {"disable": False})

        def display(self, *_: Any, **__: Any) -> None:
            """Nothing."""

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B":
                count(int(self.n))
            return shown

        def close(self) -> None:
            self.disable = True  # else it writes a line
            super().close()

    return Bar


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns errors of the hub and of the network into UsageError."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else it reports each attempt
    try:
        yield
    except GatedRepoError as error:
        raise UsageError(
            f"{name}: its terms must be accepted on the hub first; accept them, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{name}: the hub has no such repository, or a private one; check the name, or log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        raise UsageError(f"{name}: the hub says: {str(error).strip().splitlines()[0]}") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise UsageError(
            f"{name}: the hub is out of reach; files that are complete are not downloaded again"
        ) from error
    except OSError as error:
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        raise UsageError(f"{name}: cannot be downloaded: {reason}; HF_HOME names another folder") from error
    except Exception as error:
        # The HTTP library depends on the version of huggingface_hub.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise UsageError(f"{name}: the hub is out of reach: {' '.join(str(error).split())}") from error
        raise
    finally:
        logging.set_verbosity(verbosity)


# --- converting


def _convert(name: str, hub_id: HubId, source: Path, report: Report) -> tuple[Path, frozenset[str]]:
    """Converts a repository's weights; returns its directory in the cache of converted ones, and Fetched.kept."""
    pickled = _pickled_names(source)
    total = sum((source / file).stat().st_size for file in pickled)
    try:
        folder = converted_cache() / hub_id.folder
        target = folder / "snapshots" / source.name
        target.mkdir(parents=True, exist_ok=True)
        done, kept = 0, set()
        for file in pickled:

            def count(file_bytes: int, file: str = file, done: int = done) -> None:
                report(Fetching("convert", name, file, done + file_bytes, total))

            kept |= convert(source / file, target / _converted_name(file), count)
            done += (source / file).stat().st_size
        index = source / "pytorch_model.bin.index.json"
        if index.is_file():
            text = index.read_text(encoding="utf-8")
            for file in pickled:
                text = text.replace(f'"{file}"', f'"{_converted_name(file)}"')
            (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        settings = [file for file in source.iterdir() if _SETTINGS.fullmatch(file.name) and ".index." not in file.name]
        for path in sorted(settings, key=lambda path: path.name == "config.json"):  # last: it makes the folder complete
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
