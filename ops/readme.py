"""Fills the README's generated blocks: each command's --help, and the tables from the measurements' JSON.

Usage: python ops/readme.py [--check]; with --check nothing is written and a stale README is exit code 1.
"""

import json
import re
import sys
from pathlib import Path

from click.testing import CliRunner

from pipeline.cli import COMMANDS, vidx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ops.nano.tables import markdown  # noqa: E402

BLOCK = re.compile(r"(<!-- (?P<name>[a-z -]+): made by ops/readme\.py -->\n).*?(<!-- end -->)", re.DOTALL)


def help_text(command: str) -> str:
    """`vidx COMMAND --help` as a code block."""
    result = CliRunner().invoke(vidx, [*command.split(), "--help"], prog_name="vidx", terminal_width=100)
    return f"```text\n{result.output.rstrip()}\n```\n"


def benchmark_table() -> str:
    """One row per result file: what was measured, against what, and the number to reach."""
    rows = ["| what | yardstick in the same run | ratio | reach |", "| --- | --- | --- | --- |"]
    machines = set()
    for path in sorted((ROOT / "ops" / "bench" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        machines.add(f"{record['machine']}, {record['date']}")
        for figure in record["figures"]:
            rows.append(f"| {figure['what']} | {figure['yardstick']} | {figure['value']} | {figure['reach']} |")
    return "\n".join(rows) + f"\n\nMeasured on: {'; '.join(sorted(machines))}.\n"


def nano_tables() -> str:
    """What ops/nano/evaluate measured."""
    result = json.loads((ROOT / "ops" / "nano" / "evaluation.json").read_text(encoding="utf-8"))
    where = f"`ops/nano/evaluate --seed {result['seed']}`, {result['minutes']:g} minutes of video"
    return f"{markdown(result)}\n\n{where}; {result['machine']}, {result['date']}.\n"


def render(text: str) -> str:
    """The README with its generated blocks made anew."""

    def block(match: re.Match) -> str:
        name = match["name"]
        tables = {"benchmarks": benchmark_table, "nano": nano_tables}
        body = tables[name]() if name in tables else help_text(name.removeprefix("help "))
        return f"{match[1]}{body}{match[3]}"

    return BLOCK.sub(block, text)


def main() -> int:
    """Writes or checks the README."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if f"<!-- help {name}: made by ops/readme.py -->" not in text]
    if missing:
        print(f"README.md has no help block for {', '.join(missing)}", file=sys.stderr)
        return 1
    made = render(text)
    if "--check" in sys.argv[1:]:
        if made != text:
            print("README.md is stale; run python ops/readme.py", file=sys.stderr)
        return int(made != text)
    path.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
