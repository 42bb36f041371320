"""JSON of values, videos and moments."""

import math
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from pipeline.text import encodable
from storage.files import source_text

if TYPE_CHECKING:
    from storage.records import Moment


def json_value(value: Any) -> Any:
    """A value that JSON can hold: binary values in hex, times in ISO 8601, null for infinite numbers and NaN."""
    match value:
        case None | bool() | int():
            return value
        case str():
            return encodable(value)
        case float() | Decimal():
            return float(value) if math.isfinite(value) else None
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
        case date():
            return value.isoformat()
        case Mapping():
            return {str(key): json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [json_value(item) for item in value]
        case _:
            return str(value)


def source_json(uri: str) -> dict[str, Any]:
    """A video's place, as every --json gives it: for people, and as a URI."""
    return {"source": source_text(uri), "source_uri": uri}


def moment_json(moment: "Moment") -> dict[str, Any]:
    """A moment as `search --json` and `ask --json` give it."""
    return {
        "video_id": moment.video_id,
        "source": source_text(moment.uri),
        "start_seconds": round(moment.start_seconds, 6),
        "end_seconds": round(moment.end_seconds, 6),
        "best_seconds": round(moment.best_seconds, 6),
        "score": None if moment.score is None else round(moment.score, 6),
    }
