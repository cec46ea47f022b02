"""The run's files as the latest charter lists them, and where each of them lies.

When a collective grows, the next charter names another list. Files that an older list names too are not uploaded again:
they lie below the first list that names them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.files import (
    MANIFEST_BYTES,
    FileProgress,
    digest_of,
    fetch_files,
    files_prefix,
    parse_published,
    read_list,
)
from atoll.collective.index import VerifiedIndex
from atoll.collective.routers import read_router_card
from atoll.collective.statements import FileDigest
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.storage.artifact import load_card, parse_json
from atoll.storage.bounds import CARD_BYTES
from atoll.storage.cards import Lineage, RouterCard, ShardsIndex, clusters_kind, parse_card
from atoll.storage.layout import CARD, CLUSTERS, CLUSTERS_CARD, COMMON, MANIFEST, ROUTER, cluster_name
from atoll.storage.shards import INDEX

_CLUSTERING = f"{CLUSTERS}/{CLUSTERS_CARD}"


@dataclass(frozen=True)
class PublishedRun:
    """The files of one charter's list.

    Attributes:
        store: the collective's.
        collective: its verified charters.
        version: of the charter.
        files: paths with size and hash.
        places: the prefix in the store of each path.
    """

    store: Store
    collective: Collective
    version: int
    files: dict[str, FileDigest]
    places: dict[str, str]

    @cached_property
    def manifest(self) -> Manifest:
        """The run's atoll.yaml. Raises AtollError unless it is the one that the charter names."""
        return parse_published(self.manifest_bytes, f"{self.store.url}: {MANIFEST}")

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The content of atoll.yaml, checked by its hash."""
        digest = self.files.get(MANIFEST)
        if digest is None or digest.sha256 != self.collective.history[self.version - 1].founded.manifest:
            raise AtollError(
                f"{self.store.url}: its list of files lacks the manifest that the charter names; ask the founder"
            )
        return self.read(MANIFEST, MANIFEST_BYTES)

    @cached_property
    def lineage(self) -> Lineage:
        """The assignment to clusters, with the older ones that it grew from."""
        where = f"{self.store.url}: {_CLUSTERING}"
        content = parse_json(self.read(_CLUSTERING, CARD_BYTES), where)
        card = parse_card(clusters_kind(content), content, where)
        lineage = card.descent
        if lineage.k != (k := self.collective.history[self.version - 1].founded.clusters):
            raise AtollError(f"{where}: is of {lineage.k} clusters, the charter names {k}; ask the founder")
        return lineage

    def clustering(self) -> list[str]:
        """List the paths of the clustering: what lies directly in clusters/."""
        return [name for name in self.files if name.startswith(f"{CLUSTERS}/") and name.count("/") == 1]

    def cluster(self, number: int) -> list[str]:
        """List the paths of one cluster's shards. Raises AtollError if there is none."""
        prefix = f"{CLUSTERS}/{cluster_name(number)}/"
        names = [name for name in self.files if name.startswith(prefix)]
        if not names:
            raise AtollError(f"{self.store.url}: its list of files has no shards of cluster {number}; ask the founder")
        return names

    def common(self) -> list[str]:
        """List the paths of the common model; none if no expert starts from it."""
        return [name for name in self.files if name.startswith(f"{COMMON}/")]

    def fetch(self, names: Sequence[str], directory: Path, progress: FileProgress | None = None) -> None:
        """Download files, each checked and atomic; those that are there already are kept."""
        fetch_files(self.store, self.places, {name: self.files[name] for name in names}, directory, progress)

    def read(self, name: str, most: int) -> bytes:
        """Read a small file, and check its hash. Raises AtollError if it is missing, larger than `most` or changed."""
        digest, place = self.files.get(name), f"{self.places.get(name, '')}/{name}"
        if digest is None:
            raise AtollError(f"{self.store.url}: its list of files lacks {name}; ask the founder")
        data = self.store.read(place, min(most, digest.size))
        if data is None or sha256(data).hexdigest() != digest.sha256:
            state = "not found" if data is None else "was changed"
            if data is not None and len(data) != digest.size:
                state = f"has {len(data):,} bytes, expected {digest.size:,}"
            raise AtollError(f"{self.store.place(place)}: {state}; the founder must upload it again")
        return data

    def holds_other(self, number: int, directory: Path) -> bool:
        """Return whether a directory holds whole shards of a cluster that are not those of this list.

        They are those of before or after a split, which must not be replaced: a training may be reading them.
        """
        index = f"{CLUSTERS}/{cluster_name(number)}/{INDEX}"
        file = directory / index
        if index not in self.files or not file.is_file() or digest_of(file) == self.files[index]:
            return False
        try:
            load_card(file, ShardsIndex)
        # A damaged index is downloaded again.
        except AtollError:
            return False
        return True


def read_run(store: Store, collective: Collective, version: int | None = None) -> PublishedRun:
    """Read the list of the run's files.

    Args:
        store: the collective's.
        collective: its verified charters.
        version: of the charter; None: the latest.

    Raises:
        AtollError: a list is missing or another one than its charter names.
    """
    version = version or len(collective.history)
    # Older lists are read for their files' places; charters that changed members only share a list.
    charters = collective.history[:version]
    lists = {listed: read_list(store, listed) for listed in dict.fromkeys(charter.files for charter in charters)}
    first: dict[tuple[str, FileDigest], str] = {}
    for listed, content in lists.items():
        for item in content.items():
            first.setdefault(item, files_prefix(listed))
    files = lists[charters[-1].files]
    return PublishedRun(store, collective, version, files, {name: first[name, one] for name, one in files.items()})


def current_router(run: PublishedRun, latest: VerifiedIndex | None) -> RouterCard | None:
    """Return the card of the model's router: the index's, or else the founders'; None if there is none."""
    if latest is not None and latest.index.router is not None:
        return read_router_card(run.store, latest.index.router)
    name = f"{ROUTER}/{CARD}"
    if name not in run.files:
        return None
    where = f"{run.store.url}: {name}"
    return parse_card(RouterCard, parse_json(run.read(name, CARD_BYTES), where), where)


def known_manifests(collective: Collective) -> Collection[str]:
    """The hashes of all atoll.yaml that the charters name."""
    return {charter.founded.manifest for charter in collective.history}
