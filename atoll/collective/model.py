"""The model of a collective, to be sampled from its store: `atoll sample s3://bucket/reef "a prompt"`.

Cards and the router are fetched at once. An expert's weights are fetched when a sampler first evaluates it, once, with
their hash checked while they stream. All of it stays in a cache directory, one per address.
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from atoll.collective.charter import CHARTERS, Collective, numbered, read_collective
from atoll.collective.connect import open_store
from atoll.collective.files import fetch_files
from atoll.collective.index import SUBMISSIONS, VerifiedIndex, check_date, read_index, read_submission
from atoll.collective.member import full_url
from atoll.collective.routers import router_prefix
from atoll.collective.run_files import PublishedRun, read_run
from atoll.collective.statements import FileDigest, Position
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.storage.artifact import read_card, read_json, sha256_file, write_card, write_json
from atoll.storage.bounds import FreeText, Sha256
from atoll.storage.cards import (
    CardRecord,
    EnsembleCard,
    ExpertCard,
    ExpertEntry,
    RouterCard,
    RouterEntry,
    SamplingDefaults,
    parse_record,
)
from atoll.storage.layout import CARD, ENSEMBLE_CARD, EXPERTS, ROUTER, WEIGHTS
from atoll.storage.lock import hold

_SEEN = "seen.json"
FetchWeights = Callable[[Path], None]  # an expert's directory


class SeenCollective(CardRecord):
    """What was seen of a collective at an address: an older or another one is refused later."""

    format: Literal[1] = 1
    url: FreeText
    identity: Sha256
    charter: Position
    index: Position


@dataclass(frozen=True)
class CollectiveModel:
    """A collective's model in the cache.

    Attributes:
        directory: holds ensemble.json, cards and the router.
        fetch: downloads the weights of the expert in a directory below it, unless they are there.
        version: of the index that it was made from.
    """

    directory: Path
    fetch: FetchWeights
    version: int


def is_collective(address: str) -> bool:
    """Return whether an address is a collective's store: a URL, or a directory with a charter."""
    return "://" in address or (Path(address).expanduser() / numbered(CHARTERS, 1)).is_file()


def open_model(url: str, identity: str | None = None, cache: Path | None = None) -> CollectiveModel:
    """Verify a collective and fetch what its model needs before sampling.

    Args:
        url: the collective's store.
        identity: the expected identity; None accepts the one seen at this address before, or any at first contact.
        cache: directory of the cache; None: `$XDG_CACHE_HOME/atoll`, or `~/.cache/atoll`.

    Raises:
        AtollError: no collective, one that was exchanged or rolled back, no admitted expert, or changed files.
    """
    url = full_url(url)
    store = open_store(url)
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atoll"
    directory = cache / "collectives" / sha256(url.encode()).hexdigest()[:32]
    directory.mkdir(parents=True, exist_ok=True)
    lock = hold(directory, "fetching a model")
    try:
        # Who may do what, and what was admitted, back to the first charter and no older than what was seen here.
        seen = _seen(directory)
        collective = read_collective(
            store, identity or (seen.identity if seen else None), seen.charter if seen else None
        )
        verified = read_index(store, collective, seen.index if seen else None)
        if verified is None or not verified.index.experts:
            raise AtollError(f"{url}: no expert was admitted yet; `atoll collective status` shows what was offered")
        # A reader cannot write, so it cannot learn the store's time.
        check_date(verified.index, time.time())
        model = _materialize(store, collective, verified, directory)
        record = SeenCollective(
            url=url, identity=collective.identity, charter=collective.position, index=verified.position
        )
        write_json(directory / _SEEN, record.model_dump(mode="json"))
    finally:
        lock.close()
    return model


def _seen(directory: Path) -> SeenCollective | None:
    file = directory / _SEEN
    return parse_record(SeenCollective, read_json(file, 1 << 16), str(file)) if file.is_file() else None


def _materialize(store: Store, collective: Collective, verified: VerifiedIndex, directory: Path) -> CollectiveModel:
    """Write the ensemble of an index: ensemble.json, the experts' cards and the router."""
    # The router knows the clusters as they were when it was trained or extended; experts may be older or newer.
    run = read_run(store, collective)
    router = _fetch_router(run, verified, directory)
    routing = None if router is None else read_card(directory / router.url, RouterCard)
    # The experts' cards, each pinned by the hash in a submission that the index pins.
    entries, weights = [], dict[str, tuple[str, FileDigest]]()
    cards, newer = list[ExpertCard](), list[str]()
    for expert in verified.index.experts:
        submission = read_submission(store, collective, expert.submission)
        if submission.sha256 != expert.sha256:
            raise AtollError(f"{store.url}: {expert.submission} is not the submission that was admitted")
        files, prefix = submission.statement.files, f"{SUBMISSIONS}/{expert.submission}"
        part = directory / EXPERTS / expert.submission
        fetch_files(store, prefix, {CARD: files[CARD]}, part)
        card = read_card(part, ExpertCard)
        if card.weights_sha256 != files[WEIGHTS].sha256 or card.clusters != expert.clusters:
            raise AtollError(f"{part / CARD}: differs from what its submission says; retire {expert.submission}")
        if routing is not None and _is_newer(card, routing):
            newer.append(card.name)
            continue
        cards.append(card)
        weights[expert.submission] = (prefix, files[WEIGHTS])
        url = f"{EXPERTS}/{expert.submission}"
        clusters = card.clusters if routing is None else _clusters_now(card, routing)
        entries.append(ExpertEntry(name=card.name, clusters=clusters, url=url, sha256=files[CARD].sha256))
    _tell_newer(store, newer, len(cards))

    # The ensemble, with the run's sampling defaults.
    first = cards[0]
    sampling = run.manifest.sampling.model_dump(include=set(SamplingDefaults.model_fields), exclude_none=True)
    ensemble = EnsembleCard(
        experts=tuple(entries),
        router=router,
        clusters=first.k if routing is None else routing.clusters,
        assignment=first.assignment if routing is None else routing.assignment,
        lineage=None if routing is None else routing.lineage,
        latent_shape=first.latent_shape,
        codec=first.codec,
        sampling=SamplingDefaults(**sampling),
    )
    write_card(directory / ENSEMBLE_CARD, ensemble)

    def fetch(part: Path) -> None:
        """Download the weights of one expert."""
        prefix, digest = weights[part.name]
        fetch_files(store, prefix, {WEIGHTS: digest}, directory / EXPERTS / part.name)

    return CollectiveModel(directory, fetch, verified.position.version)


def _is_newer(card: ExpertCard, router: RouterCard) -> bool:
    """Return whether an expert is of clusters that a router does not know yet."""
    return card.k > router.clusters and not router.descent.knows(card.assignment)


def _clusters_now(card: ExpertCard, router: RouterCard) -> tuple[int, ...]:
    """The clusters of an expert in the router's numbering; its own if the router does not know them."""
    lineage = router.descent
    # A card that does not fit is refused with the others when the ensemble is loaded.
    fits = lineage.knows(card.assignment) and card.k == lineage.clusters_of(card.assignment)
    return lineage.now(card.assignment, card.clusters) if fits else card.clusters


def _tell_newer(store: Store, newer: list[str], usable: int) -> None:
    """Warn about experts that wait for a router. Raises AtollError if there are no others."""
    if not newer:
        return
    remedy = "an admitter publishes the extended router: `atoll collective publish RUN/router`"
    if not usable:
        raise AtollError(f"{store.url}: the router knows the clusters of no admitted expert; {remedy}")
    names = ", ".join(newer[:5]) + (", ..." if len(newer) > 5 else "")
    warnings.warn(f"without {names}: the router does not know their clusters yet; {remedy}", stacklevel=4)


def _fetch_router(run: PublishedRun, verified: VerifiedIndex, directory: Path) -> RouterEntry | None:
    """Fetch the router: the index's, or else the one that the founder published with the run."""
    place: str | dict[str, str]
    if (files := verified.index.router) is not None:
        place = router_prefix(files[CARD].sha256)
    else:
        names = [name for name in (CARD, WEIGHTS) if f"{ROUTER}/{name}" in run.files]
        files = {name: run.files[f"{ROUTER}/{name}"] for name in names}
        place = {name: f"{run.places[f'{ROUTER}/{name}']}/{ROUTER}" for name in names}
    # A single expert, or a generalist, needs none.
    if not files:
        return None
    if CARD not in files:
        raise AtollError(f"{run.store.url}: its list of files has {ROUTER}/{WEIGHTS} without {CARD}; ask the founder")
    part = directory / ROUTER / files[CARD].sha256[:32]
    fetch_files(run.store, place, files, part)
    return RouterEntry(url=f"{ROUTER}/{part.name}", sha256=sha256_file(part / CARD))
