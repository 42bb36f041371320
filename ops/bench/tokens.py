"""Reading 64 scattered vision tokens of published width (8 kB) from parts, against a raw memmap of the same rows.

Usage: python ops/bench/tokens.py
"""

import os
import tempfile
from fractions import Fraction

import numpy as np
from harness import figure, in_turn, save

from storage.files import make_folder, to_uri
from storage.parts.read import read_tokens
from storage.parts.write import FrameColumns, PartWriter
from storage.records import FrameRef, TokenBatch

WIDTH = 4096  # of Llama-3.1-8B
READ = 64
REPEATS = 50
ROWS = 19_200


def write_parts(frames_uri: str, raw: np.memmap, part_count: int) -> list[FrameRef]:
    """The same random tokens in equal parts and, row by row, in `raw`."""
    random = np.random.default_rng(0)
    refs, rows = [], len(raw) // part_count
    for number in range(part_count):
        video_id = f"{number:064x}"
        settings = {"video_id": video_id, "video_number": number, "segment_key": "..", "time_base": Fraction(1)}
        settings |= {"model_id": "0" * 16, "sampling": "fps=1,patches=0", "dtype": "float32"}
        writer = PartWriter(frames_uri, **settings)
        token = random.standard_normal((rows, 1, WIDTH), np.float32).astype(np.float16)
        raw[number * rows : (number + 1) * rows] = token[:, 0]
        ticks = np.arange(rows, dtype=np.int64)
        seconds = ticks.astype(np.float64)
        columns = FrameColumns(ticks, ticks, seconds, seconds, np.ones(rows))
        writer.append(columns, TokenBatch(token, np.zeros((rows, 1, 1024), np.float16), None, None), [b""] * rows)
        part = writer.close()
        refs += [FrameRef(video_id, number, i, i, float(i), 1.0, part.path, i) for i in range(rows)]
    raw.flush()
    return refs


def measure(part_count: int) -> list[dict]:
    """Figures for one layout: against copying the rows one by one, and against one gather of all."""
    with tempfile.TemporaryDirectory() as folder:
        frames_uri = to_uri(folder)
        make_folder(frames_uri)
        name = os.path.join(folder, "raw")
        refs = write_parts(frames_uri, np.memmap(name, np.float16, "w+", shape=(ROWS, WIDTH)), part_count)
        raw = np.memmap(name, np.float16, "r", shape=(ROWS, WIDTH))
        random = np.random.default_rng(1)
        picks = [random.choice(len(refs), READ, replace=False) for _ in range(REPEATS)]
        chosen = [[refs[i] for i in pick] for pick in picks]
        if not np.array_equal(read_tokens(frames_uri, chosen[0])[:, 0], raw[picks[0]]):
            raise RuntimeError("the two differ")

        def ours() -> None:
            for rows in chosen:
                read_tokens(frames_uri, rows)

        def row_by_row() -> None:
            for pick in picks:
                for row in pick:
                    np.array(raw[row])

        def gather() -> None:
            for pick in picks:
                raw[pick]

        figures = []
        yardsticks = {"raw memmap, row by row": row_by_row, "raw memmap, one gather": gather}
        for words, yardstick in yardsticks.items():
            timed = in_turn(ours, yardstick, runs=9)
            each = [timed[key] / REPEATS * 1e3 for key in ("seconds", "yardstick_seconds")]
            what = f"{READ} scattered tokens of {2 * WIDTH} bytes from {part_count} part(s), checksums verified, warm"
            value = f"{timed['ratio']:.1f}x ({each[0]:.2f} ms, {each[1]:.2f} ms)"
            figures.append(figure(what, words, value, "≤ 2x" if part_count == 1 else "-", **timed))
        return figures


def main() -> None:
    """Measures one part and many, and writes results/tokens.json."""
    save("tokens", [*measure(1), *measure(64)])


if __name__ == "__main__":
    main()
