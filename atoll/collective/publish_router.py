"""Bring a router into the model: `atoll collective publish RUN/router`, and `approve` for whoever must sign too."""

import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.entry import update_index
from atoll.collective.files import FileProgress, digests_of, fetch_files, upload_files
from atoll.collective.index import SUBMISSIONS, VerifiedIndex, read_index, read_submission
from atoll.collective.keys import Key, hex_of
from atoll.collective.member import Membership, changing, full_url
from atoll.collective.routers import (
    RouterFiles,
    approval_path,
    approvals,
    enough,
    offered_routers,
    router_prefix,
)
from atoll.collective.run_files import PublishedRun, current_router, read_run
from atoll.collective.signed import sign
from atoll.collective.statements import RouterApproval
from atoll.collective.store import Store
from atoll.encoders.weights import same
from atoll.ensemble.loading import load_router
from atoll.errors import AtollError
from atoll.storage.artifact import parse_json, read_card, read_json, read_tensors
from atoll.storage.bounds import CARD_BYTES, JSON_BYTES
from atoll.storage.cards import ClusterShardsCard, ExpertCard, RouterCard, ShardsIndex, parse_card, parse_record
from atoll.storage.layout import CARD, CLUSTERS, WEIGHTS, cluster_name
from atoll.storage.shards import INDEX

_COMPARED = ("latent_shape", "codec", "condition")


@dataclass(frozen=True)
class ApprovedRouter:
    """A router with an approval of this member.

    Attributes:
        router: the hash of its card.
        version: of the index that names it; None if it waits.
        signers: keys that approved it. admitters, founders: how many of them it needs, one or the other.
    """

    router: str
    version: int | None
    signers: int
    admitters: int
    founders: int


def is_router(path: Path) -> bool:
    """Return whether the card of an artifact says that it is a router's."""
    content = read_json(path / CARD, CARD_BYTES) if (path / CARD).is_file() else None
    return isinstance(content, dict) and content.get("kind") == RouterCard.model_fields["kind"].default


def publish_router(
    router: Path, url: str | None = None, *, key_file: Path | None = None, progress: FileProgress | None = None
) -> ApprovedRouter:
    """Upload a router, sign that it shall enter the model, and let it in if enough keys did.

    Args:
        router: its directory, in a directory that joined.
        url: the collective's; None: the one that was joined.
        key_file: an admitter's or a founder's key, if it is not the one that joined.
        progress: called before each file.

    Raises:
        AtollError: a key that may not, a router that does not fit the collective, or the store fails.
    """
    directory = router.absolute().parent
    if url is not None and full_url(url) != (joined := Membership(directory).record.url):
        raise AtollError(f"{directory}: has joined {joined}, not {url}; publish it there")
    files = digests_of(router, [CARD, WEIGHTS])
    with changing(directory, "publishing") as member:
        collective, key, store = _open(member, key_file)
        latest = read_index(store, collective, member.record.index, publishing=True)
        _check_fit(router, store, collective, latest)
        upload_files(store, router_prefix(files[CARD].sha256), router, files, progress)
        return _approve(member, store, collective, latest, key, files)


def approve_router(
    directory: Path, wanted: str, *, key_file: Path | None = None, progress: FileProgress | None = None
) -> ApprovedRouter:
    """Fetch a router that somebody published, check it, and sign that it shall enter the model.

    Args:
        directory: the member's.
        wanted: the hash of its card, or the beginning of it.
        key_file: an admitter's or a founder's key, if it is not the one that joined.
        progress: called before each file.

    Raises:
        AtollError: as `publish_router`, or there is no such router.
    """
    with changing(directory, "approving a router") as member:
        collective, key, store = _open(member, key_file)
        latest = read_index(store, collective, member.record.index, publishing=True)
        since = latest.router_since if latest else 0
        matches = [router for router in offered_routers(store, since) if router.startswith(wanted)]
        signed = [approvals(store, collective, collective.charter, router, since) for router in matches]
        offers = [next(iter(one.values())).statement.files for one in signed if one]
        if len(offers) != 1:
            problem = "several routers begin so; name more of it" if offers else "no such router waits for approvals"
            raise AtollError(f"{wanted:.64}: {problem}; `atoll collective status` lists them")
        [files] = offers
        with tempfile.TemporaryDirectory(dir=directory, prefix=".approve-") as place:
            fetch_files(store, router_prefix(files[CARD].sha256), files, Path(place), progress)
            _check_fit(Path(place), store, collective, latest)
        return _approve(member, store, collective, latest, key, files)


def _open(member: Membership, key_file: Path | None) -> tuple[Collective, Key, Store]:
    """Open a collective for a key that may approve routers. Raises AtollError if it may not."""
    store, key = member.open(), member.key() if key_file is None else Key.load(key_file)
    collective = member.read(store)
    roles = collective.charter.roles
    if key.id not in {*roles.admitters, *roles.founders}:
        raise AtollError(
            f"{collective.name_of(key.id)} is neither admitter nor founder of {collective.charter.name!r}; only they "
            "bring a router in"
        )
    collective.check_date(store.now(hex_of(key.id)))
    return collective, key, store


def _approve(
    member: Membership,
    store: Store,
    collective: Collective,
    latest: VerifiedIndex | None,
    key: Key,
    files: RouterFiles,
) -> ApprovedRouter:
    """Sign an approval, and publish the next index if that is enough."""
    router, since = files[CARD].sha256, latest.router_since if latest else 0
    place = approval_path(router, since, key.id)
    statement = RouterApproval(files=dict(files), after=since, charter=collective.position.version)
    data, version = sign(statement, [key], collective.identity), None
    # An earlier approval may name an earlier charter; it counts as it is.
    if not store.create(place, data) and key.id not in approvals(store, collective, collective.charter, router, since):
        raise AtollError(f"{store.place(place)}: something else is at its place; remove it")
    signers = approvals(store, collective, collective.charter, router, since)
    # Only admitters publish an index; the next one that they publish names it.
    if enough(collective.charter, signers) and key.id in collective.charter.roles.admitters:
        now, changes = update_index(store, collective, key, ())
        if now is not None:
            member.update(index=now.position)
            version = now.position.version if changes.router == router else None
    need = collective.charter.thresholds
    return ApprovedRouter(router, version, len(signers), need.admitters, need.founders)


def _check_fit(router: Path, store: Store, collective: Collective, latest: VerifiedIndex | None) -> None:
    """Raise AtollError unless a router is whole, of the collective's run, and newer than the model's.

    Args:
        router: its directory.
        store, collective: where it shall go.
        latest: the index.
    """
    card, run = read_card(router, RouterCard), read_run(store, collective)
    # It is of the run: its clusters are the collective's, or those that they grew from.
    if card.assignment is None or not run.lineage.continues(card.descent):
        raise AtollError(
            f"{router}: is of the assignment {card.assignment!s:.64} to {card.clusters} clusters, which is not in the "
            f"lineage of the collective's {run.lineage.k}; publish the run's router, after `atoll collective grow`"
        )
    expected, actual = _data_card(run).plain(), card.plain()
    for key in _COMPARED:
        if not same(actual.get(key), expected[key]):
            raise AtollError(f"{router}: its {key} is {actual.get(key)!s:.200}, the run's is {expected[key]!s:.200}")
    # It is no step back, and not where it is already.
    if latest is not None and latest.index.router == digests_of(router, [CARD, WEIGHTS]):
        raise AtollError(f"{router}: is the model's router already")
    current = current_router(run, latest)
    if current is not None and card.clusters < current.clusters:
        raise AtollError(
            f"{router}: knows {card.clusters} clusters, the model's router {current.clusters}; it is of an older step "
            "of growth"
        )
    for expert in latest.index.experts if latest else ():
        about = _expert_card(store, collective, expert.submission)
        if not card.descent.knows(about.assignment):
            raise AtollError(
                f"{router}: does not know the clusters of {about.name}, which is in the model; extend it with "
                "`atoll train router --extend`"
            )
    # Its weights are what the card says, fit the network, and are numbers.
    load_router(router)
    for name, values in read_tensors(router, card).items():
        if values.is_floating_point() and not bool(values.isfinite().all()):
            raise AtollError(f"{router}: the weights {name:.80} are not finite")


def _data_card(run: PublishedRun) -> ClusterShardsCard:
    """The card of the run's first cluster."""
    name = f"{CLUSTERS}/{cluster_name(0)}/{INDEX}"
    where = f"{run.store.url}: {name}"
    index = parse_card(ShardsIndex, parse_json(run.read(name, JSON_BYTES), where), where)
    return parse_record(ClusterShardsCard, index.card, where)


def _expert_card(store: Store, collective: Collective, submission: str) -> ExpertCard:
    """The card of an admitted expert."""
    digest = read_submission(store, collective, submission).statement.files[CARD]
    place = f"{SUBMISSIONS}/{submission}/{CARD}"
    data = store.read(place, CARD_BYTES)
    if data is None or sha256(data).hexdigest() != digest.sha256:
        raise AtollError(f"{store.place(place)}: is not what its submission names; retire {submission}")
    return parse_card(ExpertCard, parse_json(data, store.place(place)), store.place(place))
