"""Changes files of an archive as somebody does who means it: whatever vouches for them says that they are right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq

TABLES = ("frames", "videos", "numbers")


class SealedArchive:
    """The folder of an archive; every change is followed by the checksums, sizes and names that speak of it.

    Attributes:
        folder: where it lies.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def settings(self) -> Path:
        """archive.json."""
        return self.folder / "archive.json"

    def checked_json(self, name: str) -> Any:
        """What a file of the index with its checksum in the first line says."""
        return json.loads((self.folder / "index" / name).read_bytes().partition(b"\n")[2])

    def write_checked_json(self, name: str, content: Any) -> None:
        """The same file with other content: a document, or the text of one."""
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.folder / "index" / name).write_bytes(b"%08x\n" % google_crc32c.value(text) + text)

    def write_index_file(self, name: str, data: bytes) -> None:
        """A file of the index, and what its manifest says of it."""
        manifest = self.checked_json("index.json")
        entries = [file for kind in ("exact", "coded") for file in (*manifest[kind]["files"], manifest[kind]["parts"])]
        for entry in (*entries, manifest["centroids"]):
            if entry and entry["name"] == name:
                entry |= {"size_bytes": len(data), "checksum": google_crc32c.value(data)}
        (self.folder / "index" / name).write_bytes(data)
        self.write_checked_json("index.json", manifest)

    def logs(self, table: str) -> list[Path]:
        """The commits of a table."""
        return sorted((self.folder / table / "_delta_log").glob("*.json"))

    def actions(self, log: Path) -> list[Any]:
        """A commit's lines, the statistics in them as documents of their own."""
        actions = [json.loads(line) for line in log.read_text().splitlines()]
        for action in actions:
            if "add" in action:
                action["add"]["stats"] = json.loads(action["add"]["stats"])
        return actions

    def write_actions(self, log: Path, actions: list[Any]) -> None:
        """A commit with other lines."""
        lines = []
        for action in actions:
            if isinstance(action, dict) and isinstance(action.get("add"), dict) and "stats" in action["add"]:
                stats = action["add"]["stats"]
                text = stats if isinstance(stats, str) else json.dumps(stats)
                action = {**action, "add": {**action["add"], "stats": text}}
            lines.append(json.dumps(action))
        log.write_text("\n".join(lines))

    def files(self, table: str) -> list[Path]:
        """Files that a table holds."""
        added: dict[str, None] = {}
        for log in self.logs(table):
            for action in self.actions(log):
                if "add" in action:
                    added[action["add"]["path"]] = None
                if "remove" in action:
                    added.pop(action["remove"]["path"], None)
        return [self.folder / table / path for path in added]

    def write_table_file(self, table: str, path: Path, data: bytes) -> Path:
        """A file of a table under the name that its checksum gives it, as the log and the index have it too."""
        new = path.with_name(f"{path.name.split('.')[0]}.{google_crc32c.value(data):08x}.parquet")
        path.unlink()
        new.write_bytes(data)
        for log in self.logs(table):
            actions = self.actions(log)
            for action in actions:
                for kind in action.keys() & {"add", "remove"}:
                    if action[kind]["path"] == path.name:
                        action[kind] |= {"path": new.name, "size": len(data)}
            self.write_actions(log, actions)
        self.rename_in_index(path.name, new.name)
        return new

    def rename_in_index(self, name: str, new_name: str) -> None:
        """Another name of a part in the lists of the index."""
        for path in (self.folder / "index").glob("*.parts"):
            self.write_index_file(path.name, path.read_bytes().replace(name.encode(), new_name.encode()))

    def rewrite(self, table: str, path: Path, change: Callable[[pa.Table], pa.Table], **options: Any) -> Path:
        """A file of a table with other rows or metadata."""
        sink = pa.BufferOutputStream()
        pq.write_table(change(pq.read_table(path)), sink, **{"compression": "none", **options})
        return self.write_table_file(table, path, sink.getvalue().to_pybytes())
