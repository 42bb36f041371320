"""A model bundle: finding it by its name, its settings, and the id by which archives know it.

A bundle is a directory in the published LLaVA-Mini layout (config.json, safetensors, tokenizer), with the CLIP
directory that its `mm_vision_tower` names. The object `vidx` in config.json is its card: what it knows and does not
know. Imports no torch, and checks config.json without pydantic, whose import would add 0.14 s to every search.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from storage.errors import UsageError
from workers.models.checkpoint import list_tensors, read_json, tensor_digests
from workers.models.hub import cached_repositories, hub_directory, is_hub_id
from workers.models.preprocess import PictureSettings, read_settings

MODEL_TYPE = "llava_mini_llama"

NOT_STATED = "not stated by its files"
_TOWER_DEFAULTS = {"hidden_size": 768, "image_size": 224, "patch_size": 32, "num_hidden_layers": 12}  # CLIPVisionConfig


@dataclass(frozen=True)
class Card:
    """What a model states about itself: the object `vidx` in its config.json.

    Attributes:
        licence: of the weights.
        knows, does_not_know: one or two sentences each; notes show the first sentence.
        trained: how and on what it was trained.
        accuracy: source of pre-fusion ("exact", "patches", "tokens") -> kind of question -> per cent of right answers.
        unknown_answers: answers that mean "I do not know" -> why the model gives them.
        search_floor: the least cosine of a text and a frame that counts as found; None where the files do not say.
        takes_history: whether it was trained on conversations. If not, each question is asked without the ones before.
        most_frames: the most frames per answer that it was trained on; None: as many as its context holds.
    """

    licence: str
    knows: str = NOT_STATED
    does_not_know: str = NOT_STATED
    trained: str = NOT_STATED
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unknown_answers: Mapping[str, str] = field(default_factory=dict)
    search_floor: float | None = None
    takes_history: bool = True
    most_frames: int | None = None

    @property
    def states_limits(self) -> bool:
        """Whether the card says what the model does not know."""
        return self.does_not_know != NOT_STATED

    def why_unknown(self, answer: str) -> str | None:
        """Why the model gives an answer, if the answer means "I do not know"; else None.

        Case, surrounding spaces and a full stop at the end are ignored.
        """
        return next((why for text, why in self.unknown_answers.items() if _bare(text) == _bare(answer)), None)

    def begins_unknown(self, answer: str) -> bool:
        """Whether a text may be the beginning of an answer that means "I do not know"."""
        return any(_bare(text).startswith(_bare(answer)) for text in self.unknown_answers)


@dataclass(frozen=True)
class ModelConfig:
    """The settings in config.json.

    Attributes:
        compressor_size: C; a frame has C*C vision tokens.
        resolution_ratio: r; with r > 1 the model sees r x r blocks of a frame and the whole frame.
        select_layer: the tower's hidden state that holds the patches; negative, counted from the end.
        prefusion_layer_count: Llama blocks before the LLM.
        hidden_size: H, width of the LLM.
        context_length: most tokens of prompt, frames and answer.
        eos_ids: tokens that end an answer.
        projector_type: for example mlp2x_gelu.
        tower: a directory or a hub id.
        llama: all of config.json, for the Llama blocks, with the rope settings as `rope_parameters`.
    """

    compressor_size: int
    resolution_ratio: int
    select_layer: int
    prefusion_layer_count: int
    hidden_size: int
    context_length: int
    eos_ids: tuple[int, ...]
    projector_type: str
    tower: str
    llama: Mapping[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A model on disk, not loaded.

    Attributes:
        name: the name by which it was found.
        directory, tower_directory: of LLaVA-Mini and of its CLIP.
        tower_name: the hub id or directory given with --tower; empty if config.json names the CLIP.
        tower: CLIP's config.json.
        pictures: settings of the tower's image processor.
        has_search_key: whether CLIP's visual projection is there, so that frames get a search key.
        has_text_search: whether the text tower, its projection and its tokenizer are there too.
    """

    name: str
    directory: Path
    tower_directory: Path
    config: ModelConfig
    tower: Mapping[str, Any]
    pictures: PictureSettings
    card: Card
    has_search_key: bool
    has_text_search: bool
    tower_name: str = ""

    @property
    def vision(self) -> Mapping[str, Any]:
        """The settings of the vision tower, with defaults."""
        return _TOWER_DEFAULTS | sub_config(self.tower, "vision_config")

    @property
    def tokens_per_frame(self) -> int:
        """Vision tokens of a frame in the LLM's context."""
        return self.config.compressor_size**2

    @property
    def token_shape(self) -> tuple[int, int]:
        """(C*C, H), the shape of a frame's stored vision tokens."""
        return self.tokens_per_frame, self.config.hidden_size

    @property
    def compressed_shape(self) -> tuple[int, int]:
        """(C*C, D), the shape of a frame's stored compressor output."""
        return self.tokens_per_frame, self.vision["hidden_size"]

    @property
    def context_length(self) -> int:
        """Most tokens of prompt, frames and answer together."""
        return self.config.context_length

    @property
    def patches_per_picture(self) -> int:
        """Patches of one picture in the tower."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def pictures_per_frame(self) -> int:
        """Pictures that the tower sees of a frame: the frame alone, or its blocks and the frame."""
        return 1 if self.config.resolution_ratio == 1 else self.config.resolution_ratio**2 + 1

    @property
    def patches_per_frame(self) -> int:
        """Patches of a frame in pre-fusion."""
        return self.patches_per_picture * self.pictures_per_frame

    @property
    def default_patch_rows(self) -> int:
        """The default of --patches: 1/9 of a picture's patches (64 of 576)."""
        return max(1, self.patches_per_picture // 9)

    def check_patch_rows(self, patch_rows: int) -> None:
        """Checks the value of --patches.

        Raises:
            UsageError: the model has not that many patches.
        """
        most = self.patches_per_picture
        if not 0 <= patch_rows <= most:
            raise UsageError(f"--patches {patch_rows}: {self.name} has {most} patches a picture; give 0 to {most}")

    @cached_property
    def model_id(self) -> str:
        """16 hex digits of a hash of all weights and of every setting that changes stored numbers.

        Sharding and the place on disk do not matter. Hashing published weights (17 GB) takes long the first time;
        then the digests come from the cache folder.
        """
        config = self.config
        blocks = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act")
        settings = {
            "compressor_size": config.compressor_size,
            "resolution_ratio": config.resolution_ratio,
            "select_layer": config.select_layer,
            "prefusion_layer_count": config.prefusion_layer_count,
            "projector_type": config.projector_type,
            "rope_parameters": config.llama["rope_parameters"],
            "blocks": {name: config.llama.get(name) for name in blocks},
            "vision": {name: self.vision.get(name) for name in ("num_attention_heads", "hidden_act", "layer_norm_eps")},
            "pictures": asdict(self.pictures),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for role, directory in (("checkpoint", self.directory), ("tower", self.tower_directory)):
            for name, value in sorted(tensor_digests(directory).items()):
                digest.update(f"{role} {name} {value}\n".encode())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Bundle({self.name!r}, directory={os.fspath(self.directory)!r})"


def find_bundle(name: str, tower: str | None = None) -> Bundle:
    """The bundle with a name: a built-in name, a directory, or a hub id (OWNER/NAME or OWNER/NAME@REVISION).

    Hub repositories are found in the local caches only (fetch.py downloads them).

    Args:
        tower: directory or hub id of a CLIP that replaces the one that the model names.
    Raises:
        UsageError: there is no such model, or it is no usable LLaVA-Mini.
    """
    if name in built_in_names():
        return read_bundle(name, Path(str(files("configs") / name)), tower)
    try:
        name, directory = _find_directory(name)
    except UsageError as error:
        names = ", ".join(built_in_names())
        raise UsageError(f"no model named {name}: {error}; built-in names: {names}") from error
    return read_bundle(name, directory, tower)


def _find_directory(name: str) -> tuple[str, Path]:
    """The directory that a path or hub id names, and the name as archives store it.

    Raises:
        UsageError: there is none.
    """
    if os.path.isdir(name):
        path = os.path.abspath(name)  # workers have other working directories
        return path, Path(path)
    if is_hub_id(name) and not os.path.exists(name):
        return name, hub_directory(name)
    if os.path.exists(name):
        raise UsageError("not a directory")
    raise UsageError("no such directory, and no hub id of the form OWNER/NAME")


def list_bundles(tower: str | None = None) -> list[Bundle]:
    """The bundles that can be used without a download: built-in ones, then those in the local hub caches.

    Repositories that are incomplete, or whose tower is missing, are left out.

    Args:
        tower: replaces the tower of repositories, as in find_bundle.
    Raises:
        UsageError: there is no such tower.
    """
    if tower is not None:
        _other_tower(tower)
    found = [find_bundle(name) for name in built_in_names()]
    for name, directory in cached_repositories(MODEL_TYPE):
        with contextlib.suppress(UsageError):
            found.append(read_bundle(name, directory, tower))
    return found


def built_in_names() -> list[str]:
    """Names of the bundles that are part of vidx."""
    return sorted(entry.name for entry in files("configs").iterdir() if (entry / "config.json").is_file())


def read_bundle(name: str, directory: Path, tower: str | None = None) -> Bundle:
    """The bundle in a directory of the published layout; tower as in find_bundle.

    Raises:
        UsageError: a file is missing, or has a setting that is not supported.
    """
    path = directory / "config.json"
    values = read_json(path)
    config = _model_config(path, values)
    if tower is None:
        tower_name, tower_directory = "", _tower_directory(directory, config.tower)
    else:
        tower_name, tower_directory = _other_tower(tower)
    clip = read_json(tower_directory / "config.json")
    if clip.get("model_type") not in ("clip", "clip_vision_model"):
        raise UsageError(f"{tower_directory}: model_type is {clip.get('model_type')!r}; a vision tower must be CLIP")
    tensors = list_tensors(tower_directory)
    has_search_key = "visual_projection.weight" in tensors
    has_text = "text_projection.weight" in tensors and any(key.startswith("text_model.") for key in tensors)
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    has_tokenizer = any(all((tower_directory / file).is_file() for file in form) for form in forms)
    bundle = Bundle(
        name=name,
        directory=directory,
        tower_directory=tower_directory,
        config=config,
        tower=clip,
        pictures=read_settings(tower_directory),
        card=_card(path, values, directory),
        has_search_key=has_search_key,
        has_text_search=has_search_key and has_text and has_tokenizer,
        tower_name=tower_name,
    )
    if bundle.pictures.crop_side != bundle.vision["image_size"]:
        raise UsageError(
            f"{tower_directory}: crop_size in preprocessor_config.json is {bundle.pictures.crop_side}, image_size in "
            f"config.json is {bundle.vision['image_size']}; they must be equal"
        )
    return bundle


def sub_config(tower: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of CLIP's config.json, `vision_config` or `text_config`; all of it for a tower without text.

    Older files have the part a second time as `<name>_dict`, which is preferred, as in transformers.
    """
    if tower["model_type"] == "clip_vision_model":
        return dict(tower)
    return {**(tower.get(name) or {}), **(tower.get(f"{name}_dict") or {})}


def _model_config(path: Path, values: dict[str, Any]) -> ModelConfig:
    if values.get("model_type") != MODEL_TYPE:
        raise UsageError(f"{path}: model_type is {values.get('model_type')!r}; only {MODEL_TYPE} can be loaded")
    for name, allowed in (("mm_vision_select_feature", "patch"), ("mm_use_im_start_end", False)):
        if values.get(name, allowed) != allowed:
            raise UsageError(f"{path}: {name} is {values[name]!r}; only {allowed!r} is supported")
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {"rope_type": "default"})
    if "type" in rope:  # the name in old files
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    try:
        config = ModelConfig(
            compressor_size=int(values["compressor_size"]),
            resolution_ratio=int(values.get("resolution_ratio", 1)),  # the published code's default
            select_layer=int(values["mm_vision_select_layer"]),
            prefusion_layer_count=int(values["prefusion_layer_num"]),
            hidden_size=int(values["hidden_size"]),
            context_length=int(values["max_position_embeddings"]),
            eos_ids=_eos_ids(path, values),
            projector_type=str(values["mm_projector_type"]),
            tower=str(values["mm_vision_tower"]),
            llama={k: v for k, v in values.items() if k not in ("rope_scaling", "rope_theta", "vidx")}
            | {"rope_parameters": rope},
        )
    except KeyError as error:
        raise UsageError(f"{path}: {error} is missing; a LLaVA-Mini checkpoint needs it") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: a setting has the wrong type: {error}") from error
    for name in ("compressor_size", "resolution_ratio", "prefusion_layer_count", "hidden_size", "context_length"):
        if getattr(config, name) < 1:
            raise UsageError(f"{path}: {name} is {getattr(config, name)}; it must be at least 1")
    if config.select_layer >= 0:
        raise UsageError(
            f"{path}: mm_vision_select_layer is {config.select_layer}; it must be negative, counted from the end"
        )
    return config


def _eos_ids(path: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end an answer, from generation_config.json or else config.json, as in transformers."""
    generation = path.with_name("generation_config.json")
    generated = read_json(generation) if generation.is_file() else {}
    ids = generated.get("eos_token_id", values.get("eos_token_id"))
    if ids is None:
        raise UsageError(f"{path}: eos_token_id is missing, here and in generation_config.json; one of them needs it")
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


def _card(path: Path, values: dict[str, Any], directory: Path) -> Card:
    given = values.get("vidx")
    if given is None:
        return Card(licence=_readme_licence(directory))
    if not isinstance(given, dict):
        raise UsageError(f"{path}: vidx is {given!r}; it must be an object")
    known = {field.name: field.type for field in fields(Card)}
    unknown = set(given) - set(known)
    if unknown or "licence" not in given:
        raise UsageError(f"{path}: vidx needs licence and knows only {', '.join(known)}; found {', '.join(given)}")
    for name, value in given.items():
        holds, wanted = _CARD_VALUES[known[name]]
        if not holds(value):
            raise UsageError(f"{path}: vidx.{name} is {value!r}; it must be {wanted}")
    return Card(**given)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_object_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(holds(item) for item in value.values())


# Type of a card's field -> check of a value in config.json, and the type's name in messages.
_CARD_VALUES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (_is_text, "text"),
    float | None: (_is_number, "a number"),
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int | None: (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    Mapping[str, str]: (lambda value: _is_object_of(value, _is_text), "an object whose values are texts"),
    Mapping[str, Mapping[str, float]]: (
        lambda value: _is_object_of(value, lambda kinds: _is_object_of(kinds, _is_number)),
        "an object of source -> kind of question -> per cent, a number",
    ),
}


def _bare(answer: str) -> str:
    """An answer without what a comparison ignores."""
    return answer.strip().removesuffix(".").rstrip().casefold()


def _readme_licence(directory: Path) -> str:
    """The licence in the front matter of a hub repository's README, or "unknown"."""
    try:
        text = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return licence[1].strip("\"'") if licence else "unknown"


def _tower_directory(directory: Path, tower: str) -> Path:
    """The directory that `mm_vision_tower` names: a path from the checkpoint, a path, or a hub id."""
    if (directory / tower).is_dir():
        return directory / tower
    try:
        return _find_directory(tower)[1]
    except UsageError as error:
        raise UsageError(f"{directory}: its mm_vision_tower {tower}: {error}; --tower names another CLIP") from error


def _other_tower(tower: str) -> tuple[str, Path]:
    """The vision tower given with --tower: its name as archives store it, and its directory."""
    try:
        return _find_directory(tower)
    except UsageError as error:
        raise UsageError(f"--tower {tower}: {error}") from error
