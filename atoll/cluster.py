"""Features -> clusters/: K disjoint parts of the data, each in a directory that its island can work from alone.

    clusters.json          the card: k, method, seed, counts, the hash of the assignment, what it was made from
    centroids.safetensors  fine [F,D], coarse [K,D], and the coarse cluster of every fine centroid [F]
    assignment.parquet     key, cluster, split: one line per image, in the order of encoded/
    cluster-000/ ...       shards of this cluster's latents and captions

k-means runs in two stages (DDM, arXiv 2501.05450, section 3.2): many fine centroids over the features, then K coarse
ones over the fine. An image belongs to the coarse cluster of its nearest fine centroid.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.artifact import FORMAT, check_card, read_json, whole_directory, write_bytes, write_json
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.shards import Shards, ShardWriter, refuse_foreign

Method = Literal["balanced", "free", "random"]
CLUSTERS = "clusters.json"

# "balanced": no cluster holds more training images than LARGEST times the mean, nor (but for rounding to whole fine
# centroids) fewer than SMALLEST times the mean.
SMALLEST, LARGEST = 0.75, 1.25
_CHUNK = 8192  # rows whose features are in memory at a time
_FIT_ROWS = 256  # training images per fine centroid that the fine stage looks at, at most


def cluster_run(run: Path, manifest: Manifest, force: bool = False) -> str:
    """Clusters `run`/encoded into `run`/clusters as the manifest asks, and says in a line what was done.

    Raises:
        AtollError: as `cluster`.
    """
    asked, out = manifest.clusters, run / "clusters"
    written = cluster(run / "encoded", out, asked.k, asked.method, asked.fine, manifest.seed, force)
    counts = ", ".join(f"{c['train'] + c['val']:,}" for c in read_json(out / CLUSTERS)["counts"])
    return f"{out} {'written' if written else 'is there already'}: {asked.k} clusters of {counts} images"


def cluster(
    encoded: Path,
    out: Path,
    k: int,
    method: Method = "balanced",
    fine: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> bool:
    """Clusters the features of `encoded` and writes `out`; held-out images are assigned too, but have no say.

    The same input gives the same bytes. Clusters are numbered by the first image of each.

    Args:
        method: "balanced": no cluster above 1.25 times the mean, and none far below 0.75 times. "free": plain k-means.
            "random": equal parts that mean nothing, the baseline.
        fine: fine centroids; None for 1024, or half the training images if they are few, but at least 16 k.
        force: replace an earlier clustering.

    Returns:
        Whether something was written; not if this very clustering is there.

    Raises:
        AtollError: k < 1, k above the number of training images or of fine centroids, NaN features, an empty cluster,
            no balance possible, or `out` holds another clustering or anything else.
    """
    shards = Shards(encoded)
    if "feature" not in shards.columns:
        raise AtollError(f"{encoded} has no column 'feature'; name the directory that `atoll encode` wrote")
    rows = len(shards.rows("train"))
    if not 1 <= k <= rows:
        raise AtollError(f"k is {k}, and {encoded} holds {rows} training images; choose k from 1 to {rows}")
    if fine is None:
        fine = min(rows, max(16 * k, min(1024, rows // 2)))
    if not k <= fine <= rows:
        raise AtollError(f"{fine} fine centroids; expected at least k = {k} and at most the {rows} training images")
    asked = {"k": k, "method": method, "fine": fine if method != "random" else None, "seed": seed}
    made_from = {"encoded": shards.sha256, "feature": shards.card["feature"]}
    if not force and _is_there(out, {**asked, **made_from}):
        return False
    refuse_foreign(out, CLUSTERS)

    if method == "random":
        labels, centroids = _at_random(shards, k, seed)
    else:
        with _one_thread():
            labels, centroids = _two_stages(shards, k, method, fine, seed)
    counts = [{s: int((labels[shards.rows(s)] == c).sum()) for s in ("train", "val")} for c in range(k)]
    if not all(count["train"] for count in counts):
        empty = next(c for c, count in enumerate(counts) if not count["train"])
        raise AtollError(f"cluster {empty} of {k} got no training image; lower clusters.k, or raise clusters.fine")
    card = {
        "format": FORMAT,
        "kind": "clusters",
        **asked,
        **made_from,
        "counts": counts,
        "largest_over_mean": round(max(count["train"] for count in counts) * k / rows, 4),
        "assignment": assignment_hash(shards.keys, labels),
    }
    _write(out, shards, labels, centroids, card)
    return True


def assignment_hash(keys: list[str], labels: Tensor) -> str:
    """The sha256 of the sorted (key, cluster) pairs: what experts and router of one ensemble must share.

    keys: of all images. labels: [n] int64, their clusters.
    """
    pairs = sorted(zip(keys, labels.tolist(), strict=True))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _is_there(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` is this very clustering. Raises AtollError if it is another."""
    if not (out / CLUSTERS).is_file():
        return False
    found = check_card(read_json(out / CLUSTERS), "clusters", out / CLUSTERS)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise AtollError(
                f"{out}: was made with {key} {found.get(key)}, asked for is {value}; "
                "replace it with --force, or name another run"
            )
    return True


def _at_random(shards: Shards, k: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels [n] int64 that deal each split out in equal parts, and no centroids."""
    labels = torch.empty(len(shards), dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    for split in ("train", "val"):
        rows = shards.rows(split)
        labels[rows[torch.randperm(len(rows), generator=generator)]] = torch.arange(len(rows)) % k
    return _by_first_image(labels, k)[labels], {}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums by several threads differ in the last bit with their number, and a tie between clusters hangs on that."""
    import faiss

    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        faiss.omp_set_num_threads(before[1])


def _two_stages(shards: Shards, k: int, method: Method, fine_count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels [n] int64 of all images, and the centroids."""
    train, val = shards.rows("train"), shards.rows("val")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    looked_at = train[order[: _FIT_ROWS * fine_count].sort().values]
    fine = _kmeans(_features(shards, looked_at), fine_count, seed)

    nearest = torch.empty(len(shards), dtype=torch.int64)
    nearest[train] = _nearest_fine(shards, train, fine)
    # A centroid without a training image has no weight in the second stage, so it may not attract held-out images.
    used, nearest[train] = nearest[train].unique(return_inverse=True)
    fine = fine[used]
    nearest[val] = _nearest_fine(shards, val, fine)
    weights = nearest[train].bincount(minlength=len(fine)).double()  # [F]
    if len(fine) < k:
        raise AtollError(
            f"{len(fine)} distinct features among {len(train)} training images; choose k up to {len(fine)}"
        )

    coarse_of = _nearest(fine, _kmeans(fine, k, seed, weights))
    if method == "balanced":
        coarse_of = _balanced(fine, weights, coarse_of, k)
    labels = coarse_of[nearest]
    renumber = _by_first_image(labels, k)
    coarse_of = renumber[coarse_of]
    coarse = _means(fine, weights, coarse_of, k)
    return renumber[labels], {"fine": fine, "coarse": coarse.float(), "coarse_of_fine": coarse_of}


def _features(shards: Shards, rows: Tensor) -> Tensor:
    """Features [n,D] at unit length. Raises AtollError if one is not finite."""
    features = shards.read("feature", rows)
    bad = ~features.isfinite().all(1)
    if bad.any():
        key = shards.keys[int(rows[bad.nonzero()[0]])]
        raise AtollError(f"{shards.path}: the feature of image {key!r} is not finite; encode again")
    return F.normalize(features)


def _nearest_fine(shards: Shards, rows: Tensor, fine: Tensor) -> Tensor:
    """The nearest centroid [n] int64 of each row, read chunk by chunk."""
    chunks = [_nearest(_features(shards, chunk), fine) for chunk in rows.split(_CHUNK)]
    return torch.cat(chunks)


def _nearest(features: Tensor, centroids: Tensor) -> Tensor:
    """The number of the centroid [K,D] nearest to each feature [n,D]."""
    return (centroids.square().sum(1) - 2 * features @ centroids.T).argmin(1)


def _kmeans(points: Tensor, k: int, seed: int, weights: Tensor | None = None) -> Tensor:
    """Lloyd's algorithm by faiss: centroids [k,D] float32 of points [n,D] that may have weights [n]."""
    import faiss

    # The few points of the second stage allow for trying several starts; the best is taken.
    means = faiss.Kmeans(
        points.shape[1],
        k,
        niter=25 if weights is None else 50,
        nredo=1 if weights is None else 10,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    means.train(points.numpy(), None if weights is None else weights.float().numpy())
    return torch.as_tensor(means.centroids).clone()


def _means(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """The weighted mean [k,D] float64 of the points of each label; zero where there are none."""
    members = F.one_hot(labels, k).double() * weights.unsqueeze(1)  # [n,k]
    return (members.T @ points.double()) / members.sum(0).clamp(min=1).unsqueeze(1)


def _balanced(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """Labels [n] of a k-means whose clusters weigh SMALLEST to LARGEST times the mean.

    Alternates between the means and the cheapest assignment within the bounds, as Lloyd's algorithm does without any.
    Raises AtollError if single points weigh too much for that.
    """
    mean = float(weights.sum()) / k
    for _ in range(50):
        distances = torch.cdist(points.double(), _means(points, weights, labels, k)).square()  # [n,k]
        before, labels = labels, _transport(distances, weights, SMALLEST * mean, LARGEST * mean)
        if torch.equal(labels, before):
            break
    heaviest = float(labels.bincount(weights, minlength=k).max())
    if heaviest > LARGEST * mean:
        raise AtollError(
            f"no balance: a cluster would hold {heaviest:.0f} images where the mean is {mean:.1f}; one fine centroid "
            f"has {float(weights.max()):.0f}; raise clusters.fine, or take clusters.method: free"
        )
    return labels


def _transport(distances: Tensor, weights: Tensor, least: float, most: float) -> Tensor:
    """The cheapest labels [n] for points of distances [n,k] and weights [n] where a label weighs `least` to `most`.

    The linear program may split a few points, at most 2 k, over several labels. These go, the heaviest first, where
    they are cheapest: among the labels that still lack weight if there are any, else among those that still have room.
    Room is left for each if no point weighs more than a quarter of the mean.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    n, k = distances.shape
    weight_of_label = kron(csr_array(weights.numpy().reshape(1, n)), eye_array(k))  # [k, n k]
    solved = linprog(
        (distances * weights.unsqueeze(1)).flatten().numpy(),
        A_ub=vstack([weight_of_label, -weight_of_label]),
        b_ub=np.repeat([most, -least], k),
        A_eq=kron(eye_array(n), np.ones((1, k))),  # each point has one label
        b_eq=np.ones(n),
        method="highs-ds",
    )
    share = torch.from_numpy(solved.x).reshape(n, k)
    labels = share.argmax(1)
    split = share.amax(1) < 1 - 1e-6
    held = labels[~split].bincount(weights[~split], minlength=k)  # [k]
    for point in sorted(split.nonzero().flatten().tolist(), key=lambda i: (-float(weights[i]), i)):
        fits = held + weights[point] <= most
        lacks = fits & (held < least)
        cost = distances[point].where(lacks if lacks.any() else fits, torch.inf) if fits.any() else held
        labels[point] = cost.argmin()
        held[labels[point]] += weights[point]
    return labels


def _by_first_image(labels: Tensor, k: int) -> Tensor:
    """New numbers [k] for the labels, in the order of their first appearance."""
    first = torch.full((k,), len(labels)).scatter_reduce(0, labels, torch.arange(len(labels)), "amin")
    return first.argsort(stable=True).argsort()


def _write(out: Path, shards: Shards, labels: Tensor, centroids: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Everything below `out`, as a whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.torch import save

    with whole_directory(out) as directory:
        sink = pa.BufferOutputStream()
        clusters = pa.array(labels.tolist(), pa.int32())
        pq.write_table(pa.table({"key": shards.keys, "cluster": clusters, "split": shards.splits}), sink)
        write_bytes(directory / "assignment.parquet", sink.getvalue().to_pybytes())
        write_bytes(directory / "centroids.safetensors", save(centroids))
        for number in range(card["k"]):
            island = {
                "cluster": number,
                "clusters": card["k"],
                "assignment": card["assignment"],
                "latent_shape": list(shards.shape("latent")),
                **{key: shards.card[key] for key in ("codec", "condition", "source")},
            }
            with ShardWriter(directory / f"cluster-{number:03d}", island) as writer:
                for rows in (labels == number).nonzero().flatten().split(4096):
                    chosen = rows.tolist()
                    writer.append(
                        [shards.keys[i] for i in chosen],
                        [shards.captions[i] for i in chosen],
                        [shards.splits[i] for i in chosen],
                        {"latent": shards.read("latent", rows)},
                    )
        write_json(directory / CLUSTERS, card)
