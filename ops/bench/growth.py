"""Draws how an archive's cost grows with its frames: growth.svg, from results/index.json.

Usage: python ops/bench/growth.py (needs matplotlib)
"""

import json

import matplotlib.pyplot as plt
from harness import RESULTS


def main() -> None:
    """Writes ops/bench/growth.svg."""
    result = json.loads((RESULTS / "index.json").read_text(encoding="utf-8"))
    records = next(row["records"] for row in result["figures"] if "records" in row)
    frames = [record["frames"] for record in records]
    plt.rcParams.update({"svg.hashsalt": "vidx", "svg.fonttype": "none", "font.size": 9})
    figure, (cost, time) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, words in (("archive_bytes", "archive and index"), ("index_bytes", "index")):
        cost.plot(frames, [record[name] / record["frames"] for record in records], "o-", label=words)
    cost.set(xscale="log", xlabel="frames", ylabel="bytes a frame (keys alone)", ylim=0)
    for kind, words in (("picture", "picture"), ("text", "text")):
        time.plot(frames, [record[kind]["ms"] for record in records], "o-", label=f"{words} query")
    time.plot(
        frames, [record["text"]["exact_ms"] for record in records], "s--", color="grey", label="each key compared"
    )
    time.set(xscale="log", yscale="log", xlabel="frames", ylabel="ms a query, 2 cores")
    for axes in (cost, time):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(RESULTS.parent / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
