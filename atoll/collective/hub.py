"""The same store over a Hugging Face repository: hf://OWNER/NAME, or hf://datasets/OWNER/NAME.

A commit with `parent_commit` is the lock: it fails if the repository has moved on since it was read. Times are those of
the commits. A commit that is pushed with git has its author's time, so only those whom the repository's owner trusts
with time should have rights to push.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.collective.store import ObjectExistsError, StoredObject, StoreError, StoreRefusedError
from atoll.errors import AtollError
from atoll.runtime.libraries import import_library
from atoll.storage.memory import refuse_out_of_memory

_RACES = 20  # commits of others that may come between reading and committing
_CHUNK = 1 << 20  # bytes
_TYPES = {"datasets": "dataset", "models": "model", "spaces": "space"}


class HubClient:
    """A repository as an object store.

    Args:
        url: hf://OWNER/NAME.
        api: an `HfApi`; None: with the token of the environment.
    """

    def __init__(self, url: str, api: Any = None):
        parts = url.removeprefix("hf://").strip("/").split("/")
        self._type = _TYPES[parts.pop(0)] if len(parts) == 3 and parts[0] in _TYPES else "model"
        if len(parts) != 2 or not all(parts):
            raise AtollError(f"{url}: expected hf://OWNER/NAME or hf://datasets/OWNER/NAME")
        self.url, self._repo = url, "/".join(parts)
        self._hub = import_library("huggingface_hub")
        self._api = self._hub.HfApi() if api is None else api

    def get(self, path: str, most: int) -> bytes | None:
        entry = self.entry(path)
        if entry is None:
            return None
        if entry.size > most:
            raise AtollError(f"{self.url}/{path}: has {entry.size:,} bytes, expected at most {most:,}")
        return b"".join(self.chunks(path))

    def put_new(self, path: str, data: bytes) -> None:
        # Look, then commit on top of what was seen. A commit in between makes this one fail, and it looks again.
        for _ in range(_RACES):
            with self._errors(path):
                head = self._api.repo_info(self._repo, repo_type=self._type).sha
                if self._infos(path, head):
                    raise ObjectExistsError(path)
                try:
                    self._commit(path, data, parent_commit=head)
                    return
                except self._hub.errors.HfHubHTTPError as error:
                    if _status(error) not in (409, 412):
                        raise
        raise StoreError(f"{self.url}/{path}: others commit all the time; try again later")

    def put(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._commit(path, data)

    def put_file(self, path: str, file: Path) -> None:
        with self._errors(path):
            self._commit(path, str(file))

    def chunks(self, path: str) -> Iterator[bytes]:
        # The hub's client downloads large files to a disk, so they pass through a temporary directory.
        with tempfile.TemporaryDirectory(prefix="atoll-") as directory, self._errors(path):
            file = self._api.hf_hub_download(self._repo, path, repo_type=self._type, local_dir=directory)
            with open(file, "rb") as content:
                while chunk := content.read(_CHUNK):
                    yield chunk

    def entry(self, path: str) -> StoredObject | None:
        with self._errors(path):
            infos = self._infos(path, None)
        return _stored(infos[0]) if infos else None

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        with self._errors(prefix):
            try:
                tree = self._api.list_repo_tree(
                    self._repo, prefix or None, recursive=True, expand=True, repo_type=self._type
                )
                for info in tree:
                    if hasattr(info, "size"):  # a file
                        yield _stored(info)
            # A directory that nothing was committed to.
            except self._hub.errors.EntryNotFoundError:
                return

    def _infos(self, path: str, revision: str | None) -> list[Any]:
        infos = self._api.get_paths_info(self._repo, [path], expand=True, revision=revision, repo_type=self._type)
        return [info for info in infos if hasattr(info, "size")]

    def _commit(self, path: str, content: bytes | str, **options: Any) -> None:
        operation = self._hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        self._api.create_commit(self._repo, [operation], commit_message=path, repo_type=self._type, **options)

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn the hub's errors into one line each."""
        where = f"{self.url}/{path}"
        try:
            yield
        except (AtollError, ObjectExistsError):
            raise
        except self._hub.errors.RepositoryNotFoundError:
            raise StoreRefusedError(f"{where}: no such repository, or your token may not see it") from None
        except self._hub.errors.HfHubHTTPError as error:
            if _status(error) in (401, 403):
                raise StoreRefusedError(f"{where}: the store refuses access; check your token's rights") from None
            raise StoreError(f"{where}: the store failed ({' '.join(str(error).split())[:160]}); try again") from None
        # Its HTTP library has errors of its own, and has changed before.
        except Exception as error:
            refuse_out_of_memory(error, where)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise StoreError(f"{where}: the store failed ({reason}); try again") from None


def _status(error: Any) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0)


def _stored(info: Any) -> StoredObject:
    return StoredObject(info.path, info.size, info.last_commit.date.timestamp())
