"""The layers: pipeline -> workers -> storage, and who may import which heavy library."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("pipeline", "workers", "storage") for path in (ROOT / package).rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
    if path.parent != ROOT / "pipeline" / "vidx"
}
SAME_STEP = {"search", "chat", "clip", "sql"}  # a step and its command
MAY_IMPORT = {
    "ray": ("pipeline/cluster/",),
    "av": ("workers/decode/"),
    "decord": ("workers/decode/"),
    "scenedetect": ("workers/decode/scenes.py",),
    "click": ("pipeline/cli",),
    "torch": ("workers/", "pipeline/ask/answer.py", "pipeline/ask/showing.py"),
    "transformers": ("workers/",),
    "duckdb": ("storage/",),
    "deltalake": ("storage/",),
    "faiss": ("storage/",),
}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


def modules_imported(path):
    """The dotted names of the project's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def room_of(module):
    """The room of a module: package.room; None for the modules beside the rooms."""
    return ".".join(module.split(".")[:2]) if module.count(".") == 2 else None


def arrows():
    """From which room others are imported, by room."""
    found = {}
    for name, path in MODULES.items():
        if (room := room_of(name)) is not None:
            wanted = {room_of(module) for module in modules_imported(path) if module in MODULES}
            found.setdefault(room, set()).update(wanted - {None, room})
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    above = {"storage": {"workers", "pipeline", "torch"}, "workers": {"pipeline"}, "pipeline": set()}
    assert not above[path.relative_to(ROOT).parts[0]] & set(imports(path))


def test_rooms_import_what_their_doors_say():
    told = {}
    for room in arrows():
        door = (ROOT / room.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
        names = set(re.findall(r"(?:storage|workers|pipeline)\.\w+", door.partition("Imports:")[2]))
        told[room] = {name for name in names if name.split(".")[0] == room.split(".")[0]}
    inside = {
        room: {name for name in wanted if name.split(".")[0] == room.split(".")[0]} for room, wanted in arrows().items()
    }
    assert told == inside


def test_rooms_do_not_import_one_another():
    above = {room: set(wanted) for room, wanted in arrows().items()}
    while lowest := [room for room, wanted in above.items() if not wanted]:
        for room in lowest:
            del above[room]
        above = {room: wanted - set(lowest) for room, wanted in above.items()}
    assert not above  # of a circle, direct or through others, all stay


def test_modules_beside_the_rooms_import_no_room():
    allowed = {"storage.sql", "workers.actors", "workers.frame_stream", "workers.segment"}  # which stand above them
    for name, path in MODULES.items():
        if name.count(".") == 1 and name not in allowed and path.name != "__init__.py":
            assert not {module for module in modules_imported(path) if room_of(module)}, name


def test_every_room_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert sorted(settings["packages"]) == sorted({"configs", "vidx"} | rooms)


def test_no_two_modules_have_one_name():
    pairs = Counter(name.rpartition(".")[2] for name, path in MODULES.items() if path.name != "__init__.py")
    assert {name for name, count in pairs.items() if count > 1} <= SAME_STEP


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_where_they_belong(path):
    name = str(path.relative_to(ROOT))
    wrong = {
        library
        for library in set(imports(path)) & set(MAY_IMPORT)
        if not any(name.startswith(allowed) for allowed in MAY_IMPORT[library])
    }
    assert not wrong


def test_commands_import_heavy_modules_inside_their_bodies():
    light = {"__future__", "click", "pipeline", "storage"} | {
        "ast",
        "importlib",
        "os",
        "signal",
        "sys",
        "time",
        "re",
        "json",
        "math",
    }
    light |= {"collections", "contextlib", "dataclasses", "typing", "pathlib", "datetime", "decimal"}
    for path in sorted((ROOT / "pipeline" / "cli").glob("*.py")):
        if path.name != "print.py":
            assert set(imports(path, top_level_only=True)) <= light, path.name


def test_no_two_classes_have_one_name():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


def test_there_are_no_drawers_for_odds_and_ends():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "manager", "misc")]


def scripts():
    """The scripts and benchmarks, which neither the type checker nor every test run reads."""
    paths = [path for path in (ROOT / "ops").rglob("*") if path.is_file() and path.suffix in ("", ".py")]
    return [path for path in paths if path.suffix or path.read_bytes()[:22] == b"#!/usr/bin/env python3"]


def names_in(path):
    """What a module defines or imports at its top level, also under a condition."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_scripts_import_what_there_is():
    assert len(scripts()) > 30
    for script in scripts():
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
                "pipeline",
                "workers",
                "storage",
            ):
                own = MODULES.get(node.module)
                assert own is not None, f"{script}: {node.module}"
                for alias in node.names:
                    is_module = f"{node.module}.{alias.name}" in MODULES
                    assert is_module or alias.name in names_in(own), f"{script}: {node.module}.{alias.name}"
