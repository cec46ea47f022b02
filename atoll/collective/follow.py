"""Follow a collective that grew: `atoll collective follow` updates a member's run."""

from dataclasses import dataclass
from pathlib import Path

from atoll.collective.files import digest_of
from atoll.collective.heartbeat import works_of
from atoll.collective.member import changing
from atoll.collective.run_files import known_manifests, read_run
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import load_clusters
from atoll.storage.layout import MANIFEST, RunLayout


@dataclass(frozen=True)
class Followed:
    """A run that follows its collective.

    Attributes:
        before, clusters: numbers of clusters, before and now.
        works: the work items of the new clusters.
    """

    before: int
    clusters: int
    works: tuple[str, ...]


def follow_collective(directory: Path) -> Followed:
    """Bring atoll.yaml and the clustering of a member's run up to date.

    Shards, trainings and experts stay as they are: an expert of older clusters is published as ever, and what its
    clusters are now follows from the lineage.

    Args:
        directory: the member's.

    Raises:
        AtollError: the clusters did not grow from those here, an atoll.yaml that was changed here, or the store fails.
            The same command continues.
    """
    with changing(directory, "following the collective") as member:
        store, layout = member.open(), RunLayout(directory)
        collective = member.read(store)
        run = read_run(store, collective)
        # What must hold before anything is written.
        before = load_clusters(layout.clusters_card).descent
        if before.continues(run.lineage) and before != run.lineage:
            raise AtollError(f"{layout.clusters}: is ahead of the collective; `atoll collective grow URL` publishes it")
        if not run.lineage.continues(before):
            raise AtollError(
                f"{layout.clusters}: the collective's clusters did not grow from these; join in another directory"
            )
        if layout.manifest.is_file() and digest_of(layout.manifest).sha256 not in known_manifests(collective):
            raise AtollError(
                f"{layout.manifest}: was changed here; move it away, follow again, and repeat your changes in the new "
                "one: add experts after all others"
            )
        known = load_manifest(directory).clusters.k if layout.manifest.is_file() else before.k
        manifest = run.manifest
        # The manifest comes last: until it is there, the directory still says that it has to follow.
        run.fetch(run.clustering(), directory)
        run.fetch([MANIFEST], directory)
    works = tuple(work for work in works_of(manifest) if int(work.split(".")[0]) >= known)
    return Followed(known, manifest.clusters.k, works)
