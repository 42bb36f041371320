"""The hub: a repository's files in the local cache, downloaded where they are not there yet."""

import os
import re
from pathlib import Path

from storage.errors import UsageError
from workers.weights import read_json

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md"]  # never pickles, never code


def is_hub_id(name: str) -> bool:
    """True for OWNER/NAME and OWNER/NAME@REVISION."""
    return _HUB_ID.fullmatch(name) is not None


def hub_directory(name: str) -> Path:
    """A repository as a local directory, from the cache or downloaded.

    Raises:
        UsageError: says why it cannot be had.
    """
    # imported here: 0.2 s that a model on disk need not wait for
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if not os.path.isabs(HF_HUB_CACHE):
        raise UsageError("no home folder is known, where the hub's cache would be; set HOME, or HF_HOME to a folder")
    match = _HUB_ID.fullmatch(name)
    try:
        cached = _cached_snapshot(name)
        if cached is not None:
            return cached
        return Path(snapshot_download(match["repository"], revision=match["revision"], allow_patterns=_FILES))
    except HFValidationError as error:
        raise UsageError(f"not a hub id: {error}") from error
    except HfHubHTTPError as error:
        raise UsageError(f"the hub says: {str(error).strip().splitlines()[0]}") from error
    except LocalEntryNotFoundError as error:
        raise UsageError("not in the local hub cache, and the hub is out of reach") from error
    except OSError as error:
        if error.filename is not None:  # not the network's
            raise UsageError(
                f"the local hub cache cannot be used: {error.strerror}: {error.filename}; HF_HOME names another folder"
            ) from error
        raise UsageError("not in the local hub cache, and the hub is out of reach") from error


def cached_repositories(model_type: str) -> list[tuple[str, Path]]:
    """Complete repositories of a model type in the local cache whose tower is at hand too.

    Returns:
        (OWNER/NAME@REVISION, directory) of each snapshot.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    found = []
    for config in sorted(Path(HF_HUB_CACHE).glob("models--*--*/snapshots/*/config.json")):
        snapshot = config.parent
        try:
            values = read_json(config)
        except UsageError:
            continue  # some other program's half download
        if values.get("model_type") != model_type or not _is_complete(snapshot):
            continue
        if _is_at_hand(snapshot, str(values.get("mm_vision_tower"))):
            _, owner, repository = snapshot.parents[1].name.split("--", 2)
            found.append((f"{owner}/{repository}@{snapshot.name}", snapshot))
    return found


def _cached_snapshot(name: str) -> Path | None:
    """Where the local cache holds a repository in full, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    match = _HUB_ID.fullmatch(name)
    try:
        cached = Path(snapshot_download(match["repository"], revision=match["revision"], local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return cached if _is_complete(cached) else None


def _is_at_hand(directory: Path, tower: str) -> bool:
    """True where a checkpoint's tower needs no download."""
    if (directory / tower).is_dir() or Path(tower).is_dir():
        return True
    return is_hub_id(tower) and _cached_snapshot(tower) is not None


def _is_complete(directory: Path) -> bool:
    """True where settings, weights and what goes with them are there: other programs download single files."""
    if not (directory / "config.json").is_file():
        return False
    is_tower = str(read_json(directory / "config.json").get("model_type")).startswith("clip")
    if not (directory / ("preprocessor_config.json" if is_tower else "tokenizer.json")).is_file():
        return False
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return (directory / "model.safetensors").is_file()
    return all((directory / name).is_file() for name in set(read_json(index).get("weight_map", {"": ""}).values()))
