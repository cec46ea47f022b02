"""Collectives without runs, for tests of what their statements say."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from atoll.collective.charter import Collective, publish_charter, read_collective
from atoll.collective.keys import Key
from atoll.collective.signed import sign
from atoll.collective.statements import Charter, FileDigest, FoundedRun, MemberRecord, Roles, Statement, Thresholds
from atoll.collective.store import Store

NOBODY = "ab" * 32  # a hash of nothing
FAR = 2**40  # Unix seconds


def charter_of(founders: Sequence[Key], **changes: Any) -> Charter:
    """A first charter. changes: keys of it with other values."""
    ids = tuple(key.id for key in founders)
    values: dict[str, Any] = {
        "version": 1,
        "name": "reef",
        "founded": FoundedRun(manifest=NOBODY, encoded_format=1, clusters=4),
        "files": FileDigest(sha256=NOBODY, size=1),
        "roles": Roles(founders=ids, admitters=ids, retirers=ids),
        "thresholds": Thresholds(),
        "joining": "open",
        "members": {key.id: MemberRecord(name="founder") for key in founders},
        "removed": (),
        "lease_seconds": 3600,
        "previous": None,
        "expires": FAR,
    }
    return Charter(**{**values, **changes})


def found(store: Store, *founders: Key, **changes: Any) -> Collective:
    """Publish a first charter, and read it."""
    publish_charter(store, charter_of(founders, **changes), founders, "")
    return read_collective(store)


def amend(store: Store, collective: Collective, *founders: Key, **changes: Any) -> Collective:
    """Publish the next charter, and read it."""
    values = {"version": collective.position.version + 1, "previous": collective.position.sha256, **changes}
    charter = Charter(**{**collective.charter.model_dump(), **values})
    publish_charter(store, charter, founders, collective.identity)
    return read_collective(store)


def put(store: Store, path: str, statement: Statement, key: Key, collective: Collective) -> bytes:
    """Sign a statement into the store, and return its bytes."""
    data = sign(statement, [key], collective.identity)
    assert store.create(path, data)
    return data


@contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket on an S3 server of this machine."""
    import urllib.request

    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        # All servers of a process share their buckets.
        bucket = f"reef-{secrets.token_hex(4)}"
        urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
        yield f"s3://{bucket}/model"
    finally:
        server.stop()
