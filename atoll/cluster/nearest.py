"""Features at unit length and their nearest centroids, in parallel, with the same bits for any number of threads.

A sum by several threads differs in the last bit with their number (faiss's and MKL's do), and a tie between centroids
depends on that bit. Here each thread computes whole blocks of rows, and the blocks do not depend on the number of
threads. Processors may still differ: another kind may round otherwise, and a feature midway between two centroids may
change sides.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.shards import Shard

BLOCK = 1024  # rows whose distances to all centroids are in memory at a time, per thread

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """As many threads as torch has (OMP_NUM_THREADS sets it); torch itself uses one in each until they are closed."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        # The parallelism is across blocks: torch's own threads would compete with it.
        self._pool = ThreadPoolExecutor(self.count)
        torch.set_num_threads(1)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield the function's results in the order of the items; at most two items per thread are taken ahead."""
        # A queue of bounded length: items are shards, which may be large.
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(function, item))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # After an error or an early stop, no new item is started.
            for future in waiting:
                future.cancel()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        # Later code gets its threads back.
        self._pool.shutdown()
        torch.set_num_threads(self.count)


def unit_features(part: Shard, rows: Tensor, path: Path) -> Tensor:
    """Read features and scale them to unit length.

    Args:
        part: a shard with a column "feature".
        rows: its rows, [n] int64.
        path: the directory of the shards, for the error.

    Returns:
        [n, D] float32; a zero vector stays zero.

    Raises:
        AtollError: a feature is not finite, or its length is not.
    """
    features = part.columns["feature"][rows].float()
    length = features.norm(dim=1, keepdim=True)
    if not length.isfinite().all():
        # Name the first bad image: the user must find it among millions.
        key = part.keys[int(rows[int((~length.isfinite()).nonzero()[0, 0])])]
        raise AtollError(f"{path}: the feature of image {key!r} is not finite; leave it out, or take another feature")
    # The clamp leaves a zero vector at zero.
    return features.div_(length.clamp(min=1e-12))


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of each point, the first of several at the same distance.

    Args:
        points: [n, D].
        centroids: [K, D].

    Returns:
        (number [n] int64, squared distance [n]).
    """
    # |p - c|^2 = |p|^2 - 2 p c + |c|^2, block by block; |p|^2 does not change which is nearest.
    offset, transposed = centroids.square().sum(1), centroids.T.contiguous()
    minima = [torch.addmm(offset, block, transposed, alpha=-2).min(1) for block in points.split(BLOCK)]
    # Add |p|^2 at the end; rounding may make a distance slightly negative.
    numbers = torch.cat([block.indices for block in minima])
    return numbers, (torch.cat([block.values for block in minima]) + points.square().sum(1)).clamp(min=0)
