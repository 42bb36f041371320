"""The settings of an index job, from presets, a file and the command line."""

import re
import tomllib
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from storage.errors import UsageError
from storage.records import Choice

_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}


class IndexConfig(BaseModel):
    """All settings of `vidx index` except its sources and its archive.

    If `patches` is None, it is 1/9 of the model's patches; if `workers` is None, it depends on the machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "nano"
    tower: str | None = None
    sample: Choice = Choice.RATE
    fps: Fraction = Fraction(1)
    patches: int | None = Field(default=None, ge=0)
    address: str | None = None
    workers: int | None = Field(default=None, ge=1)
    gpus_per_worker: float = Field(default=1.0, gt=0, le=1)
    wait_for_resources: float | None = Field(default=None, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch: int = Field(default=32, ge=1, le=4096)
    max_pixels: int = Field(default=100_000_000, ge=1)
    thumbnails: bool = True
    decoder: Literal["pyav", "decord"] = "pyav"
    decode_threads: int = Field(default=1, ge=1, le=64)
    timeout_seconds: float = Field(default=60, gt=0)
    rehash: bool = False
    retry_failed: bool = False
    restore_deleted: bool = False
    strict_sandbox: bool = False

    @field_validator("fps", mode="before")
    @classmethod
    def _exact_fps(cls, value: Any) -> Fraction:
        text = str(value)
        if not re.fullmatch(r"-?[\d.]{1,20}(/\d{1,20})?", text):  # an exponent could make it huge
            raise ValueError("must be a number or a ratio such as 30000/1001")
        try:
            fps = Fraction(text)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("must be a number or a ratio such as 30000/1001") from error
        if not 0 < fps <= 1000:
            raise ValueError("must be above 0 and at most 1000 frames per second")
        return fps


def preset_names() -> list[str]:
    """The names of the presets for `--config`."""
    return sorted(Path(entry.name).stem for entry in files("configs").iterdir() if entry.name.endswith(".toml"))


def load_config(config: str | None, command_line: dict[str, Any]) -> IndexConfig:
    """The settings of the command line, then those of a preset or TOML file, then the defaults.

    Args:
        config: the name of a preset, a path, or None.
        command_line: option name -> value; None means not given.
    Raises:
        UsageError: there is no such file, it is not TOML, it has an unknown key, or a value is not allowed.
    """
    values = _read_toml(config) if config else {}
    given = {name: value for name, value in command_line.items() if value is not None}
    try:
        return IndexConfig(**{**values, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        origin = f"--{name.replace('_', '-')}" if name in given else f"{config}: {name}"
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(IndexConfig.model_fields)
            raise UsageError(f"{origin}: there is no such setting; the settings are {allowed}") from error
        raise UsageError(f"{origin}: {_allowed(first)}, not {first['input']!r}") from error


def _allowed(error: ErrorDetails) -> str:
    """What a setting must be, from pydantic's error about its value."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"must be {words} {context[key]:g}"
    if "expected" in context:
        return f"must be {context['expected']}"
    name = _KINDS.get(kind.split("_")[0])
    return f"must be {name}" if name else error["msg"].removeprefix("Value error, ")


def _read_toml(config: str) -> dict[str, Any]:
    preset = files("configs") / f"{config}.toml"
    source = preset if config in preset_names() else Path(config)
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(preset_names())
        raise UsageError(f"--config {config}: cannot be read; give a TOML file or one of {names}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {config}: the file is not TOML: {error}") from error
