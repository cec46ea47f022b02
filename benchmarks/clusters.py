"""k-means and assignment of `atoll cluster`, on synthetic features.

    python benchmarks/clusters.py fit --rows 1000000 --dim 1024     # against faiss alone, both from the same shards
    python benchmarks/clusters.py stream --rows 10000000            # memory at 10 % and at 100 % of the rows

fit: the fine stage as `atoll cluster` runs it (draw and read the sample, k-means, count all training images) and faiss
alone (the same sample in memory, faiss.Kmeans with as many rounds and threads, then its index searched for all rows),
in turn, each in its own process; seconds, peak memory, and the mean squared distance of the sample to its centroid.
stream: all rows through the assignment and the writers of 8 clusters and of the router's tenth; a few shards are
created and read repeatedly under other keys.
`fit` needs about 4 bytes of disk per number (4 GB for a million of 1024). The result is a table and a line of JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from atoll.cluster.assign import Assignment
from atoll.cluster.fit import ROWS_PER_CENTROID, _count, _read_sample, kmeans, survey
from atoll.cluster.nearest import Workers, nearest
from atoll.cluster.write import ClustersWriter
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.shards import Shard, Shards, ShardWriter

SHARD = 4096
ROUNDS = 25
CARD = {"feature": {"name": "synthetic"}}


def write_shards(path: Path, rows: int, dim: int) -> None:
    """Features around 2,000 centres, latents of 4 values."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(2000, dim, generator=g)
    with ShardWriter(path, CARD, SHARD) as writer:
        for start in range(0, rows, SHARD):
            n = min(SHARD, rows - start)
            feature = centres[torch.randint(2000, (n,), generator=g)] + torch.randn(n, dim, generator=g)
            keys = [f"{i:09d}" for i in range(start, start + n)]
            columns = {"latent": torch.zeros(n, 1, 2, 2).half(), "feature": feature}
            writer.append(keys, ["a caption of some words"] * n, ["train"] * n, columns)


def fit_atoll(path: Path, fine: int) -> dict[str, float]:
    start = time.perf_counter()
    shards = Shards(path)
    surveyed = survey(shards, 0, ROWS_PER_CENTROID * fine)
    with Workers() as workers:
        sample = _read_sample(shards, surveyed.hashes, 0)
        read = time.perf_counter()
        centroids, _ = kmeans(sample, fine, 0, workers, rounds=ROUNDS)
        fitted = time.perf_counter()
        _count(shards, centroids, workers, lambda *_: None, surveyed.rows)
    end = time.perf_counter()
    error = float(nearest(sample[: 1 << 16], centroids)[1].mean())
    return {"read": read - start, "k-means": fitted - read, "count": end - fitted, "total": end - start, "error": error}


def fit_faiss(path: Path, fine: int) -> dict[str, float]:
    import faiss

    start = time.perf_counter()
    shards = Shards(path)
    surveyed = survey(shards, 0, ROWS_PER_CENTROID * fine)
    sample = _read_sample(shards, surveyed.hashes, 0)
    faiss.omp_set_num_threads(torch.get_num_threads())
    read = time.perf_counter()
    settings = {"niter": ROUNDS, "seed": 0, "min_points_per_centroid": 1, "max_points_per_centroid": len(sample)}
    means = faiss.Kmeans(sample.shape[1], fine, **settings)
    means.train(sample.numpy())
    fitted = time.perf_counter()
    for part in shards.parts():
        means.index.search(F.normalize(part.columns["feature"]).numpy(), 1)
    end = time.perf_counter()
    error = float(nearest(sample[: 1 << 16], torch.from_numpy(means.centroids))[1].mean())
    return {"read": read - start, "k-means": fitted - read, "count": end - fitted, "total": end - start, "error": error}


def fit(rows: int, dim: int, fine: int, repeats: int, folder: str | None) -> dict[str, Any]:
    """Both in turn, each in a fresh process, so that the peaks of memory are their own."""
    runs: dict[str, list[dict[str, float]]] = {"atoll": [], "faiss": []}
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        path = Path(directory) / "encoded"
        write_shards(path, rows, dim)
        for _ in range(repeats):
            for name, results in runs.items():
                command = [sys.executable, __file__, f"one-{name}", "--path", str(path), "--fine", str(fine)]
                results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    columns = ("read", "k-means", "count", "total", "error", "GB")
    print(f"{rows:,} x {dim}, {fine} centroids, {torch.get_num_threads()} threads, median of {repeats}; seconds")
    print(f"{'':8}" + "".join(f"{column:>10}" for column in columns))
    medians = {name: {c: statistics.median(r[c] for r in results) for c in columns} for name, results in runs.items()}
    for name, values in medians.items():
        print(f"{name:8}" + "".join(f"{values[column]:10.4g}" for column in columns))
    ratios = {c: medians["atoll"][c] / medians["faiss"][c] for c in ("k-means", "total")}
    print(f"atoll / faiss: k-means {ratios['k-means']:.2f}, total {ratios['total']:.2f}")
    return {"rows": rows, "dim": dim, "fine": fine, "threads": torch.get_num_threads(), **medians, "ratio": ratios}


def endless(shards: Shards, rows: int) -> Iterator[Shard]:
    """`rows` rows: the shards over and over, under new keys."""
    start = 0
    while start < rows:
        for part in shards.parts():
            if start >= rows:
                return
            keys = [f"{i:09d}" for i in range(start, start + len(part))]
            yield replace(part, start=start, keys=keys)
            start += len(part)


def stream(rows: int, dim: int, fine: int, folder: str | None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    points = F.normalize(torch.randn(fine, dim, generator=g))
    assignment = Assignment("free", 8, 0, points, torch.arange(fine) % 8, points[:8])
    frozen = {"codec": {"name": "pixels"}, "condition": {}, "source": {}}
    card = ClusterShardsCard(clusters=8, assignment="0" * 64, latent_shape=(1, 2, 2), **frozen)
    memory: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        root = Path(directory)
        write_shards(root / "encoded", 32 * SHARD, dim)
        shards, done = Shards(root / "encoded"), 0
        start = time.perf_counter()
        with Workers() as workers, ClustersWriter(root / "clusters", shards, card, 0, 0.1) as output:
            for assigned in workers.map(lambda part: assignment(part, root), endless(shards, rows)):
                output.add(assigned)
                done += len(assigned.part)
                if done >= rows / 10 and "10 %" not in memory:
                    memory["10 %"] = resident()
            memory["100 %"] = resident()
        seconds = time.perf_counter() - start
        memory["peak, with the closing"] = peak()
    print(f"{done:,} x {dim} to {fine} centroids, into 8 clusters: {done / seconds:,.0f} rows/s, {seconds:.0f} s")
    print("GB of memory: " + ", ".join(f"{value:.3f} at {when}" for when, value in memory.items()))
    return {"rows": done, "dim": dim, "fine": fine, "seconds": seconds, "GB": memory}


def resident() -> float:
    """GB of anonymous memory now; pages of mapped files, which the system takes back when it likes, do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e6


def peak() -> float:
    """GB resident at most so far, pages of mapped files among them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fit", "stream", "one-atoll", "one-faiss"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--fine", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tmp", help="a directory with room for the shards")
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "fit":
        print(json.dumps(fit(args.rows, args.dim or 1024, args.fine, args.repeats, args.tmp)))
    elif args.what == "stream":
        print(json.dumps(stream(args.rows, args.dim or 64, args.fine, args.tmp)))
    else:
        one = fit_atoll if args.what == "one-atoll" else fit_faiss
        print(json.dumps({**one(args.path, args.fine), "GB": peak()}))


if __name__ == "__main__":
    main()
