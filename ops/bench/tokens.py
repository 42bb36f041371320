"""Reading 64 scattered vision tokens of published width (8 kB) from parts, against a raw memmap of the same rows.

Usage: python ops/bench/tokens.py
"""

import os
import tempfile
from fractions import Fraction

import numpy as np
from harness import figure, in_turn, save

from storage.cells import read_tokens
from storage.files import make_folder, to_uri
from storage.parts import FrameColumns, PartWriter
from storage.records import FrameRef, TokenBatch

WIDTH = 4096  # of Llama-3.1-8B
ROWS = 300  # a part holds the frames of one segment: five minutes at 1 frame/s
PARTS = 64
READ = 64
REPEATS = 50


def write_parts(frames_uri: str, raw: np.memmap) -> list[FrameRef]:
    """The same random tokens as parts and, row by row, in `raw`."""
    random = np.random.default_rng(0)
    refs = []
    for number in range(PARTS):
        video_id = f"{number:064x}"
        settings = {"video_id": video_id, "video_number": number, "segment_key": "..", "time_base": Fraction(1)}
        settings |= {"model_id": "0" * 16, "sampling": "fps=1,patches=0", "dtype": "float32"}
        writer = PartWriter(frames_uri, **settings)
        token = random.standard_normal((ROWS, 1, WIDTH), np.float32).astype(np.float16)
        raw[number * ROWS : (number + 1) * ROWS] = token[:, 0]
        ticks = np.arange(ROWS, dtype=np.int64)
        seconds = ticks.astype(np.float64)
        columns = FrameColumns(ticks, ticks, seconds, seconds, np.ones(ROWS))
        writer.append(columns, TokenBatch(token, np.zeros((ROWS, 1, 1024), np.float16), None, None), [b""] * ROWS)
        part = writer.close()
        refs += [FrameRef(video_id, number, i, i, float(i), 1.0, part.path, i) for i in range(ROWS)]
    raw.flush()
    return refs


def main() -> None:
    """Times both on the same random rows and writes results/tokens.json."""
    with tempfile.TemporaryDirectory() as folder:
        frames_uri = to_uri(folder)
        make_folder(frames_uri)
        name = os.path.join(folder, "raw")
        refs = write_parts(frames_uri, np.memmap(name, np.float16, "w+", shape=(PARTS * ROWS, WIDTH)))
        raw = np.memmap(name, np.float16, "r", shape=(PARTS * ROWS, WIDTH))
        random = np.random.default_rng(1)
        picks = [random.choice(len(refs), READ, replace=False) for _ in range(REPEATS)]
        chosen = [[refs[i] for i in pick] for pick in picks]
        if not np.array_equal(read_tokens(frames_uri, chosen[0])[:, 0], raw[picks[0]]):
            raise RuntimeError("the two differ")

        def ours() -> None:
            for rows in chosen:
                read_tokens(frames_uri, rows)

        def memmap() -> None:
            for pick in picks:
                raw[pick]

        timed = in_turn(ours, memmap, runs=9)
    each = [timed[key] / REPEATS * 1e3 for key in ("seconds", "yardstick_seconds")]
    what = f"{READ} scattered tokens of {2 * WIDTH} bytes from {PARTS} parts, checksums verified, warm"
    value = f"{timed['ratio']:.2f}x ({each[0]:.2f} ms, {each[1]:.2f} ms)"
    save("tokens", [figure(what, "raw memmap", value, "≤ 2x", **timed)])


if __name__ == "__main__":
    main()
