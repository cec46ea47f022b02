"""Open a store by its address."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from atoll.collective.bucket import ObstoreClient
from atoll.collective.hub import HubClient
from atoll.collective.store import EXTRA, Store
from atoll.errors import AtollError
from atoll.runtime.libraries import import_library
from atoll.storage.memory import refuse_out_of_memory

_MEMORY: dict[str, Any] = {}  # memory://NAME is one store per process
_SCHEMES = ("s3://", "gs://", "az://", "hf://", "memory://", "file://", "a directory")


def open_store(url: str, make: bool = False) -> Store:
    """Open a store by its URL or its directory.

    Args:
        url: s3://, gs://, az://, hf://, memory://, file://, or a path. Credentials come from the environment, as the
            providers' own tools read them.
        make: create a directory that does not exist.

    Raises:
        AtollError: an unknown scheme, no such directory, or `atoll[collective]` is not installed.
    """
    scheme, _, rest = url.partition("://")
    # A Hugging Face repository has another client.
    if rest and scheme == "hf":
        return Store(HubClient(url))
    stores = import_library("obstore.store", EXTRA)
    if rest and scheme == "memory":
        return Store(ObstoreClient(_MEMORY.setdefault(url, stores.MemoryStore()), url))
    if "://" in url and scheme != "file":
        return _remote(url, stores)
    # A directory, possibly one that several machines share.
    root = Path(rest if scheme == "file" else url).expanduser()
    if make:
        root.mkdir(parents=True, exist_ok=True)
    if not root.is_dir():
        raise AtollError(f"{url}: no such directory; expected one of {', '.join(_SCHEMES)}")
    return Store(ObstoreClient(stores.LocalStore(root.resolve()), str(root), root))


def _remote(url: str, stores: Any) -> Store:
    """Open a bucket of S3, GCS or Azure."""
    if not url.startswith(("s3://", "gs://", "az://")):
        raise AtollError(f"{url}: unknown kind of store; expected one of {', '.join(_SCHEMES)}")
    # An answer within minutes: training goes on in any case, and a person is waiting in all others.
    retry = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
    client: dict[str, Any] = {"timeout": "10 minutes", "connect_timeout": "10 seconds"}
    # A server of one's own, such as MinIO, often has no certificate; its address says so.
    client["allow_http"] = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    try:
        return Store(ObstoreClient(stores.from_url(url, client_options=client, retry_config=retry), url))
    except Exception as error:  # obstore raises several unrelated kinds
        refuse_out_of_memory(error, url)
        raise AtollError(f"{url}: cannot be opened ({' '.join(str(error).split())[:160]})") from None
