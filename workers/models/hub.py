"""Repositories of the Hugging Face hub in the local caches: finding a repository's files, and listing models.

There are two caches of the same layout: the hub's own, and one of vidx for converted pickled weights (fetch.py).
Nothing is downloaded here, so a search never waits for the network.

The layout is read here and not by huggingface_hub: try_to_load_from_cache takes 0.2 s to import, and scan_cache_dir
sizes every file and leaves out a whole repository for one dangling link.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from storage.errors import UsageError
from workers.cache_folder import cache_folder
from workers.models.checkpoint import read_json, shard_names

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"  # owner or name in a hub id
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{5,64}")


@dataclass(frozen=True)
class HubId:
    """A repository, OWNER/NAME, and a revision of it."""

    repository: str
    revision: str

    @property
    def folder(self) -> str:
        """The repository's folder in a cache."""
        return "models--" + self.repository.replace("/", "--")


def is_hub_id(name: str) -> bool:
    """True for OWNER/NAME and OWNER/NAME@REVISION."""
    return _match(name) is not None


def parse_hub_id(name: str) -> HubId:
    """Repository and revision of a hub id.

    Raises:
        UsageError: the name is no hub id.
    """
    match = _match(name)
    if match is None:
        raise UsageError(f"{name}: no hub id; give OWNER/NAME or OWNER/NAME@REVISION")
    return HubId(match[1], match[2] or "main")


def _match(name: str) -> re.Match[str] | None:
    return None if ".." in name or "--" in name.partition("@")[0] else _HUB_ID.fullmatch(name)


def hub_directory(name: str) -> Path:
    """The directory of a repository's files in the local caches.

    Raises:
        UsageError: files are missing; the message names the command that downloads them.
    """
    hub_id = parse_hub_id(name)
    try:
        for cache in _caches():
            directory = find_snapshot(cache, hub_id)
            if directory is not None and is_complete(directory):
                return directory
    except OSError as error:
        raise UsageError(
            f"the local hub cache cannot be used: {error.strerror}: {error.filename}; HF_HOME names another folder"
        ) from error
    hub_cache()  # raises if its place is not known
    raise UsageError(f"not in the local hub cache; `vidx models --fetch {name}` downloads it")


def cached_repositories(model_type: str) -> list[tuple[str, Path]]:
    """Complete repositories of a model type in the local caches.

    Returns:
        (OWNER/NAME@REVISION, directory) of each snapshot.
    """
    found = []
    for cache in _caches():
        for config in sorted(cache.glob("models--*--*/snapshots/*/config.json")):
            snapshot = config.parent
            with contextlib.suppress(UsageError, OSError):  # an incomplete download
                if read_json(config).get("model_type") == model_type and is_complete(snapshot):
                    _, owner, repository = snapshot.parents[1].name.split("--", 2)
                    found.append((f"{owner}/{repository}@{snapshot.name}", snapshot))
    return found


def hub_cache() -> Path:
    """The hub's own cache folder.

    Raises:
        UsageError: HF_HOME is not set and the user has no home folder.
    """
    from huggingface_hub.constants import HF_HUB_CACHE  # not at the top: a model in a directory does not need it

    if not os.path.isabs(HF_HUB_CACHE):
        raise UsageError(
            "there is no home folder, so the folder of the hub's cache is not known; set HOME or HF_HOME to a folder"
        )
    return Path(HF_HUB_CACHE)


def converted_cache() -> Path:
    """The cache folder for repositories whose pickled weights were converted; raises as cache_folder."""
    return cache_folder() / "hub"


def _caches() -> list[Path]:
    found = []
    for cache in (hub_cache, converted_cache):
        with contextlib.suppress(UsageError, OSError):
            found.append(cache())
    return found


def find_snapshot(cache: Path, hub_id: HubId) -> Path | None:
    """The folder of a repository's files at a revision, which may be incomplete; None if there is none."""
    folder = cache / hub_id.folder
    try:
        commit = (folder / "refs" / hub_id.revision).read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        commit = hub_id.revision
    if not _COMMIT.fullmatch(commit):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def is_complete(directory: Path) -> bool:
    """True if all settings and weights are there; other programs may have downloaded single files."""
    index = directory / "model.safetensors.index.json"
    names = shard_names(index, ".safetensors") if index.is_file() else ["model.safetensors"]
    return has_settings(directory) and all((directory / name).is_file() for name in names)


def has_settings(directory: Path) -> bool:
    """True if all settings are there, of a model or of a vision tower."""
    if not (directory / "config.json").is_file():
        return False
    is_tower = str(read_json(directory / "config.json").get("model_type")).startswith("clip")
    return (directory / ("preprocessor_config.json" if is_tower else "tokenizer.json")).is_file()
