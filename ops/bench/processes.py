"""Whole processes: `vidx --help` and `vidx search` on the sample archive, beside a bare Python start.

Usage: python ops/bench/processes.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, figure, in_turn, run_vidx, save


def main() -> None:
    """Times both and writes results/processes.json."""
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path(folder) / "archive")
        run_vidx("index", str(ROOT / "ops" / "samples"), "--archive", archive)

        def bare() -> None:
            subprocess.run([sys.executable, "-c", "pass"], check=True)

        rows = []
        for name, reach, arguments in (
            ("`vidx --help`", "≤ 0.2 s", ["--help"]),
            ("`vidx search`", "≤ 1.0 s warm", ["search", "a car on a road", "--archive", archive]),
        ):
            timed = in_turn(lambda arguments=arguments: run_vidx(*arguments), bare, runs=11)
            value = f"{timed['seconds']:.2f} s ({timed['yardstick_seconds']:.2f} s)"
            rows.append(figure(f"{name} as a whole process", "`python -c pass`", value, reach, **timed))
    save("processes", rows)


if __name__ == "__main__":
    main()
