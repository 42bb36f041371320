"""The hub's repositories in the local cache: where a name's files lie, and which models are at hand.

There are two caches of one layout, the hub's own and ours, which holds what was made of pickled weights (fetch.py).
Nothing is downloaded here, so that neither speed nor meaning of a search hangs on the network.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from storage.errors import UsageError
from workers.cache_folder import cache_folder
from workers.models.checkpoint import read_json, shard_names

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"  # of a name in a hub id
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@({_PART}(?:/{_PART})*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{5,64}")


@dataclass(frozen=True)
class HubId:
    """OWNER/NAME, and the revision that is meant."""

    repository: str
    revision: str

    @property
    def folder(self) -> str:
        """Its name in a cache."""
        return "models--" + self.repository.replace("/", "--")


def is_hub_id(name: str) -> bool:
    """True for OWNER/NAME and OWNER/NAME@REVISION."""
    return _match(name) is not None


def parse_hub_id(name: str) -> HubId:
    """What a hub id means.

    Raises:
        UsageError: it is none.
    """
    match = _match(name)
    if match is None:
        raise UsageError(f"{name}: no hub id; give OWNER/NAME or OWNER/NAME@REVISION")
    return HubId(match[1], match[2] or "main")


def _match(name: str) -> re.Match[str] | None:
    return None if ".." in name or "--" in name.partition("@")[0] else _HUB_ID.fullmatch(name)


def hub_directory(name: str) -> Path:
    """A repository's files, from the local cache.

    Raises:
        UsageError: they are not all there; says which command gets them.
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
    hub_cache()
    raise UsageError(f"not in the local hub cache; `vidx models --fetch {name}` gets it")


def cached_repositories(model_type: str) -> list[tuple[str, Path]]:
    """Complete repositories of a model type in the local caches.

    Returns:
        (OWNER/NAME@REVISION, directory) of each snapshot.
    """
    found = []
    for cache in _caches():
        for config in sorted(cache.glob("models--*--*/snapshots/*/config.json")):
            snapshot = config.parent
            with contextlib.suppress(UsageError, OSError):  # some other program's half download
                if read_json(config).get("model_type") == model_type and is_complete(snapshot):
                    _, owner, repository = snapshot.parents[1].name.split("--", 2)
                    found.append((f"{owner}/{repository}@{snapshot.name}", snapshot))
    return found


def hub_cache() -> Path:
    """The hub's own cache.

    Raises:
        UsageError: nobody knows where it would be.
    """
    from huggingface_hub.constants import HF_HUB_CACHE  # 0.2 s that a model on disk need not wait for

    if not os.path.isabs(HF_HUB_CACHE):
        raise UsageError("no home folder is known, where the hub's cache would be; set HOME, or HF_HOME to a folder")
    return Path(HF_HUB_CACHE)


def converted_cache() -> Path:
    """Where repositories lie whose pickled weights were converted.

    Raises:
        OSError: nobody knows where it would be.
    """
    return cache_folder() / "hub"


def _caches() -> list[Path]:
    """Both, as far as they are known."""
    found = []
    for cache in (hub_cache, converted_cache):
        with contextlib.suppress(UsageError, OSError):
            found.append(cache())
    return found


def find_snapshot(cache: Path, hub_id: HubId) -> Path | None:
    """The folder of a repository's files at a revision, all of them or some; None where there is none."""
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
    """True where settings, weights and what goes with them are there: other programs download single files."""
    return has_settings(directory) and all((directory / name).is_file() for name in _weight_names(directory))


def has_settings(directory: Path) -> bool:
    """The same but for the weights."""
    if not (directory / "config.json").is_file():
        return False
    is_tower = str(read_json(directory / "config.json").get("model_type")).startswith("clip")
    return (directory / ("preprocessor_config.json" if is_tower else "tokenizer.json")).is_file()


def _weight_names(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    return shard_names(index, ".safetensors") if index.is_file() else ["model.safetensors"]
