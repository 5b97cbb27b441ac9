"""The one file that knows Faiss: flat files, graphs without vectors, scans and searches.

Vectors are kept once, as raw float32 behind a Faiss flat header, and memory-mapped; a graph is
saved without them and put on top of the mapping. Measured with faiss-cpu 1.15.1: graph plus mapping
gives the results of the ordinary index, and opening 100k x 384 takes milliseconds.

Metrics are Shoal's distances: Cosine and Dot are inner products (Cosine of unit vectors), Euclid is
squared inside Faiss and rooted here, Manhattan is L1. Everything is exact unless it says graph.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.cpu import prepare_environment
from shoal.errors import InvariantError, Unavailable, must
from shoal.storage_api import Distance

__all__ = [
    "FlatVectors",
    "Graph",
    "build_graph",
    "distances",
    "flat_header",
    "use_one_thread",
]


prepare_environment()  # before the import: both are read when the library is loaded

import faiss  # noqa: E402

_METRICS = {
    Distance.COSINE: faiss.METRIC_INNER_PRODUCT,
    Distance.DOT: faiss.METRIC_INNER_PRODUCT,
    Distance.EUCLID: faiss.METRIC_L2,
    Distance.MANHATTAN: faiss.METRIC_L1,
}
_L1_CHUNK_FLOATS = 1 << 20  # bounds the temporary of the numpy path


def use_one_thread() -> None:
    """OpenMP's thread count is per calling thread; every thread that searches calls this once."""
    faiss.omp_set_num_threads(1)


def flat_header(dim: int, count: int, distance: Distance) -> bytes:
    """What stands in front of `count` x `dim` float32 to make the file a Faiss flat index.

    The layout belongs to the Faiss version, so it is taken from an empty index of this version;
    the two counters in it (rows at byte 8, floats in the last 8 bytes) are then filled in.
    """
    header = bytearray(faiss.serialize_index(faiss.IndexFlat(dim, _METRICS[distance])).tobytes())
    must(header[8:16] == bytes(8) and header[-8:] == bytes(8), "unknown layout of a flat index")
    header[8:16] = count.to_bytes(8, "little")
    header[-8:] = (count * dim).to_bytes(8, "little")
    return bytes(header)


class FlatVectors:
    """A memory-mapped file of vectors: `values` (count, dim) float32, read-only, C order."""

    def __init__(self, path: Path, dim: int, count: int, distance: Distance) -> None:
        self.distance = distance
        if count == 0:  # an empty range cannot be mapped
            self.values: NDArray[np.float32] = np.empty((0, dim), np.float32)
            return
        # Never call add() on this: on a mapped index Faiss ends the process.
        self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if (self._index.ntotal, self._index.d) != (count, dim):
            raise InvariantError(f"{path}: {self._index.ntotal} x {self._index.d} vectors")
        # A view of Faiss's own mapping: a second one would count every page twice. It must not
        # outlive this object.
        flat = faiss.rev_swig_ptr(self._index.get_xb(), count * dim)
        self.values = flat.reshape(count, dim)
        self.values.flags.writeable = False


class Graph:
    """An HNSW graph on top of a FlatVectors. Approximate. Thread-safe for searches.

    Unavailable: the file is not a whole index over these vectors; it can be built again.
    """

    def __init__(self, path: Path, flat: FlatVectors) -> None:
        self._flat = flat  # the graph points into it: must live at least as long
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:  # what Faiss raises for a file that is cut short or damaged
            raise Unavailable(f"{path} cannot be read as an index: {error}") from error
        if self._index.ntotal != len(flat.values):
            raise Unavailable(f"{path}: {self._index.ntotal} rows, not {len(flat.values)}")
        self._index.storage = flat._index
        self._index.own_fields = False

    def search(
        self,
        query: NDArray[np.float32],
        k: int,
        ef: int,
        allowed: NDArray[np.uint8] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The up to k nearest rows of one query.

        query    (dim,) float32
        ef       beam width, >= k for a good answer
        allowed  packed bitmap over the rows, little bit order; None = all
        Returns  rows (m,) int64 and scores (m,) float32, best first; m may be below k although
                 more rows are allowed (the caller decides what to do then). Euclid is rooted.
        """
        parameters = faiss.SearchParametersHNSW()
        parameters.efSearch = max(ef, k)
        if allowed is not None:
            selector = faiss.IDSelectorBitmap(allowed.size * 8, faiss.swig_ptr(allowed))
            parameters.sel = selector
        scores, rows = self._index.search(query[None, :], k, params=parameters)
        scores, rows = scores[0], rows[0]
        if rows[-1] < 0:
            found = rows >= 0
            scores, rows = scores[found], rows[found]
        if self._flat.distance is Distance.EUCLID:
            scores = np.sqrt(np.maximum(scores, 0.0))
        return rows, scores


def distances(
    query: NDArray[np.float32],
    vectors: NDArray[np.float32],
    distance: Distance,
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Exact scores of one query against all rows, or against the given ones.

    query (dim,), vectors (n, dim) float32 C order, rows (m,) int64. Returns (n,) or (m,) float32.
    Euclid is rooted. Cost about 70 ns a row at 384 dimensions, in the caller's thread.
    """
    dim = vectors.shape[1]
    if distance is Distance.MANHATTAN:
        return _manhattan(query, vectors, rows)
    count = len(vectors) if rows is None else len(rows)
    out = np.empty(count, np.float32)
    if count == 0:
        return out
    # All three must be contiguous: Faiss gets bare pointers.
    query, vectors = np.ascontiguousarray(query), np.ascontiguousarray(vectors)
    if distance is Distance.EUCLID:
        if rows is None:
            faiss.fvec_L2sqr_ny(
                faiss.swig_ptr(out), faiss.swig_ptr(query), faiss.swig_ptr(vectors), dim, count
            )
        else:
            faiss.fvec_L2sqr_by_idx(
                faiss.swig_ptr(out),
                faiss.swig_ptr(query),
                faiss.swig_ptr(vectors),
                faiss.swig_ptr(rows),
                dim,
                1,
                count,
            )
        return np.sqrt(out, out=out)
    if rows is None:
        faiss.fvec_inner_products_ny(
            faiss.swig_ptr(out), faiss.swig_ptr(query), faiss.swig_ptr(vectors), dim, count
        )
    else:
        faiss.fvec_inner_products_by_idx(
            faiss.swig_ptr(out),
            faiss.swig_ptr(query),
            faiss.swig_ptr(vectors),
            faiss.swig_ptr(rows),
            dim,
            1,
            count,
        )
    return out


def _manhattan(
    query: NDArray[np.float32], vectors: NDArray[np.float32], rows: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    count = len(vectors) if rows is None else len(rows)
    out = np.empty(count, np.float32)
    step = max(1, _L1_CHUNK_FLOATS // max(1, vectors.shape[1]))
    for start in range(0, count, step):
        end = min(start + step, count)
        part = vectors[start:end] if rows is None else vectors[rows[start:end]]
        out[start:end] = np.abs(part - query).sum(axis=1)
    return out


def build_graph(
    vectors: NDArray[np.float32],
    distance: Distance,
    m: int,
    ef_construct: int,
    path: Path,
    threads: int,
) -> None:
    """Build an HNSW graph over (n, dim) float32 and write it to `path` without the vectors.

    m: links per row (2 m on the ground layer). ef_construct: beam width while building. Takes a copy
    of the vectors in memory. The caller syncs the file.
    """
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(vectors.shape[1], m, _METRICS[distance])
    index.hnsw.efConstruction = ef_construct
    index.add(np.ascontiguousarray(vectors))
    faiss.write_index(index, str(path), faiss.IO_FLAG_SKIP_STORAGE)
