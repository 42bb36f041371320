"""The lists that coded keys are sorted into: a rotation and centroids, of all files of codes together.

ID.coarse   E as int64, rotation (E, E) float32, centroids (L, E) float16, reaches (L,) float32
"""

from functools import cached_property

import faiss
import numpy as np

from storage.archive.archive import Archive
from storage.vectors.contents import MOST_WIDTH, Damaged, Written, map_checked, write_file

ITERATIONS = 12
REFINE_ITERATIONS = 3  # over all keys and lists where these were made in two steps
REFINE_PRODUCTS = 1 << 31  # of a key and a centroid; more take longer than they are worth
REACH = 0.2  # times the root mean square distance of a list's keys to its centroid: how far its best lies above that
ROUTER_LISTS = 4096  # more centroids than that are found through an index of their own when keys are assigned


class Coarse:
    """The lists that keys are sorted into.

    Attributes:
        rotation: (E, E) float32, orthogonal: RaBitQ wants dimensions that are alike.
        centroids: (L, E) float16, rotated.
        reaches: (L,) float32, about how much more than its centroid's a list's best product with a query is. It counts
            where queries are texts: these lie far from all pictures, and a list of unlike ones may hold the best.
    """

    def __init__(self, rotation: np.ndarray, centroids: np.ndarray, reaches: np.ndarray):
        self.rotation = rotation
        self.centroids = centroids
        self.reaches = reaches
        count, width = centroids.shape
        self.quantizer = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self.quantizer.add_sa_codes(centroids.view(np.uint8).reshape(count, 2 * width))

    @classmethod
    def train(cls, keys: np.ndarray, list_count: int) -> "Coarse":
        """About so many centroids of (S, E) float32 keys; many of them in two steps, groups and then their parts."""
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
        return len(self.centroids)

    def rotate(self, keys: np.ndarray) -> np.ndarray:
        """(T, E) float32."""
        return np.ascontiguousarray(keys.astype(np.float32, copy=False) @ self.rotation.T)

    def assign(self, rotated: np.ndarray) -> np.ndarray:
        """(T,) int64: the list of each rotated key, that of its nearest centroid."""
        return np.ascontiguousarray(self._router.search(rotated, 1)[1][:, 0])

    def probe(self, rotated: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where to look for what fits a rotated query (E,): (1, count) float32 products with centroids, and lists."""
        products, lists = self.quantizer.search(rotated[None], min(2 * count, self.list_count))
        best = np.argsort(-(products[0] + self.reaches[lists[0]]), kind="stable")[:count]
        return np.ascontiguousarray(products[:, best]), np.ascontiguousarray(lists[:, best])

    @cached_property
    def _router(self) -> faiss.Index:
        centroids, width = self.centroids.astype(np.float32), self.centroids.shape[1]
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
    """How many lists: the power of two next to four times the root of the keys."""
    return 1 << round(np.log2(4 * np.sqrt(key_count)))


def write_coarse(archive: Archive, coarse: Coarse) -> Written:
    """Centroids as a file of the index.

    Raises:
        ArchiveError: the index cannot be written.
    """
    width = np.array([len(coarse.rotation)], "<i8")
    pieces = (width, coarse.rotation.astype("<f4"), coarse.centroids.astype("<f2"), coarse.reaches.astype("<f4"))
    return write_file(archive, ".coarse", lambda new: sum(new.file.write(piece.tobytes()) for piece in pieces))


def open_coarse(archive: Archive, file: Written) -> Coarse:
    """What was written.

    Raises:
        Damaged: they are not what was written.
    """
    data = map_checked(archive, file)
    try:
        width = int(data[:8].view("<i8")[0])
        end = 8 + 4 * width * width
        count = (len(data) - end) // max(1, 2 * width + 4)
        if not 0 < width <= MOST_WIDTH or count < 1 or len(data) != end + count * (2 * width + 4):
            raise ValueError(f"{len(data)} bytes for width {width}")
        rotation, reaches = data[8:end].view("<f4").reshape(width, width), data[len(data) - 4 * count :].view("<f4")
        if not (np.isfinite(rotation).all() and np.isfinite(reaches).all()):
            raise ValueError("values that are no numbers")
        return Coarse(rotation, data[end : len(data) - 4 * count].view("<f2").reshape(count, width), reaches)
    except (ValueError, IndexError) as error:
        raise Damaged(f"{file.name}: {error}") from error


def multiply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Their product, in this thread: NumPy's own wakes others, which are in the way of FAISS's for milliseconds."""
    return np.einsum("ij,j->i", matrix, vector, optimize=False)
