"""A model that grows, on a finished run: the router extended, trained anew, and left as it is.

    atoll demo runs/demo
    python benchmarks/grow.py runs/demo [--split 1] [--seed 0] [--out grow.json]

- new: the last cluster of the run joins a model that was founded on the others. Its assignment is the run's own without
  that cluster's fine centroids, so the run's experts serve the founders and the newcomer; no expert is trained.
- split: one cluster of the run is split in two. Its old expert serves both parts.

Each measures on held-out latents of all clusters, by noise level: the router's cross entropy in nats and its accuracy,
with captions; and the mean squared error of the fused velocity (top-2). The cross entropy is also shown in two parts
that add up: which side of the growth (the new cluster or an old one; for a split the part, given its parent), and which
of the old clusters. An extension cannot change the second part.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor

from atoll.assemble import assemble
from atoll.cluster import Assignment, add_cluster, load_assignment, split_cluster
from atoll.cluster.nearest import Workers
from atoll.cluster.run import finish, island_card
from atoll.cluster.write import ClustersWriter
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import STRANGER
from atoll.ensemble.loading import load_ensemble
from atoll.manifest import Manifest, load_manifest
from atoll.schedule import PATH
from atoll.storage.artifact import load_card, read_card, read_tensors, save_artifact
from atoll.storage.cards import ClusteringCard, ClustersCard, EncodedCard, ExpertCard
from atoll.storage.layout import RunLayout, cluster_path
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.extend_router import extend_router
from atoll.train.router import train_router

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISES = 4  # noises per held-out latent and level


def copy_rows(source: Shards, keys: set[str], out: Path) -> Path:
    """Write the rows with these keys as encoded shards of their own."""
    with ShardWriter(out, source.card(EncodedCard)) as writer:
        for part in source.parts():
            rows = torch.tensor([row for row, key in enumerate(part.keys) if key in keys], dtype=torch.int64)
            text = [[column[row] for row in rows.tolist()] for column in (part.keys, part.captions, part.splits)]
            writer.append(*text, {name: column[rows] for name, column in part.columns.items()})
    return out


def found_without_last(run: Path, out: Path) -> Path:
    """Write a run with the clusters of `run` but the last one; return that one's images, as encoded data."""
    old, new = RunLayout(run), RunLayout(out)
    card = load_card(old.clusters_card, ClustersCard)
    assignment, last = load_assignment(old.clusters, card), card.k - 1
    assert assignment.fine is not None
    assert assignment.coarse_of_fine is not None
    assert assignment.coarse is not None
    source, newcomers = Shards(old.encoded), set(Shards(old.cluster(last)).keys)
    founders = Shards(copy_rows(source, set(source.keys) - newcomers, new.encoded))
    # The same function without the last cluster's fine centroids.
    mine = assignment.coarse_of_fine < last
    founding = Assignment(
        card.method, last, card.seed, assignment.fine[mine], assignment.coarse_of_fine[mine], assignment.coarse[:last]
    )
    values = {key: value for key, value in card.plain().items() if key in ClusteringCard.model_fields}
    changes = {"k": last, "assignment": founding.sha256(card.feature), "encoded": [founders.sha256]}
    clustering = ClusteringCard(**{**values, **changes})
    new.clusters.mkdir()
    with Workers() as workers:
        with ClustersWriter(new.clusters, founders, island_card(clustering, founders), card.seed) as output:
            for part in founders.parts():
                output.add(founding(part, new.encoded))
        quiet = lambda done, rows, note: None  # noqa: E731
        finish(new.clusters, clustering, founding, output, workers=workers, tell=quiet, cut=None, trust=STRANGER)
    return copy_rows(source, newcomers, out / "new")


def adopt_expert(source: Path, out: Path, k: int, assignment: str, cluster: int) -> None:
    """Copy an expert as one of another assignment; its cluster holds the same images there."""
    card = read_card(source, ExpertCard)
    tensors = {name: value.clone() for name, value in read_tensors(source, card).items()}
    save_artifact(out, card.model_copy(update={"k": k, "assignment": assignment, "clusters": (cluster,)}), tensors)


def write_manifest(run: Path, out: Path, k: int, seed: int) -> Manifest:
    """The run's atoll.yaml with k clusters and the experts of those that exist in both."""
    settings = yaml.safe_load((run / "atoll.yaml").read_text())
    settings["clusters"]["k"], settings["seed"] = k, seed
    settings["experts"] = [expert for expert in settings["experts"] if expert["cluster"] < k]
    (out / "atoll.yaml").write_text(yaml.safe_dump(settings))
    return load_manifest(out)


@torch.inference_mode()
def measure(ensemble_path: Path, clusters: Path, k: int, parent: int | None) -> dict[str, dict[str, float]]:
    """Router and fused velocity on held-out latents; a router that lacks the newest cluster has no cross entropy."""
    loaded = load_ensemble(ensemble_path, routing="top-2")
    router, newest = loaded.ensemble.router, k - 1
    assert router is not None
    shards = [Shards(cluster_path(clusters, number)) for number in range(k)]
    rows = [part.rows("val") for part in shards]
    x0 = torch.cat([part.read("latent", own).float() for part, own in zip(shards, rows, strict=True)])
    captions = [text for part, own in zip(shards, rows, strict=True) for text in part.captions_of(own)]
    labels = torch.cat([torch.full((len(own),), number) for number, own in enumerate(rows)])
    condition = build_encoder(shards[0].data_card.condition)(captions)
    results = {}
    for level, t in enumerate(LEVELS):
        sums = torch.zeros(5, dtype=torch.float64)
        for noise in range(NOISES):
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1000 * level + noise))
            times = torch.full((len(x0),), t)
            x = PATH.diffuse(x0, eps, times)
            log_p = router(x, times, condition.pooled)
            error = (loaded.ensemble.velocity(x, times, condition) - (eps - x0)).square().mean()
            sums += torch.tensor([*_scores(log_p, labels, newest, parent), float(error)], dtype=torch.float64)
        names = ("cross entropy", "of the growth", "of the old", "accuracy", "velocity error")
        results[f"{t}"] = dict(zip(names, (sums / NOISES).tolist(), strict=True))
    results["mean"] = {name: sum(one[name] for one in results.values()) / len(LEVELS) for name in names}
    return results


def _scores(log_p: Tensor, labels: Tensor, newest: int, parent: int | None) -> list[float]:
    """Cross entropy, its two parts, and accuracy."""
    accuracy = float((log_p.argmax(1) == labels).float().mean())
    if log_p.shape[1] <= newest:
        return [float("nan")] * 3 + [accuracy]
    total = -log_p.gather(1, labels[:, None])[:, 0]
    # What an extension leaves unchanged: the old clusters among each other.
    if parent is None:
        merged, old_labels = log_p[:, :newest], labels
        old = torch.logsumexp(merged, 1) - merged.gather(1, old_labels.clamp(max=newest - 1)[:, None])[:, 0]
        old = old * (labels < newest)
    else:
        merged = torch.cat([log_p[:, :newest]], 1).clone()
        merged[:, parent] = torch.logaddexp(log_p[:, parent], log_p[:, newest])
        old = -merged.gather(1, labels.where(labels < newest, parent)[:, None])[:, 0]
    return [float(total.mean()), float((total - old).mean()), float(old.mean()), accuracy]


def three_ways(run: Path, manifest: Manifest, experts: list[Path], old_router: Path, parent: int | None) -> dict:
    """The router extended, trained anew, and as it was, each with the same experts where they fit."""
    layout, k = RunLayout(run), manifest.clusters.k
    results, seconds = {}, {}
    shutil.copytree(old_router, layout.router)
    start = time.monotonic()
    extend_router(run, manifest)
    seconds["extended"] = time.monotonic() - start
    assemble(experts, layout.router, run / "extended")
    results["extended"] = measure(run / "extended", layout.clusters, k, parent)
    shutil.move(layout.router, run / "router-extended")
    start = time.monotonic()
    train_router(run, manifest, restart=True)
    seconds["anew"] = time.monotonic() - start
    assemble(experts, layout.router, run / "anew")
    results["anew"] = measure(run / "anew", layout.clusters, k, parent)
    shutil.move(layout.router, run / "router-anew")
    fitting = [path for path in experts if read_card(path, ExpertCard).k < k]
    assemble(fitting, old_router, run / "before")
    results["not extended"] = measure(run / "before", layout.clusters, k, parent)
    return {"results": results, "seconds": seconds}


def grow_by_last(run: Path, out: Path, seed: int) -> dict:
    """Found on all clusters but the last, then add it."""
    out.mkdir()
    new = found_without_last(run, out)
    layout, source = RunLayout(out), RunLayout(run)
    founding = load_card(layout.clusters_card, ClustersCard)
    # The founders' router, before anybody knows of the new data.
    start = time.monotonic()
    train_router(out, write_manifest(run, out, founding.k, seed))
    print(f"founding router: {time.monotonic() - start:.0f} s", flush=True)
    shutil.move(layout.router, out / "router-before")
    add_cluster(layout.clusters, new)
    grown, manifest = load_card(layout.clusters_card, ClustersCard), write_manifest(run, out, founding.k + 1, seed)
    experts = []
    for path in sorted(source.experts.glob("[0-9]*")):
        (cluster,) = read_card(path, ExpertCard).clusters
        clustering = founding if cluster < founding.k else grown
        adopt_expert(path, layout.expert(path.name), clustering.k, clustering.assignment, cluster)
        experts.append(layout.expert(path.name))
    return three_ways(out, manifest, experts, out / "router-before", None)


def grow_by_split(run: Path, out: Path, number: int, seed: int) -> dict:
    """Split a cluster of the run."""
    for name in ("encoded", "clusters", "experts"):
        shutil.copytree(run / name, out / name)
    layout = RunLayout(out)
    print(split_cluster(layout.clusters, number, [layout.encoded]), flush=True)
    manifest = write_manifest(run, out, load_card(layout.clusters_card, ClustersCard).k, seed)
    shutil.copytree(run / "router", out / "router-before")
    return three_ways(out, manifest, sorted(layout.experts.glob("[0-9]*")), out / "router-before", number)


def show(title: str, measured: dict) -> None:
    """Print one table: a row per router and measure."""
    print(f"\n{title}; seconds: {', '.join(f'{k} {v:.0f}' for k, v in measured['seconds'].items())}\n")
    levels = [*map(str, LEVELS), "mean"]
    print(f"| measure | router | {' | '.join(f't = {level}' if level != 'mean' else 'mean' for level in levels)} |")
    print(f"|---|---|{'---|' * len(levels)}")
    for measure_name in ("cross entropy", "of the growth", "of the old", "accuracy", "velocity error"):
        for router, rows in measured["results"].items():
            values = [rows[level][measure_name] for level in levels]
            if not any(value != value for value in values):
                print(f"| {measure_name} | {router} | {' | '.join(f'{value:.3f}' for value in values)} |")


def main() -> None:
    """Measure both kinds of growth and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, such as that of `atoll demo`")
    parser.add_argument("--split", type=int, default=1, help="the cluster to split")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' trainings")
    parser.add_argument("--out", type=Path, help="write the numbers to this .json file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = {"new": grow_by_last(options.run, Path(directory) / "new", options.seed)}
        show("A new cluster", results["new"])
        results["split"] = grow_by_split(options.run, Path(directory) / "split", options.split, options.seed)
        show(f"Cluster {options.split} split in two", results["split"])
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
