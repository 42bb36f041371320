"""Fills the generated blocks of README.md and ops/docs/*.md, and checks the links between these pages.

The blocks are each command's --help, and the tables from the JSON of the measurements.

Usage: python ops/readme.py [--check]; with --check nothing is written, and a stale page is exit code 1.
Exit code 1 too: a link that leads nowhere, a command without a help block, a headline without a measurement.
"""

import json
import re
import sys
from pathlib import Path

from click.testing import CliRunner

from pipeline.cli.main import COMMANDS, vidx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ops.nano.tables import markdown  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "ops" / "docs").glob("*.md")))
RESULTS = ROOT / "ops" / "bench" / "results"
BLOCK = re.compile(r"(<!-- (?P<name>[a-z -]+): made by ops/readme\.py -->\n).*?(<!-- end -->)", re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)

# The numbers of README.md: what each one says ("" for the words of its file), its file in ops/bench/results, and how
# the `what` of its figure begins there; the first one that begins so is taken.
HEADLINES = (
    ("Search 1 million frames by text", "index", "search 1,000,800 x 768 keys, text queries"),
    ("Search 10 million frames by text", "index", "search 10,000,800 x 768 keys, text queries"),
    ("`vidx search` as a whole process, 10 million frames", "index", "`vidx search` as a whole process, 10,000,800"),
    ("Add an hour of video to 10 million frames", "index", "add an hour of 3,600 frames to 10,000,800"),
    ("`vidx index` where all 10,000 videos are known", "known", "`vidx index` of 10,000 unchanged videos"),
    ("", "decode", "decode 60 s of 720p30 H.264 at 1 frame/s, 1 thread"),
    ("Answer over 1,000 frames, 8 of them retrieved (nano)", "ask", "an answer over 1,000 indexed frames, 8 of them"),
    ("Answers from the default patch rows (nano)", "fidelity", "nano, 6 + 1, int8: questions about moments"),
    ("Text finds its moment first (nano, rendered videos)", "retrieval", "nano, 10 videos of 5 minutes"),
    ("Find the one frame in 10,000 that shows a thing (nano)", "needle", "one frame of a thing among 10,000, asked"),
)


class Stale(Exception):
    """A page cannot be made, or says something that is not so."""


def help_text(command: str) -> str:
    """`vidx COMMAND --help` as a code block."""
    result = CliRunner().invoke(vidx, [*command.split(), "--help"], prog_name="vidx", terminal_width=100)
    return f"```text\n{result.output.rstrip()}\n```\n"


def read_results() -> dict[str, dict]:
    """The record of each file in ops/bench/results, by the file's name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def benchmark_table() -> str:
    """One row per figure: what was measured, against what, and the goal."""
    rows = ["| what | yardstick in the same run | measured | goal |", "| --- | --- | --- | --- |"]
    records = read_results().values()
    for record in records:
        for figure in record["figures"]:
            rows.append(f"| {figure['what']} | {figure['yardstick']} | {figure['value']} | {figure['reach']} |")
    return "\n".join(rows) + f"\n\nMeasured on: {machines(records)}.\n"


def headline_table() -> str:
    """The rows of HEADLINES, with the values, yardsticks and goals that the result files have.

    Raises:
        Stale: a row has no measurement.
    """
    rows = ["| what | measured | yardstick in the same run | goal |", "| --- | --- | --- | --- |"]
    records = read_results()
    for label, name, beginning in HEADLINES:
        found = [each for each in records[name]["figures"] if each["what"].startswith(beginning)]
        if not found:
            raise Stale(f"no figure of {RESULTS.name}/{name}.json begins with {beginning!r}; see HEADLINES")
        figure = found[0]
        what = label or figure["what"][0].upper() + figure["what"][1:]
        rows.append(f"| {what} | {figure['value']} | {figure['yardstick']} | {figure['reach']} |")
    used = [records[name] for name in dict.fromkeys(name for _, name, _ in HEADLINES)]
    return "\n".join(rows) + f"\n\nMeasured on: {machines(used)}.\n"


def machines(records) -> str:
    """The machines and dates of some records."""
    return "; ".join(sorted({f"{record['machine']}, {record['date']}" for record in records}))


def nano_tables() -> str:
    """What ops/nano/evaluate measured."""
    result = json.loads((ROOT / "ops" / "nano" / "evaluation.json").read_text(encoding="utf-8"))
    where = f"`ops/nano/evaluate --seed {result['seed']}`, {result['minutes']:g} minutes of video"
    return f"{markdown(result)}\n\n{where}; {result['machine']}, {result['date']}.\n"


TABLES = {"benchmarks": benchmark_table, "headlines": headline_table, "nano": nano_tables}


def render(text: str) -> str:
    """A page with its generated blocks made anew.

    Raises:
        Stale: a block cannot be made.
    """

    def block(match: re.Match) -> str:
        name = match["name"]
        body = TABLES[name]() if name in TABLES else help_text(name.removeprefix("help "))
        return f"{match[1]}{body}{match[3]}"

    return BLOCK.sub(block, text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub("", text)):
        slug = re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        count = 1
        while (name := slug if count == 1 else f"{slug}-{count - 1}") in found:
            count += 1
        found.add(name)
    return found


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page to files or headings of this repository that are not there."""
    broken = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue  # another site
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def main() -> int:
    """Writes or checks the pages."""
    is_check = "--check" in sys.argv[1:]
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    everything = "\n".join(texts.values())
    problems = [
        f"no page has a help block for {name}"
        for name in COMMANDS
        if f"<!-- help {name}: made by ops/readme.py -->" not in everything
    ]
    for page, text in texts.items():
        name = page.relative_to(ROOT)
        try:
            made = render(text)
        except Stale as error:
            problems.append(f"{name}: {error}")
            continue
        problems += [f"{name}: the link {link} leads nowhere" for link in broken_links(page, made)]
        if made != text and is_check:
            problems.append(f"{name} is stale; run python ops/readme.py")
        elif made != text:
            page.write_text(made, encoding="utf-8")
    for problem in problems:
        print(problem, file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
