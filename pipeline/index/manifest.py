"""Manifests: CSV or JSONL files that name videos, their capture times and their tags."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from pipeline.times import parse_instant
from storage.errors import UsageError
from storage.files import is_text

SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class ManifestRow:
    """One video of a manifest.

    Attributes:
        source: a path, relative to the manifest's folder, or a URI.
        captured_at: capture time; None if the manifest does not state it.
        tags: tags whose cells are not empty; None if the manifest has no columns for tags.
    """

    source: str
    captured_at: datetime | None
    tags: dict[str, str] | None


def read_manifest(path: str) -> list[ManifestRow]:
    """The rows of a manifest, in order.

    Raises:
        UsageError: the file cannot be read, or a row is wrong; the message names the line.
    """
    read = _read_csv if path.lower().endswith(".csv") else _read_jsonl
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(read(path, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a manifest: {error}") from error
    if not rows:
        raise UsageError(f"{path}: the manifest has no rows; it needs a column `source` and one row per video")
    return [_row(where, row) for where, row in rows]


def _read_csv(path: str, file: Iterable[str]) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(file, strict=True)
    if "source" not in (reader.fieldnames or ()):
        columns = ", ".join(reader.fieldnames or ["none"])
        raise UsageError(f"{path}: the manifest has no column `source`; its columns are {columns}")
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        if None in row:
            raise UsageError(f"{where}: more cells than columns; put cells with commas in quotes")
        yield where, row


def _read_jsonl(path: str, file: Iterable[str]) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{where}: a line must be a JSON object with the key `source`")
        yield where, row


def _row(where: str, row: dict) -> ManifestRow:
    source = row.get("source")
    if not isinstance(source, str) or not source:
        raise UsageError(f"{where}: `source` is missing; give a path or a URI")
    told = {name: value for name, value in row.items() if name not in ("source", "captured_at")}
    tags = {
        str(name): value if isinstance(value, str) else json.dumps(value)
        for name, value in told.items()
        if value not in (None, "")
    }
    if not all(map(is_text, (*tags, *tags.values()))):
        raise UsageError(f"{where}: a tag is not valid text (lone surrogate); write it in UTF-8")
    captured = row.get("captured_at")
    captured_at = None if captured in (None, "") else parse_instant(f"{where}: captured_at", captured)
    return ManifestRow(source, captured_at, tags if told else None)
