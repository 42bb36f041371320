"""What a user would take instead: the same keys in usearch, hnswlib, LanceDB and DuckDB's vss, in one run.

Usage: pip install usearch hnswlib lancedb; python ops/bench/index_peers.py FOLDER

FOLDER is one that ops/bench/index.py has grown to a size whose keys fit into memory. Each library runs with its own
defaults for inner product or cosine, a search at a time, on the machine's cores. What is not installed, or cannot be
loaded here, is left out and named.
"""

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import footage
import numpy as np
from harness import figure, save
from index import WIDTH, K, blocks, exact, queries, recall

from storage.archive.archive import open_archive
from storage.files import tree_size
from storage.vectors.vector_index import drop_index, improve_index, open_index, update_index

Search = Callable[[np.ndarray], list[int]]  # a query (E,) -> places of the best K keys


def usearch(keys: np.ndarray, folder: str) -> Search:
    """HNSW, float16, inner product; loaded as a view of its file."""
    from usearch.index import Index

    index = Index(ndim=keys.shape[1], metric="ip", dtype="f16")
    index.add(np.arange(len(keys)), keys)
    index.save(f"{folder}/index.usearch")
    view = Index.restore(f"{folder}/index.usearch", view=True)
    return lambda query: view.search(query, K).keys.tolist()


def hnswlib(keys: np.ndarray, folder: str) -> Search:
    """HNSW, float32, inner product, ef 100; in memory."""
    import hnswlib as library

    index = library.Index(space="ip", dim=keys.shape[1])
    index.init_index(max_elements=len(keys))
    index.add_items(keys)
    index.set_ef(100)
    index.save_index(f"{folder}/index.hnsw")
    return lambda query: index.knn_query(query, K)[0][0].tolist()


def lancedb(keys: np.ndarray, folder: str) -> Search:
    """IVF-PQ on disk, as its documentation suggests, with its refinement by the stored vectors."""
    import lancedb as library
    import pyarrow as pa

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(keys.reshape(-1), pa.float32()), keys.shape[1])
    rows = pa.table({"place": pa.array(np.arange(len(keys))), "vector": vectors})
    table = library.connect(folder).create_table("frames", rows)
    table.create_index(metric="cosine")

    def search(query: np.ndarray) -> list[int]:
        found = table.search(query).distance_type("cosine").refine_factor(10).limit(K).select(["place"])
        return found.to_arrow().column("place").to_pylist()

    return search


def duckdb(keys: np.ndarray, folder: str) -> Search:
    """The extension vss: HNSW, in a table of its own."""
    import duckdb as library

    connection = library.connect(f"{folder}/index.duckdb")
    connection.execute("LOAD vss; SET hnsw_enable_experimental_persistence = true")
    connection.register("given", {"place": np.arange(len(keys)), "vector": list(keys)})
    connection.execute(f"CREATE TABLE frames AS SELECT place, vector::FLOAT[{keys.shape[1]}] AS vector FROM given")
    connection.execute("CREATE INDEX nearest ON frames USING HNSW (vector) WITH (metric = 'ip')")
    order = f"array_negative_inner_product(vector, ?::FLOAT[{keys.shape[1]}])"
    statement = f"SELECT place FROM frames ORDER BY {order} LIMIT {K}"
    return lambda query: [place for (place,) in connection.execute(statement, [query.tolist()]).fetchall()]


def measured(search: Search, wanted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Milliseconds a query and recall, after one round to warm up."""
    found, times = np.full((len(wanted), K), -1, np.int64), []
    for query in wanted:
        search(query)
    for number, query in enumerate(wanted):
        start = time.perf_counter()
        places = search(query)
        times.append(time.perf_counter() - start)
        found[number, : len(places)] = places
    return {"ms": 1e3 * statistics.median(times), "recall": recall(found, true)}


def main() -> None:
    """Builds and searches with each, and writes results/index_peers.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    archive = open_archive(str(options.folder / "archive"))
    keys, ids = (np.concatenate(pieces) for pieces in zip(*blocks(archive), strict=True))
    keys = keys.astype(np.float32)
    place_of = {row_id: place for place, row_id in enumerate(ids.tolist())}
    wanted = queries(footage.directions(WIDTH), len(keys))
    true = {kind: exact(archive, each)[0] for kind, each in wanted.items()}
    places = {kind: np.vectorize(place_of.get)(found) for kind, found in true.items()}
    figures = []
    for build in (usearch, hnswlib, lancedb, duckdb):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            try:
                importlib.import_module(build.__name__)
                start = time.perf_counter()
                search = build(keys, folder)
            except Exception as error:  # any library, any reason: it is named in the table
                print(f"{build.__name__} is left out: {' '.join(str(error).split())}")
                continue
            seconds = time.perf_counter() - start
            found = {kind: measured(search, wanted[kind], places[kind]) for kind in wanted}
            size = tree_size(Path(folder).as_uri())
            figures.append(row(build.__name__, len(keys), seconds, size, found))
    start = time.perf_counter()
    drop_index(archive)
    update_index(archive)
    improve_index(archive)
    seconds = time.perf_counter() - start
    index = open_index(archive)

    def ours(query: np.ndarray) -> list[int]:
        return [place_of[(hit.video_number << 32) | hit.frame_index] for hit in index.search(query, K)]

    found = {kind: measured(ours, wanted[kind], places[kind]) for kind in wanted}
    figures.append(row("vidx", len(keys), seconds, tree_size(archive.index_uri), found))
    save("index_peers", figures)


def row(name: str, count: int, seconds: float, size: int, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One row of the table."""
    each = "; ".join(f"{kind} {one['ms']:.1f} ms, recall@10 {one['recall']:.3f}" for kind, one in found.items())
    built = f"; built in {seconds:.0f} s, {size / count:.0f} bytes a key"
    return figure(f"{count:,} x {WIDTH} keys in {name}", "-", each + built, "-", seconds=seconds, size=size, **found)


if __name__ == "__main__":
    main()
