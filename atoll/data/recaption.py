"""New captions for the images of a source, by a program or a function of the user: `atoll recaption`.

The captions are appended to a file, a batch at a time. What is in the file is never asked for again, so a run that was
stopped goes on where it was, and new images are captioned alone.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from atoll.data.captioner import Captioner, CaptionRequest, checked
from atoll.data.captions_file import CaptionsFile
from atoll.data.containers import Unusable
from atoll.data.image import load_image
from atoll.data.names import message_of
from atoll.data.opening import ahead, is_local, join
from atoll.data.tally import kind_of
from atoll.data.types import Raw, Skipped, Source
from atoll.errors import AtollError
from atoll.runtime.process import Crashed, Remote
from atoll.storage.lock import try_lock

RecaptionProgress = Callable[[int, int | None, str], None]  # (images done, images in all if known, a note)
Send = Literal["image", "path"]


def recaption(
    source: Source,
    captioner: Captioner,
    out: Path,
    *,
    batch: int = 16,
    side: int = 1024,
    send: Send = "image",
    restart: bool = False,
    progress: RecaptionProgress | None = None,
) -> str:
    """Caption the images of a source that `out` does not name yet.

    Args:
        source: the images, with their own captions.
        captioner: returns captions for a batch.
        out: the file, a line of JSON per image; see `CaptionsFile`.
        batch: images at a time; a stopped run loses at most one batch.
        side: pixels of the longer side that the captioner gets at most.
        send: pixels, or the paths of files.
        restart: discard the captions that are there.
        progress: called after each batch.

    Returns:
        A summary, one line per fact.

    Raises:
        AtollError: the captioner failed; everything before that batch is in the file. Or `out` holds something else, or
            another process writes it; or paths were chosen, and the images are in no files of this machine.
    """
    if send == "path" and not _has_paths(source):
        raise AtollError(
            "--send path: the keys of these images are no paths of local files; leave it out, to send their pixels"
        )
    log = _Log(out, restart)
    skipped: Counter[str] = Counter()
    done, total = log.before, _total(source)
    tell = progress or (lambda done, total, note: None)
    tell(done, total, "")
    batches = _batches(_remaining(source, log, skipped), batch)
    # The next batch is decoded while the captioner works on this one.
    with log, captioner, _Loader(source, side, send) as loader, closing(ahead(loader, batches, threads=1)) as loaded:
        for raws, requests in loaded:
            skipped.update(kind_of(one.reason) for one in requests if isinstance(one, Skipped))
            asked = [one for one in requests if isinstance(one, CaptionRequest)]
            answers = captioner(asked) if asked else []
            where = type(captioner).__name__.lower()
            log.write([(one.key, checked(one, answer, where)) for one, answer in zip(asked, answers, strict=True)])
            done += len(raws)
            tell(done, total, f"{log.written:,} captioned")
        warning = captioner.close()
    return _say(log, skipped, warning)


class _Log:
    """The file of captions, open for appending; a context manager.

    Attributes:
        before: images that it named before.
        written: images that were added.
    """

    def __init__(self, path: Path, restart: bool):
        self.path, self.written, self.torn = path, 0, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file: IO[bytes] = path.open("ab")
        except OSError as error:
            raise AtollError(f"{path}: cannot be written ({message_of(error)})") from None
        if not try_lock(self._file.fileno()):
            self._file.close()
            raise AtollError(f"{path}: another process writes it; wait for it, or stop it")
        if restart:
            self._file.truncate(0)
        # A line without an end is what a killed process was writing.
        self._known = CaptionsFile(path, torn=True)
        self.torn = path.stat().st_size - self._known.complete
        if self.torn:
            self._file.truncate(self._known.complete)
        self.before = len(self._known)
        self._added: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._added or key in self._known

    def add(self, key: str) -> None:
        """Note that a key will be written: a source may have it twice."""
        self._added.add(key)

    def write(self, captions: Sequence[tuple[str, Any]]) -> None:
        """Append the captions of a batch; they are on the disk when this returns."""
        lines = "".join(
            json.dumps({"key": key, "captions": value}, ensure_ascii=False) + "\n" for key, value in captions
        )
        try:
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise AtollError(f"{self.path}: cannot be written ({message_of(error)})") from None
        self.written += len(captions)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Loader:
    """Decodes batches in a process of its own, which a damaged image may crash; a context manager."""

    def __init__(self, source: Source, side: int, send: Send):
        self._root, self._side, self._send = source.root, side, send
        self._remote = Remote(load_image)

    def __call__(self, raws: list[Raw]) -> tuple[list[Raw], list[CaptionRequest | Skipped]]:
        """Return the batch, and what the captioner gets for each image."""
        if self._send == "path":
            return raws, [CaptionRequest(raw.key, raw.caption, None, join(self._root, raw.key)) for raw in raws]
        files = [(raw.image, self._side) for raw in raws if isinstance(raw.image, bytes)]
        outcomes = iter(self._decoded(files))
        requests: list[CaptionRequest | Skipped] = []
        for raw in raws:
            pixels = next(outcomes) if isinstance(raw.image, bytes) else _colours(raw.image)
            if isinstance(pixels, Unusable):
                requests.append(Skipped(raw.key, str(pixels)))
            elif isinstance(pixels, Exception):
                raise pixels
            else:
                requests.append(CaptionRequest(raw.key, raw.caption, pixels, None))
        return raws, requests

    def _decoded(self, files: list[tuple[bytes, int]]) -> list[Any]:
        try:
            return self._remote.map(files)
        except Crashed:
            outcomes: list[Any] = []
        # Each file alone, to find the one that crashes the decoder.
        for file in files:
            try:
                outcomes += self._remote.map([file])
            except Crashed as crash:
                outcomes.append(Unusable(f"its decoder crashed ({crash})"))
        return outcomes

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._remote.kill()


def _remaining(source: Source, log: _Log, skipped: Counter[str]) -> Iterator[Raw]:
    """Yield the samples that the file does not name yet, each key once; count those that cannot be read."""
    for block in source.blocks():
        for sample in source.read(block):
            if isinstance(sample, Skipped):
                skipped[kind_of(sample.reason)] += 1
            elif sample.key not in log:
                log.add(sample.key)
                yield sample


def _has_paths(source: Source) -> bool:
    """Return whether the keys of a source are paths of local files below its root."""
    return source.name == "folder" and source.config()["key"] is None and is_local(source.root or "://")


def _batches(raws: Iterator[Raw], size: int) -> Iterator[list[Raw]]:
    while chunk := list(islice(raws, size)):
        yield chunk


def _total(source: Source) -> int | None:
    counts = [block.samples for block in source.blocks()]
    return None if None in counts else sum(count or 0 for count in counts)


def _colours(pixels: np.ndarray) -> np.ndarray:
    """Return pixels [C,H,W] as [H,W,3]."""
    return np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0).copy()


def _say(log: _Log, skipped: Counter[str], warning: str) -> str:
    lines = [f"{log.path}: {log.written:,} images captioned" + (f", {log.before:,} were there" if log.before else "")]
    if log.torn:
        lines.append("the last line was incomplete, from a process that was killed; its image was captioned again")
    if skipped:
        reasons = ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())
        lines.append(f"without captions, as they cannot be read: {reasons}")
    if warning:
        lines.append(f"note: {warning}")
    lines.append(f"to encode with them: data.captions_from: {log.path.resolve()}")
    return "\n".join(lines)
