"""Let a collective grow: `atoll collective grow` publishes a cluster that the founder's run has more."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.collective.charter import check_founders, publish_charter, read_collective
from atoll.collective.files import (
    FileProgress,
    digests_of,
    files_prefix,
    list_of,
    parse_published,
    upload_files,
    write_list,
)
from atoll.collective.keys import Key
from atoll.collective.member import changing
from atoll.collective.open import run_files
from atoll.collective.run_files import PublishedRun, read_run
from atoll.collective.statements import Charter, FileDigest, FoundedRun, Position
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import load_clusters
from atoll.storage.cards import FORMAT, Lineage
from atoll.storage.layout import CLUSTERS, COMMON, MANIFEST, ROUTER, RunLayout, cluster_name

# What trainings read of atoll.yaml, besides the experts.
_SHARED = ("seed", "codec", "condition", "feature", "network", "train")


@dataclass(frozen=True)
class Growth:
    """A growth that was published.

    Attributes:
        charter: its version.
        before, clusters: numbers of clusters, before and now.
        uploaded, files: the files that were not in the store, and all of the run.
    """

    charter: int
    before: int
    clusters: int
    uploaded: int
    files: int


def grow_collective(directory: Path, *, more_keys: Sequence[Path] = (), progress: FileProgress | None = None) -> Growth:
    """Publish the next charter, with the clusters that the founder's run has more.

    Files that an older list names are not uploaded again. The run's router is not part of it: a router enters the
    model by the index.

    Args:
        directory: a founder's run, after `atoll cluster --new-cluster` or `--split`.
        more_keys: files of further founders' keys, where several must sign.
        progress: called before each file that is uploaded.

    Raises:
        AtollError: not enough founders, nothing new, clusters that did not grow from the charter's, other changes that
            would disturb a training, or the store fails. Without the charter nobody sees what was uploaded, and the
            same command continues.
    """
    with changing(directory, "growing the collective") as member:
        store, keys = member.open(), [member.key(), *(Key.load(file) for file in more_keys)]
        collective = member.read(store)
        old = collective.charter
        # Everything that can be wrong, before the store sees anything.
        check_founders(old, keys)
        manifest, published = load_manifest(directory), read_run(store, collective)
        parse_published(RunLayout(directory).manifest.read_bytes(), str(RunLayout(directory).manifest))
        lineage = _grown(directory, manifest, published)
        _check_manifest(manifest, published)
        names = run_files(directory, manifest, router=False, common=not published.common())
        files = digests_of(directory, names)
        _check_untouched(directory, lineage, published, files)
        # The founders' router and the common model stay as they were, since trainings are under way.
        stay = (f"{ROUTER}/", f"{COMMON}/")
        files |= {name: one for name, one in published.files.items() if name.startswith(stay)}
        # Files first, then their list, then the charter.
        digest, data = list_of(files)
        new = {name: one for name, one in files.items() if published.files.get(name) != one}
        upload_files(store, files_prefix(digest), directory, new, progress)
        write_list(store, digest, data)
        values = old.model_dump() | {
            "version": collective.position.version + 1,
            "founded": FoundedRun(manifest=files[MANIFEST].sha256, encoded_format=FORMAT, clusters=lineage.k),
            "files": digest,
            "previous": collective.position.sha256,
        }
        charter = Charter.model_validate(values)
        sha256 = publish_charter(store, charter, keys, collective.identity)
        member.update(charter=Position(version=charter.version, sha256=sha256))
        # Read it as all others will.
        read_collective(store, collective.identity, member.record.charter)
    return Growth(charter.version, published.lineage.k, lineage.k, len(new), len(files))


def _grown(directory: Path, manifest: Manifest, published: PublishedRun) -> Lineage:
    """The lineage of the run's clusters. Raises AtollError unless they grew from the collective's."""
    lineage, old = load_clusters(RunLayout(directory).clusters_card).descent, published.lineage
    where = RunLayout(directory).clusters
    if lineage.assignment == old.assignment:
        raise AtollError(
            f"{where}: has the collective's {old.k} clusters; grow them with `atoll cluster --new-cluster` or `--split`"
        )
    if not lineage.continues(old):
        raise AtollError(
            f"{where}: is of another clustering, which did not grow from the collective's; take the run that the "
            "collective was opened on, and `atoll cluster --new-cluster` or `--split`"
        )
    if manifest.clusters.k != lineage.k:
        raise AtollError(
            f"{RunLayout(directory).manifest}: clusters.k is {manifest.clusters.k}, {where} has {lineage.k}; set it"
        )
    return lineage


def _check_manifest(manifest: Manifest, published: PublishedRun) -> None:
    """Raise AtollError unless trainings that are under way go on with the new atoll.yaml as with the old one."""
    before = published.manifest
    for name in _SHARED:
        if getattr(manifest, name) != getattr(before, name):
            raise AtollError(
                f"{MANIFEST}: {name} differs from the collective's; growth changes clusters.k and adds experts, since "
                "trainings that are under way could not go on"
            )
    # Seeds follow the position of an expert.
    if manifest.experts[: len(before.experts)] != before.experts:
        raise AtollError(f"{MANIFEST}: the collective's experts must stay as they are; add new ones after them")
    covered = {expert.cluster for expert in manifest.experts}
    for number in range(before.clusters.k, manifest.clusters.k):
        if number not in covered:
            raise AtollError(f"{MANIFEST}: names no expert of cluster {number}; add one, so that it can be claimed")


def _check_untouched(directory: Path, lineage: Lineage, published: PublishedRun, files: dict[str, FileDigest]) -> None:
    """Raise AtollError if the shards of a cluster that no step concerns are not the collective's."""
    old = published.lineage
    for number in range(old.k):
        if lineage.now(old.assignment, (number,)) != (number,):
            continue
        prefix = f"{CLUSTERS}/{cluster_name(number)}/"
        mine, theirs = (
            {name: one for name, one in some.items() if name.startswith(prefix)} for some in (files, published.files)
        )
        if mine != theirs:
            raise AtollError(
                f"{RunLayout(directory).cluster(number)}: differs from what the collective trains on; growth leaves "
                "other clusters as they are"
            )
