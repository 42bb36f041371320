"""Ways in which an archive that ops/fuzz_archive opens is damaged or hostile, and what lies beside it."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from ops.damage import DEEP, NUMBERS, ODD_VALUES, damage_bytes, damage_number, damage_value, hostile_names
from ops.sealed import TABLES, SealedArchive

Draw = np.random.Generator
_BINARY = ("keys", "codes", "runs", "rows", "parts", "centroids")


class World:
    """One archive, and what lies around it.

    Attributes:
        folder: of all.
        archive: the archive's.
        outside: files that are nobody's business, all old.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.archive = folder / "inside" / "archive"
        self.outside = folder / "outside"
        (self.outside / "folder").mkdir(parents=True)
        self.archive.parent.mkdir()
        for name in ("victim.txt", *(f"folder/{n}" for n in ("a.parquet", "b.tmp", f"{'c' * 32}.job", "7.claim", "d"))):
            (self.outside / name).write_text("nobody's business")
            os.utime(self.outside / name, (10**9, 10**9))
        os.mkfifo(self.outside / "pipe")

    def state(self) -> dict[str, str]:
        """What is outside the archive, and what it holds."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if self.archive not in path.parents and path != self.archive:
                stat = path.lstat()
                content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
                found[str(path)] = f"{stat.st_mode} {stat.st_ino} {stat.st_size} {content}"
                if path.is_file():
                    found[str(path)] += f" {stat.st_mtime_ns}"
        return found

    def names(self, source: np.random.Generator) -> tuple[str, ...]:
        """Names of what is outside."""
        name = ("victim.txt", "pipe", "folder/a.parquet", "folder")[source.integers(4)]
        depth = "../" * int(source.integers(2, 5))
        return hostile_names(str(self.outside / name), f"{depth}outside/{name}")


def change(kind: str, source: Draw, world: World) -> str:
    """Changes an archive; says what."""
    return _CHANGES[kind](source, world, SealedArchive(world.archive))


def _bytes(source: Draw, world: World, sealed: SealedArchive) -> str:
    files = sorted(path for path in world.archive.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[source.integers(len(files))]
    path.write_bytes(damage_bytes(source, path.read_bytes()))
    return str(path.relative_to(world.archive))


def _sealed_file(source: Draw, world: World, sealed: SealedArchive, damage: Callable[[Draw, bytes], bytes]) -> str:
    """A binary file of which everything says that it is right."""
    if source.random() < 0.5:
        names = [path.name for path in (world.archive / "index").iterdir() if path.suffix[1:] in _BINARY]
        name = sorted(names, key=lambda name: name.split(".")[1])[source.integers(len(names))]
        sealed.write_index_file(name, damage(source, (world.archive / "index" / name).read_bytes()))
        return f"index/{name}"
    table = TABLES[source.integers(3)]
    path = sorted(sealed.files(table))[0]
    sealed.write_table_file(table, path, damage(source, path.read_bytes()))
    return f"{table}/{path.name}"


def _sealed_bytes(source: Draw, world: World, sealed: SealedArchive) -> str:
    return _sealed_file(source, world, sealed, damage_bytes)


def _sealed_number(source: Draw, world: World, sealed: SealedArchive) -> str:
    return _sealed_file(source, world, sealed, damage_number)


def _value(source: Draw, world: World, sealed: SealedArchive) -> str:
    """One value of a document."""
    names = world.names(source)
    match source.integers(6):
        case 0:
            document = damage_value(source, json.loads(sealed.settings().read_text()), names)
            sealed.settings().write_text(DEEP if source.random() < 0.1 else json.dumps(document))
            return f"archive.json {document}"
        case 1 | 2:
            document = damage_value(source, sealed.checked_json("index.json"), names)
            sealed.write_checked_json("index.json", DEEP.encode() if source.random() < 0.05 else document)
            return f"index.json {document}"
        case 3:
            jobs = sorted((world.archive / "jobs").glob("*")) if (world.archive / "jobs").exists() else []
            if not jobs:
                return "nothing"
            path = jobs[source.integers(len(jobs))]
            if path.suffix == ".claim":
                path.write_text(names[source.integers(len(names))], errors="surrogatepass")
            else:
                path.write_text(json.dumps(damage_value(source, json.loads(path.read_text()), names)))
            return f"{path.name} {path.read_bytes()[:200]}"
        case _:
            logs = [log for table in TABLES for log in sealed.logs(table)]
            log = logs[source.integers(len(logs))]
            actions = damage_value(source, sealed.actions(log), names)
            sealed.write_actions(log, actions)
            return f"{log.relative_to(world.archive)} {actions}"


def _cell(source: Draw, world: World, sealed: SealedArchive) -> str:
    """One cell of a table, or one value of a part's metadata."""
    table = TABLES[source.integers(3)]
    paths = sorted(sealed.files(table))
    path, names = paths[source.integers(len(paths))], world.names(source)
    note = ""

    def change_cell(rows: pa.Table) -> pa.Table:
        nonlocal note
        metadata = dict(rows.schema.metadata or {})
        if metadata and source.random() < 0.5:
            key = sorted(metadata)[source.integers(len(metadata))]
            metadata[key] = json.dumps(damage_value(source, json.loads(metadata[key]), names)).encode()
            note = f"{key} {metadata[key]}"
            return rows.replace_schema_metadata(metadata)
        place = int(source.integers(rows.num_columns))
        field, values = rows.schema.field(place), rows.column(place).to_pylist()
        choices = [*names, *NUMBERS, *ODD_VALUES, b"", b"\xff" * 20]
        for _ in range(50):
            value = choices[source.integers(len(choices))]
            row = slice(None) if source.random() < 0.5 else slice(0, 1)
            changed = list(values)
            changed[row] = [value] * len(changed[row])
            with contextlib.suppress(pa.ArrowException, OverflowError, TypeError, ValueError, AttributeError):
                column = pa.array(changed, field.type)
                note = f"{field.name} {value!r}"
                return rows.set_column(place, field.with_nullable(True), column)
        return rows.drop_columns([field.name])

    sealed.rewrite(table, path, change_cell)
    return f"{table} {note}"


def _kind(source: Draw, world: World, sealed: SealedArchive) -> str:
    """A file or folder that becomes a link to the outside, a pipe, or a thing of another kind."""
    places = [path for path in sorted(world.archive.rglob("*")) if path.name != "archive.json" or source.random() < 0.3]
    folders = [path for path in places if path.is_dir()]
    path = (folders if source.random() < 0.4 else places)[source.integers(len(folders))]
    is_folder = path.is_dir()
    moved = world.outside / "moved"
    shutil.move(path, moved)
    match source.integers(6):
        case 0 | 1:
            path.symlink_to(moved)  # what is expected, but outside
        case 2:
            path.symlink_to(world.outside / ("folder" if is_folder else "victim.txt"))
        case 3:
            path.symlink_to(world.outside / "pipe") if source.random() < 0.5 else os.mkfifo(path)
        case 4:
            path.mkdir() if not is_folder else path.write_bytes(b"x")
        case 5:
            path.symlink_to(path.name)
    return f"{path.relative_to(world.archive)} {'link' if path.is_symlink() else 'other'}"


def _extra(source: Draw, world: World, sealed: SealedArchive) -> str:
    """A file or link too many."""
    folders = [world.archive / name for name in ("", "frames", "frames/_delta_log", "videos", "index", "jobs")]
    folder = folders[source.integers(len(folders))]
    folder.mkdir(exist_ok=True)
    log = f"{int(source.choice([3, 4, 10**6, 10**20 - 1])):020}"
    names = ["x.tmp", f"{'a' * 32}.job", "9.claim", "x.parquet", "\udcff", "²" * 20 + ".json", f"{log}.json"]
    names += [
        f"{log}.checkpoint.parquet",
        "_last_checkpoint",
        "-rf",
        "a b",
        "_sidecars",
        "floors.json",
        "index.lock",
        "%2e%2e",
    ]
    path = folder / names[source.integers(len(names))]
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    match source.integers(4):
        case 0:
            path.symlink_to(world.outside / ("folder", "victim.txt", "pipe")[source.integers(3)])
        case 1:
            path.mkdir(exist_ok=True)
        case 2:
            path.write_bytes(source.bytes(50))
        case 3:
            path.write_bytes(b'{"version":999999999999,"size":-1}\n')
    if not path.is_symlink():
        os.utime(path, (10**9, 10**9))
    return f"{path.relative_to(world.archive)!s:.80}"


_CHANGES = {
    "bytes": _bytes,
    "sealed bytes": _sealed_bytes,
    "sealed number": _sealed_number,
    "value": _value,
    "cell": _cell,
    "kind": _kind,
    "extra": _extra,
}
KINDS = tuple(_CHANGES)
WEIGHTS = (1, 1, 1, 3, 2, 1, 1)
