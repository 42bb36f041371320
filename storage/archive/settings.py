"""archive.json: the format and the model of an archive; and whether a folder is an archive."""

import json
import os
import re
from dataclasses import asdict, dataclass

from storage.checks import InvalidValue, check_integer, check_kind, check_text, get_value, parse_json, read_small
from storage.errors import ArchiveError, UsageError
from storage.files import (
    exists,
    file_path,
    join,
    list_names,
    local_path,
    source_text,
    to_uri,
    write_bytes,
    write_errors,
)

FORMAT_VERSION = 3  # since 2: attempts of videos; since 3: frames in several shards
OLDEST_FORMAT = 2
SETTINGS_NAME = "archive.json"
TABLES = ("frames", "videos", "numbers")
MOST_BYTES = 1 << 20  # of archive.json


@dataclass(frozen=True)
class Settings:
    """What an archive was made with.

    Attributes:
        format_version: the version of the archive's format.
        model_id: the model's identity.
        model_name: the hub id or directory from which the model was loaded.
        model_tower: the vision tower that was given instead of the model's own, or empty.
        videos_per_shard: how many video numbers the parts of a shard belong to; None: all, as before format 3.
    """

    format_version: int
    model_id: str
    model_name: str
    model_tower: str = ""
    videos_per_shard: int | None = None


def is_archive(uri: str) -> bool:
    """Whether the folder is a whole archive: archive.json is written last.

    Raises:
        ArchiveError: one of its folders is a link or another kind of file; what a link points to is not the archive's.
    """
    for name in (*TABLES, "index", "jobs"):
        try:
            check_kind(join(uri, name), "folder")
        except InvalidValue as error:
            raise ArchiveError(f"{source_text(join(uri, name))}: damaged archive: {error}") from error
    return exists(join(uri, SETTINGS_NAME))


def write_settings(uri: str, settings: Settings) -> None:
    """Makes the folder an archive.

    Raises:
        ArchiveError: it cannot be written.
    """
    place = join(uri, SETTINGS_NAME)
    with write_errors(place):
        write_bytes(place, json.dumps(asdict(settings), indent=2).encode() + b"\n")


def read_settings(uri: str) -> Settings:
    """The archive's settings; keys that a later vidx has added to the same format are ignored.

    Raises:
        ArchiveError: it has another format, is damaged, or cannot be read.
    """
    place = join(uri, SETTINGS_NAME)
    try:
        values = parse_json(read_small(place, MOST_BYTES))
        version = check_integer("format_version", get_value(values, "format_version"))
        if not OLDEST_FORMAT <= version <= FORMAT_VERSION:
            older = "made by an older vidx; index the videos again into a new --archive"
            newer = "made by a newer vidx; update vidx"
            raise ArchiveError(
                f"{source_text(uri)}: archive of format version {version}, and this vidx reads versions "
                f"{OLDEST_FORMAT} to {FORMAT_VERSION}: {older if version < FORMAT_VERSION else newer}"
            )
        model_id, model_name = (check_text(name, get_value(values, name)) for name in ("model_id", "model_name"))
        tower = check_text("model_tower", values.get("model_tower", ""))
        per_shard = None if version < 3 else check_integer("videos_per_shard", get_value(values, "videos_per_shard"), 1)
        return Settings(version, model_id, model_name, tower, per_shard)
    except InvalidValue as error:
        raise ArchiveError(
            f"{source_text(place)}: damaged archive: {error}; restore this file from a copy: every archive of the same "
            "model and version has the same file"
        ) from error
    except OSError as error:
        raise ArchiveError(f"{source_text(place)}: cannot be read: {error.strerror}") from error


def archive_uri(name: str) -> str:
    """The URI of an archive that a user names.

    Raises:
        UsageError: it is not a local path, or deltalake cannot open such a path.
    """
    uri = to_uri(name)
    path = local_path(uri)
    if path is None:
        raise UsageError(f"--archive {uri!r}: only local folders (or file:// URIs) can hold an archive")
    if any(byte < 32 for byte in path) or source_text(uri).encode() != path:
        raise UsageError(f"--archive {source_text(uri)!r}: the path of an archive must be UTF-8 text in one line")
    if re.search(rb"%[0-9A-Fa-f]{2}", path):  # deltalake 1.6 decodes it twice and opens another path
        raise UsageError(f"--archive {source_text(uri)}: the path of an archive must not hold % and two digits")
    return uri


def refuse_foreign_folder(uri: str) -> None:
    """Refuses a folder that holds other files, before an archive is created in it.

    Raises:
        UsageError: it holds other files, or is a file itself.
    """
    if exists(uri) and not os.path.isdir(file_path(uri)):
        raise UsageError(f"{source_text(uri)}: is a file; an archive is a folder, name a new one with --archive")
    ours = (*TABLES, "index", "jobs", SETTINGS_NAME, "lost+found")  # the last is in the root folder of a disk
    others = [name for name in list_names(uri) if name not in ours and ".tmp" not in name and name[0] != "."]
    if others:
        raise UsageError(
            f"{source_text(uri)}: no archive, and not empty (it holds {others[0]!r}); name a new or an empty folder"
        )
    for name in TABLES:
        names = list_names(join(uri, name))
        if names and "_delta_log" not in names:
            raise UsageError(
                f"{source_text(uri)}: cannot be an archive, its folder `{name}` holds other files; name a new folder"
            )
