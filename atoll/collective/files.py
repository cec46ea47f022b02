"""Files in a store: each named with its size and hash, uploaded before and checked after they are named."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from atoll.collective.keys import canonical
from atoll.collective.signed import parse_canonical
from atoll.collective.statements import LIST_BYTES, MAX_KEYS, FileDigest, safe_path
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.manifest import Manifest, parse_manifest
from atoll.storage.cards import parse_record

RUN = "run"  # the run's files: run/<first 32 digits of the hash of their list>/
FILE_LIST = "files.json"
MAX_FILE = 1 << 40  # bytes of one file
MAX_FILES = 10 * MAX_KEYS
MANIFEST_BYTES = 1 << 20
_MANIFEST_DEPTH = 32  # a run's atoll.yaml has about 6
FileProgress = Callable[[int, int, str], None]  # files done, of how many, the current one


def digest_of(file: Path) -> FileDigest:
    """Compute size and hash of a file."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        return FileDigest(sha256=digest, size=content.tell())


def digests_of(directory: Path, names: list[str]) -> dict[str, FileDigest]:
    """Compute sizes and hashes of files.

    Args:
        directory: they are below it.
        names: their relative paths.

    Raises:
        AtollError: a name that other systems could not take.
    """
    try:
        return {safe_path(name): digest_of(directory / name) for name in names}
    except ValueError as error:
        raise AtollError(f"{directory}: {error}; rename the file") from None


def upload_files(
    store: Store, prefix: str, directory: Path, files: Mapping[str, FileDigest], progress: FileProgress | None = None
) -> None:
    """Upload files; those that are there already are skipped. Nothing refers to them yet.

    Raises:
        StoreError: the store failed, or is full.
    """
    for number, (name, digest) in enumerate(files.items()):
        if progress is not None:
            progress(number, len(files), name)
        store.upload(f"{prefix}/{name}", directory / name, digest.size)


def fetch_files(
    store: Store,
    prefix: str | Mapping[str, str],
    files: Mapping[str, FileDigest],
    directory: Path,
    progress: FileProgress | None = None,
) -> None:
    """Download files, each checked and atomic; those that are there already are kept.

    Args:
        store: the collective's.
        prefix: their place in the store, or that of each of them.
        files: relative paths with size and hash. A path that leads out of the directory is refused.
        directory: where to write them.
        progress: called before each file.

    Raises:
        AtollError: missing, changed or too large; no space.
    """
    places = {name: prefix if isinstance(prefix, str) else prefix[name] for name in files}
    # All names and sizes before the first byte.
    for name, digest in files.items():
        place = store.place(places[name])
        try:
            safe_path(name)
        except ValueError as error:
            raise AtollError(f"{place}: {error}; do not trust this list") from None
        if digest.size > MAX_FILE:
            raise AtollError(f"{place}/{name}: {digest.size:,} bytes, expected at most {MAX_FILE:,}")
    for number, (name, digest) in enumerate(files.items()):
        if progress is not None:
            progress(number, len(files), name)
        file = directory / name
        if file.is_file() and file.stat().st_size == digest.size and digest_of(file) == digest:
            continue
        # A list may name a file that another one needs as a directory.
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AtollError(f"{file.parent}: cannot be made ({error.strerror})") from None
        store.download(f"{places[name]}/{name}", file, digest.sha256, digest.size)


def list_of(files: Mapping[str, FileDigest]) -> tuple[FileDigest, bytes]:
    """Return the list of some files, and its own size and hash, which name the place of the files."""
    data = canonical({name: digest.model_dump(mode="json") for name, digest in files.items()})
    if len(data) > LIST_BYTES or len(files) > MAX_FILES:
        raise AtollError(f"{len(files):,} files are too many for one list; use larger shards")
    return FileDigest(sha256=hashlib.sha256(data).hexdigest(), size=len(data)), data


def write_list(store: Store, digest: FileDigest, data: bytes) -> None:
    """Publish a list of files, from `list_of`. Raises AtollError if something else is at its place."""
    place = f"{files_prefix(digest)}/{FILE_LIST}"
    if not store.create(place, data):
        raise AtollError(f"{store.place(place)}: something else is at its place; remove it")


def read_list(store: Store, expected: FileDigest) -> dict[str, FileDigest]:
    """Read a list of files whose hash a charter names.

    Raises:
        AtollError: missing, or another one.
    """
    place = f"{files_prefix(expected)}/{FILE_LIST}"
    data = store.read(place, min(LIST_BYTES, expected.size))
    if data is None or hashlib.sha256(data).hexdigest() != expected.sha256:
        state = "not found" if data is None else "is not the list that the charter names"
        raise AtollError(f"{store.place(place)}: {state}; the founder must publish it again")
    content = parse_canonical(data, store.place(place))
    if not isinstance(content, dict) or len(content) > MAX_FILES:
        raise AtollError(f"{store.place(place)}: no list of files")
    return {name: parse_record(FileDigest, value, store.place(place)) for name, value in content.items()}


def parse_published(data: bytes, where: str) -> Manifest:
    """Parse an atoll.yaml that somebody else wrote.

    Raises:
        AtollError: as `parse_manifest`; or it holds aliases, with which a small file describes a huge value, or is
            nested deeply, which takes long to read; or trainings would start from weights outside of the run.
    """
    try:
        text, depth = data.decode(), 0
        # Event by event, so that this ends before a deep nesting costs time: PyYAML takes the square of the depth.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise AtollError(f"{where}: holds YAML aliases; write out what they stand for")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MANIFEST_DEPTH:
                raise AtollError(f"{where}: more than {_MANIFEST_DEPTH} levels of lists and keys; do not trust it")
        manifest = parse_manifest(text, where)
    except UnicodeDecodeError:
        raise AtollError(f"{where}: is no UTF-8 text") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise AtollError(f"{where}: not YAML ({' '.join(str(error).split())[:160]})") from None
    for part in (*manifest.experts, manifest.common, manifest.router, manifest.monolith):
        init = None if part is None else manifest.train_of(part).init
        # What a training starts from is in what it publishes.
        if init is not None and (Path(init).is_absolute() or ".." in Path(init).parts):
            raise AtollError(f"{where}: train.init {init!r:.200} leads out of the run; put that expert into the run")
    return manifest


def files_prefix(digest: FileDigest) -> str:
    """Return the place of a list's files. Two runs never share one, so two founders cannot mix their files."""
    return f"{RUN}/{digest.sha256[:32]}"
