"""Models of the hub: what is downloaded and how it is told, pickled weights, and a tower other than the named one."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SAMPLES
from safetensors.torch import load_file
from small_bundle import change_json, write_tower
from small_hub import COMMIT, serving

from workers.models.bundle import find_bundle

TINY = Path(__file__).parent / "reference" / "llava-mini-tiny" / "checkpoint"
CLIP = str(SAMPLES / "nano_scenes_1.mp4")
MODEL, TOWER = "someone/mini", "someone/clip"


class Hostile:
    """Runs a command where it is unpickled without care."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def pickled(directory: Path, is_zip: bool = True) -> dict[str, torch.Tensor]:
    """Has a directory's weights as torch.save writes them, alone."""
    weights = load_file(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (directory / "model.safetensors").unlink()
    return weights


@pytest.fixture
def repositories(tmp_path):
    """A model of the published layout, and apart from it its tower."""
    model = Path(shutil.copytree(TINY, tmp_path / "repositories" / "mini"))
    tower = Path(shutil.move(model / "vision_tower", tmp_path / "repositories" / "clip"))
    change_json(model / "config.json", {"mm_vision_tower": TOWER})
    return {MODEL: model, TOWER: tower}


@pytest.fixture
def places(tmp_path):
    """Where the caches are, without a hub."""
    return {"HF_HOME": str(tmp_path / "home"), "VIDX_CACHE": str(tmp_path / "ours"), "HF_HUB_OFFLINE": "1"}


def cached(places: dict[str, str], name: str, source: Path) -> Path:
    """A repository in the hub's cache, as other programs put it there."""
    folder = Path(places["HF_HOME"]) / "hub" / ("models--" + name.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="ascii")
    return Path(shutil.copytree(source, folder / "snapshots" / COMMIT))


def online(places: dict[str, str], address: str) -> dict[str, str]:
    return places | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}


# --- downloading


def test_a_model_and_its_tower_are_fetched_once_and_then_known_offline(vidx, repositories, places, tmp_path):
    model, tower = repositories[MODEL], repositories[TOWER]
    for name in ("evil.py", "flax_model.msgpack", "pytorch_model.bin", "training_args.bin"):
        (tower / name).write_bytes(b"never asked for")
    with serving(repositories) as (address, asked):
        run = vidx("models", "--fetch", MODEL, "--json", env=online(places, address))
        assert run.code == 0, run.err
        first = list(asked)
        again = vidx("models", "--fetch", MODEL, "--json", env=online(places, address))
    sizes = [sum(file.stat().st_size for file in folder.glob("*.[sjt]*")) for folder in (model, tower)]
    assert [one["downloaded_bytes"] for one in run.json] == sizes
    assert not any(one["converted"] for one in run.json)
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(first)
    assert not {"evil.py", "flax_model.msgpack", "pytorch_model.bin", "training_args.bin"} & set(first)
    assert (again.code, [one["downloaded_bytes"] for one in again.json], asked) == (0, [0, 0], first)
    size = f"{(model / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    assert f"{MODEL}: download model.safetensors, 0 B of {size}" in run.err
    (listed,) = [entry for entry in vidx("models", "--json", env=places).json if entry["name"] == f"{MODEL}@{COMMIT}"]
    assert listed["model_id"] == find_bundle(str(TINY)).model_id
    command = ("index", CLIP, "--fps", "0.2", "--archive", str(tmp_path / "archive"), "--model", MODEL, "--json")
    indexed = vidx(*command, env=places)
    assert (indexed.code, indexed.json["model_id"]) == (0, listed["model_id"])


def test_a_download_that_broke_off_goes_on(vidx, repositories, places):
    with serving(repositories, cut="model.safetensors") as (address, asked):
        run = vidx("models", "--fetch", TOWER, "--json", env=online(places, address))
    assert (run.code, asked.count("model.safetensors")) == (0, 2)
    directory = Path(run.json[0]["directory"])
    assert (directory / "model.safetensors").read_bytes() == (repositories[TOWER] / "model.safetensors").read_bytes()
    assert len(run.err.splitlines()) <= 3


def test_what_cannot_be_fetched_is_said_in_a_line(vidx, repositories, places):
    other = Path(shutil.copytree(repositories[TOWER], repositories[TOWER].with_name("other")))
    change_json(other / "config.json", {"model_type": "gpt2"})
    bare = Path(shutil.copytree(repositories[TOWER], repositories[TOWER].with_name("bare")))
    (bare / "model.safetensors").rename(bare / "tf_model.h5")
    with serving(repositories | {"someone/other": other, "someone/bare": bare}) as (address, asked):
        for name, says in (
            ("someone/none", "someone/none: the hub has no such repository"),
            ("someone/other", "model_type is 'gpt2'; only llava_mini_llama, clip"),
            ("someone/bare", "has neither safetensors nor pytorch_model.bin; weights found: tf_model.h5"),
            ("nano", "nano: no hub id; give OWNER/NAME"),
            ("../x", "no hub id"),
        ):
            run = vidx("models", "--fetch", name, env=online(places, address))
            assert (run.code, run.out, len(run.err.splitlines())) == (2, "", 1), run.err
            assert says in run.err
        assert "model.safetensors" not in asked  # no weights of what cannot be used
    run = vidx("models", "--fetch", MODEL, env=places)
    assert (run.code, len(run.err.splitlines())) == (2, 1)
    assert "the hub is out of reach" in run.err


@pytest.mark.parametrize("command", ["index", "ask"])
def test_a_model_that_is_not_there_names_the_command_that_gets_it(vidx, places, tmp_path, samples_archive, command):
    given = {
        "index": (CLIP, "--archive", str(tmp_path / "archive")),
        "ask": ("x", "--archive", str(samples_archive[0])),
    }
    run = vidx(command, *given[command], "--model", "ICTNLP/llava-mini-llama-3.1-8b", env=places)
    assert (run.code, len(run.err.splitlines())) == (2, 1)
    assert "`vidx models --fetch ICTNLP/llava-mini-llama-3.1-8b` downloads it" in run.err


def test_a_tower_that_is_not_there_names_the_command_that_gets_it(vidx, repositories, places, tmp_path):
    cached(places, MODEL, repositories[MODEL])
    pickled(repositories[TOWER])
    cached(places, TOWER, repositories[TOWER])  # as another program left it: pickled
    command = ("index", CLIP, "--archive", str(tmp_path / "archive"), "--model", MODEL)
    run = vidx(*command, env=places)
    assert (run.code, len(run.err.splitlines())) == (2, 1)
    assert (
        f"its mm_vision_tower {TOWER}: not in the local hub cache; `vidx models --fetch {TOWER}` downloads it"
        in run.err
    )
    assert vidx("models", "--fetch", TOWER, env=places).code == 0
    assert vidx(*command, "--dry-run", env=places).code == 0


# --- pickled weights


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_pickled_weights_are_converted_once_to_the_same_values(vidx, repositories, places, is_zip):
    weights = pickled(repositories[TOWER], is_zip)
    snapshot = cached(places, TOWER, repositories[TOWER])
    run = vidx("models", "--fetch", TOWER, "--json", env=places)
    assert run.code == 0, run.err
    (one,) = run.json
    assert (one["converted"], one["downloaded_bytes"]) == (True, 0)
    directory = Path(one["directory"])
    assert directory.is_relative_to(places["VIDX_CACHE"])
    assert not (snapshot / "model.safetensors").exists()  # the hub's cache is the hub's
    converted = load_file(directory / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, value in weights.items():
        assert (converted[name].dtype, converted[name].shape) == (value.dtype, value.shape)
        assert torch.equal(converted[name], value)
    made = (directory / "model.safetensors").stat().st_mtime_ns
    (again,) = vidx("models", "--fetch", TOWER, "--json", env=places).json
    assert again["directory"] == one["directory"]
    assert (directory / "model.safetensors").stat().st_mtime_ns == made
    assert list(directory.glob(".*")) == []


def test_pickled_weights_in_pieces_are_converted_piece_by_piece(vidx, repositories, places):
    tower = repositories[TOWER]
    weights = pickled(tower)
    (tower / "pytorch_model.bin").unlink()
    names = sorted(weights)
    pieces = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, held in pieces.items():
        torch.save({name: weights[name] for name in held}, tower / file)
    weight_map = {name: file for file, held in pieces.items() for name in held}
    (tower / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with serving(repositories) as (address, _):
        (one,) = vidx("models", "--fetch", TOWER, "--json", env=online(places, address)).json
    directory = Path(one["directory"])
    assert one["converted"]
    found = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    cached(places, MODEL, repositories[MODEL])
    listed = vidx("models", "--json", env=places).json
    assert find_bundle(str(TINY)).model_id in [entry["model_id"] for entry in listed]


def test_hostile_pickles_are_refused_in_a_line_and_do_nothing(vidx, repositories, places, tmp_path):
    tower, proof = repositories[TOWER], tmp_path / "proof"
    weights = pickled(tower)
    snapshot = cached(places, TOWER, tower)
    hostile = {
        "a command in place of weights": lambda file: file.write_bytes(pickle.dumps(Hostile(proof))),
        "a command among weights": lambda file: torch.save(weights | {"x": Hostile(proof)}, file),
        "text among weights": lambda file: torch.save(weights | {"x": "text"}, file),
        "a list": lambda file: torch.save(list(weights.values()), file),
        "far more values than bytes": lambda file: torch.save({"x": torch.zeros(1).expand(1 << 40)}, file),
        "cut off": lambda file: file.write_bytes((tower / "pytorch_model.bin").read_bytes()[:-999]),
        "empty": lambda file: file.write_bytes(b""),
    }
    for what, write in hostile.items():
        write(snapshot / "pytorch_model.bin")
        run = vidx("models", "--fetch", TOWER, env=places)
        assert (run.code, run.out) == (2, ""), what
        (line,) = [line for line in run.err.splitlines() if ": convert " not in line]
        assert "pytorch_model.bin: pickled weights that are refused: " in line, what
        assert not proof.exists(), what
    assert "system" in vidx_refusal(vidx, snapshot, hostile["a command among weights"], places)
    assert not list(Path(places["VIDX_CACHE"]).rglob("*.safetensors*"))


def vidx_refusal(vidx, snapshot, write, places):
    write(snapshot / "pytorch_model.bin")
    return vidx("models", "--fetch", TOWER, env=places).err


def test_the_process_that_unpickles_reads_its_file_and_nothing_else(tmp_path):
    """In a process of its own, as there is no way back."""
    import subprocess
    import sys

    own, other = tmp_path / "own", tmp_path / "other"
    own.write_bytes(b"own")
    other.write_bytes(b"other")
    code = (
        "import os, sys\n"
        "from workers.sandbox import leave_network_and_files\n"
        "own, other = sys.argv[1:]\n"
        "taken = leave_network_and_files([os.open(own, os.O_RDONLY)])\n"
        "if 'files' not in taken: sys.exit(7)\n"
        "assert open(own, 'rb').read() == b'own'\n"
        "for path, mode in ((other, 'rb'), (own, 'ab'), (own + '2', 'wb'), ('/etc/passwd', 'rb')):\n"
        "    try:\n"
        "        open(path, mode)\n"
        "    except PermissionError:\n"
        "        continue\n"
        "    raise SystemExit(f'{path} {mode} was opened')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, own, other], capture_output=True, text=True)
    if done.returncode == 7:
        pytest.skip("this kernel restricts no files")
    assert done.returncode == 0, done.stderr


# --- another tower


@pytest.fixture
def other_tower(tmp_path):
    """The built-in model's tower with other weights."""
    directory = Path(shutil.copytree(find_bundle("nano").tower_directory, tmp_path / "tower"))
    torch.manual_seed(11)
    write_tower(directory, {})
    return directory


def test_a_tower_that_is_named_is_the_one_that_computes_and_the_archive_remembers_it(vidx, other_tower, tmp_path):
    archive, plain = (("--archive", str(tmp_path / name)) for name in ("archive", "plain"))
    command = ["index", CLIP, "--fps", "0.2", "--json"]
    own = vidx(*command, *plain).json
    run = vidx(*command, *archive, "--tower", str(other_tower))
    assert run.code == 0, run.err
    assert run.json["model_id"] != own["model_id"]
    whole = Path(shutil.copytree(find_bundle("nano").directory, tmp_path / "whole"))
    shutil.rmtree(whole / "vision_tower")
    shutil.copytree(other_tower, whole / "vision_tower")
    assert run.json["model_id"] == find_bundle(str(whole)).model_id  # the same weights, wherever they lie
    for question in (("search", "a cow", "--floor", "-1"), ("ask", "What is there?", "--all", "--fuse", "tokens")):
        assert vidx(*question, *archive, "--json").json["model_id"] == run.json["model_id"]
    refused = vidx(*command, *archive)  # its own tower is another model
    assert (refused.code, len(refused.err.splitlines()) <= 2) == (2, True)
    assert f"is of the model nano with --tower {other_tower}" in refused.err
    moved = Path(shutil.move(other_tower, tmp_path / "elsewhere"))
    lost = vidx("search", "a cow", *archive)
    assert (lost.code, len(lost.err.splitlines())) == (2, 1)
    assert f"--tower {other_tower}: no such directory" in lost.err
    found = vidx("search", "a cow", "--floor", "-1", *archive, "--tower", str(moved), "--json")
    assert (found.code, found.json["model_id"]) == (0, run.json["model_id"])
    assert vidx("search", "a cow", *plain, "--tower", str(moved)).code == 2  # another model than made it


def test_a_tower_takes_the_place_of_the_one_that_a_checkpoint_names(vidx, repositories, places, tmp_path):
    model, tower = repositories[MODEL], repositories[TOWER]
    run = vidx("index", CLIP, "--archive", str(tmp_path / "a"), "--model", str(model), "--dry-run", env=places)
    assert f"vidx models --fetch {TOWER}" in run.err
    named = ("--model", str(model), "--tower", str(tower))
    run = vidx("index", CLIP, "--archive", str(tmp_path / "a"), *named, "--fps", "0.2", "--json", env=places)
    assert (run.code, run.json["model_id"]) == (0, find_bundle(str(TINY)).model_id)
    cached(places, MODEL, model)
    assert MODEL not in vidx("models", env=places).out  # its tower is away
    assert MODEL in vidx("models", "--tower", str(tower), env=places).out
    with serving({MODEL: model, "someone/other": tower}) as (address, asked):
        run = vidx("models", "--fetch", MODEL, "--tower", "someone/other", "--json", env=online(places, address))
    assert ([one["name"] for one in run.json], "config.json" in asked) == ([MODEL, "someone/other"], True)


@pytest.mark.parametrize("tower", ["nowhere", "someone/clip", "", "a/b/c"])
def test_a_tower_that_is_none_is_said_in_a_line(vidx, places, tmp_path, tower):
    run = vidx("index", CLIP, "--archive", str(tmp_path / "a"), "--tower", tower, env=places)
    assert (run.code, len(run.err.splitlines())) == (2, 1), run.err
    assert run.err.startswith(f"vidx: --tower {tower}: ")
