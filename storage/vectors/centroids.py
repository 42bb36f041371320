"""Centroids: each coded key stands in the list of the centroid that is nearest to it.

ID.centroids    E as int64, rotation (E, E) float32, centroids (L, E) float16, reaches (L,) float32
"""

from functools import cached_property

import faiss
import numpy as np

from storage.archive.archive import Archive
from storage.vectors.exact_keys import scalar_index
from storage.vectors.index_manifest import MOST_WIDTH, Damaged, Written, map_whole, write_file

ITERATIONS = 12
REFINE_ITERATIONS = 3  # over all keys and centroids, after the two steps
REFINE_PRODUCTS = 1 << 31  # of a key and a centroid; more take longer than they are worth
REACH = 0.2  # of the root mean square distance of a list's keys to their centroid
ROUTER_LISTS = 4096  # with more centroids, keys are assigned through an index of the centroids


class Centroids:
    """A rotation, and one centroid for each list.

    Attributes:
        rotation: (E, E) float32, orthogonal. RaBitQ assumes that all dimensions matter alike.
        rotated: (L, E) float16, the centroids after the rotation.
        reaches: (L,) float32, about how far the best product of a query with a key of the list exceeds its product
            with the centroid. It matters for texts: they lie far from all pictures, and the best picture may be in a
            list of unlike ones.
        quantizer: the centroids as FAISS takes them.
    """

    def __init__(self, rotation: np.ndarray, rotated: np.ndarray, reaches: np.ndarray):
        self.rotation = rotation
        self.rotated = rotated
        self.reaches = reaches
        self.quantizer = scalar_index(rotated)

    @classmethod
    def train(cls, keys: np.ndarray, list_count: int) -> "Centroids":
        """About `list_count` centroids of (S, E) float32 keys. Many are found in two steps: groups, then each group."""
        width = keys.shape[1]
        rotation = np.linalg.qr(np.random.default_rng(width).standard_normal((width, width)))[0].astype(np.float32)
        rotated = keys @ rotation.T
        if list_count < ROUTER_LISTS:
            centroids = _cluster(rotated, list_count).centroids
        else:
            groups = _cluster(rotated, 1 << (list_count.bit_length() - 1) // 2)
            group_of = groups.index.search(rotated, 1)[1][:, 0]
            members = [rotated[group_of == group] for group in np.unique(group_of)]
            counts = [max(1, round(len(keys) / len(rotated) * list_count)) for keys in members]
            pieces = [_cluster(keys, count).centroids for keys, count in zip(members, counts, strict=True)]
            centroids = np.concatenate(pieces)
            if len(rotated) * len(centroids) <= REFINE_PRODUCTS:
                centroids = _cluster(rotated, len(centroids), centroids).centroids
        centroids = np.ascontiguousarray(centroids, np.float16)
        made = cls(rotation, centroids, np.zeros(len(centroids), np.float32))
        distances, lists = made._router.search(rotated, 1)
        sums, held = (np.bincount(lists[:, 0], weights, len(centroids)) for weights in (distances[:, 0], None))
        made.reaches += (REACH * np.sqrt(np.maximum(sums, 0) / np.maximum(held, 1))).astype(np.float32)
        return made

    @property
    def list_count(self) -> int:
        """L."""
        return len(self.rotated)

    def rotate(self, keys: np.ndarray) -> np.ndarray:
        """(T, E) float32."""
        return np.ascontiguousarray(keys.astype(np.float32, copy=False) @ self.rotation.T)

    def assign(self, rotated: np.ndarray) -> np.ndarray:
        """(T,) int64: for each rotated key the list of its nearest centroid."""
        return np.ascontiguousarray(self._router.search(rotated, 1)[1][:, 0])

    def probe(self, rotated: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The lists to search for a rotated query (E,): (1, count) float32 products with the centroids, and lists."""
        products, lists = self.quantizer.search(rotated[None], min(2 * count, self.list_count))
        best = np.argsort(-(products[0] + self.reaches[lists[0]]), kind="stable")[:count]
        return np.ascontiguousarray(products[:, best]), np.ascontiguousarray(lists[:, best])

    @cached_property
    def _router(self) -> faiss.Index:
        centroids, width = self.rotated.astype(np.float32), self.rotated.shape[1]
        flat = faiss.IndexFlatL2(width)
        if faiss.get_num_gpus() or self.list_count < ROUTER_LISTS:
            flat.add(centroids)
            return faiss.index_cpu_to_all_gpus(flat) if faiss.get_num_gpus() else flat
        groups = 1 << (self.list_count.bit_length() - 1) // 2
        router = faiss.IndexIVFFlat(flat, width, groups)
        router.cp.niter, router.cp.min_points_per_centroid = 10, 1
        router.train(centroids)
        router.add(centroids)
        router.nprobe = 8
        router.referenced_objects = [flat]
        return router


def _cluster(keys: np.ndarray, count: int, begun: np.ndarray | None = None) -> faiss.Kmeans:
    on_gpu = {"gpu": True} if faiss.get_num_gpus() else {}
    iterations = ITERATIONS if begun is None else REFINE_ITERATIONS
    means = faiss.Kmeans(keys.shape[1], count, niter=iterations, min_points_per_centroid=1, **on_gpu)
    means.train(keys, init_centroids=begun)
    return means


def list_count_for(key_count: float) -> int:
    """How many lists suit so many keys: the power of two nearest to four times their square root."""
    return 1 << round(np.log2(4 * np.sqrt(key_count)))


def write_centroids(archive: Archive, centroids: Centroids) -> Written:
    """Centroids as a file of the index.

    Raises:
        ArchiveError: the index cannot be written.
    """
    width = np.array([len(centroids.rotation)], "<i8")
    arrays = centroids.rotation.astype("<f4"), centroids.rotated.astype("<f2"), centroids.reaches.astype("<f4")
    return write_file(archive, "centroids", (piece.tobytes() for piece in (width, *arrays)))


def open_centroids(archive: Archive, file: Written) -> Centroids:
    """The centroids of the index.

    Raises:
        Damaged: the file differs from what was written.
    """
    data = map_whole(archive, file)
    try:
        width = int(data[:8].view("<i8")[0])
        end = 8 + 4 * width * width
        count = (len(data) - end) // max(1, 2 * width + 4)
        if not 0 < width <= MOST_WIDTH or count < 1 or len(data) != end + count * (2 * width + 4):
            raise ValueError(f"{len(data)} bytes for width {width}")
        rotation, reaches = data[8:end].view("<f4").reshape(width, width), data[len(data) - 4 * count :].view("<f4")
        if not (np.isfinite(rotation).all() and np.isfinite(reaches).all()):
            raise ValueError("NaN or infinity")
        return Centroids(rotation, data[end : len(data) - 4 * count].view("<f2").reshape(count, width), reaches)
    except (ValueError, IndexError) as error:
        raise Damaged(f"{file.name}: {error}") from error


def multiply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The product of a matrix and a vector, in this thread.

    NumPy's own product wakes other threads, which then slow FAISS's threads for milliseconds.
    """
    return np.einsum("ij,j->i", matrix, vector, optimize=False)
