"""Manifests, CSV or JSONL: rows that name videos, when they were recorded, and their tags."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from pipeline.times import epoch_hint
from storage.errors import UsageError
from storage.files import is_text
from storage.iso_time import iso_instant

SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class ManifestRow:
    """One video as a manifest names it: a path or URI, relative to the manifest's folder.

    Attributes:
        source: where it is.
        captured_at: None where the manifest does not say.
        tags: without those of empty cells; None where the manifest has no columns of tags.
    """

    source: str
    captured_at: datetime | None
    tags: dict[str, str] | None


def read_manifest(path: str) -> list[ManifestRow]:
    """The rows of a manifest, in order.

    Raises:
        UsageError: it cannot be read, or a row is wrong; names the line.
    """
    read = _read_csv if path.lower().endswith(".csv") else _read_jsonl
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(read(path, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a manifest: {error}") from error
    if not rows:
        raise UsageError(f"{path}: no rows; a manifest has a column `source` and one row per video")
    return [_row(where, row) for where, row in rows]


def _read_csv(path: str, file: Iterable[str]) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(file, strict=True)
    if "source" not in (reader.fieldnames or ()):
        raise UsageError(f"{path}: no column `source`; columns are {', '.join(reader.fieldnames or ['none'])}")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row:
            raise UsageError(f"{where}: more cells than columns; quote cells that hold commas")
        yield where, row


def _read_jsonl(path: str, file: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a line must be a JSON object with a key `source`")
        yield where, row


def _row(where: str, row: dict) -> ManifestRow:
    source = row.get("source")
    if not isinstance(source, str) or not source:
        raise UsageError(f"{where}: no `source`")
    told = {name: value for name, value in row.items() if name not in ("source", "captured_at")}
    tags = {
        str(name): value if isinstance(value, str) else json.dumps(value)
        for name, value in told.items()
        if value not in (None, "")
    }
    if not all(map(is_text, (*tags, *tags.values()))):
        raise UsageError(f"{where}: a tag is no valid text (a lone surrogate)")
    return ManifestRow(source, _captured_at(where, row.get("captured_at")), tags if told else None)


def _captured_at(where: str, text: object) -> datetime | None:
    if text in (None, ""):
        return None
    instant = iso_instant(text)
    if instant is None:
        hint = epoch_hint(text)
        raise UsageError(f"{where}: captured_at {text!r} is not ISO 8601, e.g. 2024-05-01T12:00:00Z{hint}")
    return instant
