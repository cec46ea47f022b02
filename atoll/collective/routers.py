"""Which routers may enter the model: router/<hash of the card>/, with approvals of enough admitters or founders.

A router decides which expert draws what, so a bad one ruins the model as a bad expert does. It enters the index with
the approvals of as many admitters as an expert needs, or of as many founders as a charter needs. An approval names the
index that brought the router which is replaced, so that no old one can be brought back with it.
"""

import re
from collections.abc import Mapping
from hashlib import sha256

from atoll.collective.charter import Collective
from atoll.collective.keys import hex_of
from atoll.collective.signed import Signed, read_signed
from atoll.collective.statements import STATEMENT_BYTES, Charter, FileDigest, Index, RouterApproval
from atoll.collective.store import Store, StoreError
from atoll.errors import AtollError
from atoll.storage.artifact import parse_json
from atoll.storage.bounds import CARD_BYTES
from atoll.storage.cards import RouterCard, parse_card
from atoll.storage.layout import CARD, WEIGHTS

ROUTERS, APPROVALS = "router", "approvals"
RouterFiles = Mapping[str, FileDigest]


def router_prefix(router: str) -> str:
    """Return the place of a router's files. router: the hash of its card."""
    return f"{ROUTERS}/{router}"


def approval_path(router: str, after: int, key: str) -> str:
    """Return the place of a key's approval of a router."""
    return f"{router_prefix(router)}/{APPROVALS}/{after:06d}/{hex_of(key)}.json"


def read_router_card(store: Store, files: RouterFiles) -> RouterCard:
    """Read the card of a router in the store. Raises AtollError if it is missing, changed, or no router's."""
    place = f"{router_prefix(files[CARD].sha256)}/{CARD}"
    data = store.read(place, min(CARD_BYTES, files[CARD].size))
    if data is None or sha256(data).hexdigest() != files[CARD].sha256:
        state = "not found" if data is None else "was changed"
        raise AtollError(f"{store.place(place)}: {state}; whoever published the router must upload it again")
    card = parse_card(RouterCard, parse_json(data, store.place(place)), store.place(place))
    if card.weights is None or card.weights.sha256 != files[WEIGHTS].sha256:
        raise AtollError(f"{store.place(place)}: names other weights than its approval; remove it")
    return card


def approvals(
    store: Store, collective: Collective, charter: Charter, router: str, after: int
) -> dict[str, Signed[RouterApproval]]:
    """Read the approvals of a router by admitters and founders; junk does not count.

    Args:
        store, collective: where to look.
        charter: who admitters and founders are.
        router: the hash of its card.
        after: the index that brought the router which it replaces.

    Returns:
        The approvals by key id.
    """
    result = {}
    for key in dict.fromkeys((*charter.roles.admitters, *charter.roles.founders)):
        place = approval_path(router, after, key)
        data = store.read(place, STATEMENT_BYTES)
        if data is None:
            continue
        try:
            signed = read_signed(RouterApproval, data, store.place(place), collective.identity)
        except AtollError:
            continue
        statement = signed.statement
        # It counts for one router, one place in the chain, and the key whose name it has.
        if signed.signers == {key} and (statement.files[CARD].sha256, statement.after) == (router, after):
            result[key] = signed
    return result


def enough(charter: Charter, keys: Mapping[str, object]) -> bool:
    """Return whether these keys may bring a router in: enough admitters, or enough founders."""
    roles, thresholds = charter.roles, charter.thresholds
    return (
        len(set(keys) & set(roles.admitters)) >= thresholds.admitters
        or len(set(keys) & set(roles.founders)) >= thresholds.founders
    )


def check_router(
    store: Store, collective: Collective, charter: Charter, index: Index, before: Index | None, since: int, where: str
) -> None:
    """Check the router of an index against that of the index before it.

    Args:
        store, collective: as for `read_index`.
        charter: the one that the index names.
        index: the index.
        before: the one before it.
        since: the index that brought the router of `before`; 0 if it has none.
        where: the place of the index, for messages.

    Raises:
        AtollError: a router without enough approvals, of an older growth step, or without the clusters of an expert.
    """
    files, old = index.router, before.router if before else None
    if files == old:
        return
    if files is None:
        raise AtollError(f"{where}: leaves out the router; it is forged")
    if set(files) != {CARD, WEIGHTS}:
        raise AtollError(f"{where}: names a router of {len(files)} files, expected {CARD} and {WEIGHTS}; it is forged")
    keys = {
        key: one
        for key, one in approvals(store, collective, charter, files[CARD].sha256, since).items()
        if one.statement.files == files
    }
    if not enough(charter, keys):
        need = charter.thresholds
        raise AtollError(
            f"{where}: its router was approved by {len(keys)} keys, expected {need.admitters} admitters or "
            f"{need.founders} founders"
        )
    # It knows what the one before knew, and the clusters of all experts.
    card = read_router_card(store, files)
    if card.assignment is None:
        raise AtollError(f"{where}: its router names no assignment to clusters; it is forged")
    if old is not None and not card.descent.continues(read_router_card(store, old).descent):
        raise AtollError(f"{where}: its router is of an older growth step, or of other clusters, than the one before")
    if unknown := [one.submission for one in index.experts if max(one.clusters) >= card.clusters]:
        raise AtollError(f"{where}: its router does not know the clusters of {unknown[0]}")


def approved_router(
    store: Store, collective: Collective, index: Index, before: Index | None, since: int
) -> dict[str, FileDigest] | None:
    """Find a router that may enter an index.

    Args:
        store, collective: where to look; the latest charter counts.
        index: the index that is about to be published, with the router of the one before.
        before, since: as for `check_router`.

    Returns:
        The files of the one that knows most clusters; None if there is none.
    """
    candidates: list[tuple[int, str, dict[str, FileDigest]]] = []
    for router in offered_routers(store, since):
        signed = approvals(store, collective, collective.charter, router, since)
        # Approvals of one card with other weights cannot be told apart by their place.
        offers = [one.statement.files for one in signed.values()]
        for files in [one for place, one in enumerate(offers) if one not in offers[:place]]:
            if before is not None and files == before.router:
                continue
            try:
                proposal = index.model_copy(update={"router": files})
                check_router(store, collective, collective.charter, proposal, before, since, router)
                candidates.append((read_router_card(store, files).clusters, router, files))
            except StoreError:
                raise
            # Not approved by enough yet, or not fit: it waits.
            except AtollError:
                continue
    return max(candidates, key=lambda one: one[:2])[2] if candidates else None


def offered_routers(store: Store, after: int) -> list[str]:
    """List the hashes of routers that somebody wants in the place of the one that an index brought."""
    paths = (entry.path.split("/") for entry in store.list(ROUTERS))
    wanted = {parts[1] for parts in paths if len(parts) == 5 and parts[2:4] == [APPROVALS, f"{after:06d}"]}
    return sorted(router for router in wanted if re.fullmatch("[0-9a-f]{64}", router))
