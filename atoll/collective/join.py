"""Join a collective: `atoll collective join` makes a run of what the founder published."""

from pathlib import Path

from atoll.collective.charter import read_collective
from atoll.collective.connect import open_store
from atoll.collective.keys import Key, hex_of
from atoll.collective.member import MemberRecordFile, full_url, write_record
from atoll.collective.run_files import read_run
from atoll.collective.signed import sign
from atoll.collective.statements import Request
from atoll.errors import AtollError
from atoll.storage.artifact import whole_directory
from atoll.storage.cards import parse_record
from atoll.storage.layout import MANIFEST

REQUESTS = "requests"


def join_collective(url: str, out: Path, key_file: Path, *, name: str, identity: str | None = None) -> str:
    """Make a member's directory: atoll.yaml and the clustering. A cluster's shards follow with its lease.

    Args:
        url: the collective's store.
        out: the directory to make.
        key_file: the member's key.
        name: the member's, for people.
        identity: the collective's, from its founder; None trusts what the store holds now, and remembers it.

    Returns:
        The identity.

    Raises:
        AtollError: no collective, another one, files that are missing or changed, or `out` exists.
    """
    if out.exists():
        raise AtollError(f"{out}: exists; join into a new directory")
    key, request = Key.load(key_file), parse_record(Request, {"name": name}, "the request to join")
    store = open_store(url)
    # Who may do what, back to the first charter.
    collective = read_collective(store, identity)
    now = store.now(hex_of(key.id))
    collective.check_date(now)
    if key.id in collective.charter.removed:
        collective.check_may_work(key.id)
    # The manifest and the clustering; the clusters themselves are large.
    run = read_run(store, collective)
    # A manifest that this version cannot read is refused now, not after days.
    assert run.manifest
    with whole_directory(out) as directory:
        run.fetch([MANIFEST, *run.clustering()], directory)
        write_record(
            directory,
            MemberRecordFile(
                url=full_url(url),
                identity=collective.identity,
                key=str(key_file.absolute()),
                key_id=key.id,
                charter=collective.position,
            ),
        )
        # The founder sees who asks. One request per key: joining again changes nothing.
        place = f"{REQUESTS}/{hex_of(key.id)}.json"
        store.create(place, sign(request, [key], collective.identity))
    return collective.identity
