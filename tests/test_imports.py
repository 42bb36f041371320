"""The layers: pipeline -> workers -> storage, and who may import which heavy library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for package in ("pipeline", "workers", "storage") for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {
    "ray": ("pipeline/cluster.py", "pipeline/executor.py", "pipeline/remote.py"),
    "av": ("workers/decode", "workers/probe.py"),
    "decord": ("workers/decode", "workers/probe.py"),
    "scenedetect": ("workers/decode_scenes.py",),
    "click": ("pipeline/cli",),
    "torch": ("workers/", "pipeline/answer.py", "pipeline/fuse.py"),
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    above = {"storage": {"workers", "pipeline", "torch"}, "workers": {"pipeline"}, "pipeline": set()}
    assert not above[path.relative_to(ROOT).parts[0]] & set(imports(path))


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
    for path in [ROOT / "pipeline" / "cli.py", *sorted((ROOT / "pipeline").glob("cli_*.py"))]:
        if path.name != "cli_print.py":
            assert set(imports(path, top_level_only=True)) <= light, path.name


def test_there_are_no_drawers_for_odds_and_ends():
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "manager", "misc")]
