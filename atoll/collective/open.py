"""Found a collective on a run: `atoll collective open`."""

from pathlib import Path
from typing import Literal

from atoll.collective.charter import CHARTERS, numbered, publish_charter
from atoll.collective.connect import open_store
from atoll.collective.files import (
    FileProgress,
    digests_of,
    files_prefix,
    list_of,
    parse_published,
    upload_files,
    write_list,
)
from atoll.collective.keys import Key, hex_of
from atoll.collective.member import MemberRecordFile, full_url, write_record
from atoll.collective.statements import Charter, FoundedRun, MemberRecord, Position, Roles, Thresholds
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.cards import FORMAT, parse_record
from atoll.storage.layout import (
    CARD,
    CLUSTERS,
    CLUSTERS_CARD,
    COLLECTIVE,
    COMMON,
    MANIFEST,
    WEIGHTS,
    RunLayout,
    cluster_name,
)

CENTROIDS = "centroids.safetensors"  # in clusters/, written by `atoll cluster`
DAY = 86_400
Joining = Literal["open", "invited"]


def open_collective(
    url: str,
    run: Path,
    key_file: Path,
    *,
    name: str | None = None,
    lease_hours: float = 24.0,
    expires_days: float = 365.0,
    joining: Joining = "open",
    progress: FileProgress | None = None,
) -> str:
    """Publish what contributors need of a run, then the charter, which makes it a collective.

    Args:
        url: the store. A directory is created.
        run: a run with clusters.
        key_file: the founder's key.
        name: of the collective; default: the run's name.
        lease_hours: how long a lease lasts after its last heartbeat.
        expires_days: after which the founder must renew the charter.
        joining: "open": any key may claim and publish until it is removed; "invited": those that a founder adds.
        progress: called before each file.

    Returns:
        The collective's identity.

    Raises:
        AtollError: no clusters, a collective is there already, or the store fails. Without the charter, what was
            uploaded is no collective, and running this again continues.
    """
    # Everything that can fail here, before the store sees anything.
    key = Key.load(key_file)
    manifest = load_manifest(run)
    named = parse_record(MemberRecord, {"name": name or manifest.name}, "the charter")
    # Contributors read the manifest with more care than its owner does.
    parse_published(RunLayout(run).manifest.read_bytes(), str(RunLayout(run).manifest))
    names = run_files(run, manifest)
    if (run / COLLECTIVE).exists():
        raise AtollError(f"{run}: has joined a collective already ({COLLECTIVE}); found another one on another run")
    store = open_store(url, make=True)
    if store.exists(numbered(CHARTERS, 1)):
        raise AtollError(f"{url}: a collective is here already; join it, or found yours under another address")
    files = digests_of(run, names)
    # Files first, then their list, then the charter: until that is there, nobody sees anything.
    digest, data = list_of(files)
    upload_files(store, files_prefix(digest), run, files, progress)
    write_list(store, digest, data)
    founders = (key.id,)
    charter = Charter(
        version=1,
        name=named.name,
        founded=FoundedRun(manifest=files[MANIFEST].sha256, encoded_format=FORMAT, clusters=manifest.clusters.k),
        files=digest,
        roles=Roles(founders=founders, admitters=founders, retirers=founders),
        thresholds=Thresholds(),
        joining=joining,
        members={key.id: MemberRecord(name="founder")},
        removed=(),
        lease_seconds=max(1, round(lease_hours * 3600)),
        previous=None,
        expires=int(store.now(hex_of(key.id)) + expires_days * DAY),
    )
    identity = publish_charter(store, charter, [key], "")
    # The founder's run is a member's directory too.
    record = MemberRecordFile(
        url=full_url(url),
        identity=identity,
        key=str(key_file.absolute()),
        key_id=key.id,
        charter=Position(version=1, sha256=identity),
    )
    write_record(run, record)
    return identity


def run_files(run: Path, manifest: Manifest, *, router: bool = True, common: bool = True) -> list[str]:
    """List the files of a run that contributors need.

    They are atoll.yaml, the clustering, every cluster, the router's data, and the common model if an expert starts from
    it.

    Args:
        run: the run.
        manifest: its atoll.yaml.
        router: whether the trained router is among them.
        common: whether the common model may be among them.

    Raises:
        AtollError: a cluster, or the common model, is missing; a generalist, or an expert of some levels.
    """
    if manifest.generalist is not None:
        raise AtollError("generalist: a collective has experts of one cluster each; leave the section out")
    if some := [expert.full_name for expert in manifest.experts if expert.objective.levels is not None]:
        raise AtollError(
            f"{', '.join(some)}: objective.levels: a collective checks experts at all levels; leave it out"
        )
    layout = RunLayout(run)
    names = [MANIFEST, *(f"{CLUSTERS}/{name}" for name in (CLUSTERS_CARD, CENTROIDS))]
    directories = [f"{CLUSTERS}/{cluster_name(number)}" for number in range(manifest.clusters.k)]
    # The router's sample, and the router, if the run has them.
    places = (layout.router_sample, layout.router) if router else (layout.router_sample,)
    directories += [place.relative_to(run).as_posix() for place in places if place.is_dir()]
    for directory in directories:
        here = sorted(path.name for path in (run / directory).glob("*") if path.is_file() and path.name[0] != ".")
        if not here:
            raise AtollError(f"{run / directory}: not found or empty; run `atoll cluster` first")
        names += [f"{directory}/{name}" for name in here]
    if common and any(map(manifest.starts_from_common, manifest.experts)):
        if not (layout.common / CARD).is_file():
            raise AtollError(f"{layout.common}: not found, and experts start from it; run `atoll train common` first")
        names += [f"{COMMON}/{CARD}", f"{COMMON}/{WEIGHTS}"]
    # Runs whose experts drew the data have no centroids.
    optional = {f"{CLUSTERS}/{CENTROIDS}"}
    if missing := [name for name in names if not (run / name).is_file() and name not in optional]:
        raise AtollError(f"{run / missing[0]}: not found; run `atoll cluster` first")
    return [name for name in names if (run / name).is_file()]
