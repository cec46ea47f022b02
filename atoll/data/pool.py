"""Decode images in parallel worker processes: in order, in bounded memory, and safe against decoder crashes."""

import hashlib
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from atoll.data.containers import Unusable
from atoll.data.crop import Decode, Focused, Frames, Framing, decoded
from atoll.data.image import frames
from atoll.data.types import Raw, Skipped
from atoll.errors import AtollError
from atoll.runtime.process import Crashed, Remote
from atoll.storage.shards import Split

CHUNK = 32  # images sent to a process together
CHUNK_BYTES = 8 << 20  # limit for their files; photographs straight from a camera are sent in twos
AHEAD = 3  # chunks per process that are queued, in work, or done and not yet consumed


@dataclass(frozen=True, eq=False)
class Framed:
    """A sample whose image is decoded.

    Attributes:
        pixels: [C,h,w] uint8.
        square: [C,size,size] uint8, what the feature network reads; None if that is `pixels`.
        sha: 16 bytes, BLAKE2b of the pixels.
    """

    key: str
    caption: str
    split: Split
    pixels: np.ndarray
    sha: bytes
    notes: tuple[str, ...] = ()
    others: str = ""
    square: np.ndarray | None = None


class Decoders:
    """Worker processes that decode images; a context manager that stops them on exit.

    Args:
        framing: format of every decoded image.
        workers: number of processes; with 0 all decoding runs in this process, and a crash ends it too.
        decode: converts the bytes of a file to pixels, or raises Unusable; the processes import it by name.
    """

    def __init__(self, framing: Framing, workers: int, decode: Decode = frames):
        if workers < 0:
            raise ValueError(f"the number of workers is 0 or more; got {workers}")
        self._framing, self._workers = framing, workers
        self._decode = partial(decoded, decode, framing)
        self._closed = False
        if workers:
            # A thread for each process waits for its answers while the main thread continues.
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decoder")
            self._remotes = [Remote(self._decode) for _ in range(workers)]
            self._idle: queue.SimpleQueue[Remote] = queue.SimpleQueue()
            for remote in self._remotes:
                self._idle.put(remote)

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        if self._workers:
            self._kill()  # frees the threads that wait for an answer
            self._threads.shutdown(cancel_futures=True)
            self._kill()  # one that a thread has started meanwhile

    def frames(self, raws: Iterable[Raw | Skipped]) -> Iterator[Framed | Skipped]:
        """Yield the samples decoded, in order; `raws` is read only far enough ahead to keep the processes busy.

        An image that cannot be used becomes Skipped with the reason. So does one that crashes its process: the others
        of its chunk are decoded again. Pixels that need no decoding pass unchanged.

        Raises:
            AtollError: pixels of another shape than the framing's, or processes that cannot be started.
        """
        if not self._workers:
            for raw in raws:
                yield from self._join([raw], [_outcome(self._decode, file) for file in _files([raw])])
            return
        # Futures are consumed in the order of submission, so results keep the order of `raws`.
        waiting: deque[Future[list[Framed | Skipped]]] = deque()
        try:
            for chunk in _chunks(raws):
                waiting.append(self._threads.submit(self._work, chunk))
                # A full queue blocks reading: this bounds the memory.
                if len(waiting) >= AHEAD * self._workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            # The consumer stopped or an error was raised: do not start chunks that nobody will take.
            for future in waiting:
                future.cancel()

    def _work(self, chunk: list[Raw | Skipped]) -> list[Framed | Skipped]:
        """Decode a chunk in an idle process; runs in a thread."""
        remote = self._idle.get()
        try:
            return self._join(chunk, self._map(remote, _files(chunk)))
        finally:
            self._idle.put(remote)

    def _map(self, remote: Remote, files: list[Focused]) -> list[Any]:
        """Return pixels or an exception per file. If the process crashes, retry each file alone to find the cause."""
        if not files:
            return []
        try:
            return remote.map(files)
        except Crashed:
            outcomes: list[Any] = []
        # Crashes are rare, so the slow search for the file costs little.
        for file in files:
            # Closing kills the processes, which looks like a crash; do not restart them.
            if self._closed:
                raise Crashed("closed")
            try:
                outcomes += remote.map([file])
            except Crashed as crash:
                outcomes.append(Unusable(f"its decoder crashed ({crash})"))
        return outcomes

    def _join(self, chunk: list[Raw | Skipped], outcomes: Iterable[Any]) -> list[Framed | Skipped]:
        """Combine the samples of a chunk with the outcomes of their files, one per file."""
        outcome = iter(outcomes)
        return [raw if isinstance(raw, Skipped) else self._framed(raw, outcome) for raw in chunk]

    def _framed(self, raw: Raw, outcomes: Iterator[Any]) -> Framed | Skipped:
        outcome = next(outcomes) if isinstance(raw.image, bytes) else self._plain(raw.image, raw.square)
        if isinstance(outcome, Unusable):
            return Skipped(raw.key, str(outcome))
        # Anything but Unusable is an error in the decoder itself.
        if isinstance(outcome, Exception):
            raise outcome
        pixels, square = outcome
        if pixels.shape not in self._framing.shapes or pixels.dtype != np.uint8:
            expected = " or ".join(str(list(shape)) for shape in sorted(self._framing.shapes))
            raise AtollError(
                f"image {raw.key!r} is {pixels.dtype} {list(pixels.shape)}, asked for is uint8 {expected}; "
                "choose the source's size, and a codec that takes its channels"
            )
        # Hash decoded pixels: copies in other containers count as duplicates only if their pixels are equal.
        digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16)
        # White pages of two shapes may have equal bytes.
        if self._framing.sizes:
            digest.update(repr(pixels.shape).encode())
        return Framed(raw.key, raw.caption, raw.split, pixels, digest.digest(), raw.notes, raw.others, square)

    def _plain(self, *arrays: np.ndarray | None) -> Frames:
        """Return pixels that need no decoding; grey ones as RGB where that is expected, as of files."""
        colours = self._framing.channels
        image, square = (a if a is None or len(a) != 1 else a.repeat(colours, axis=0) for a in arrays)
        assert image is not None
        return Frames(image, square)

    def _kill(self) -> None:
        for remote in self._remotes:
            remote.kill()


def _outcome(decode: Callable[[Focused], Frames], file: Focused) -> Frames | Unusable:
    try:
        return decode(file)
    except Unusable as unusable:
        return unusable


def _files(chunk: list[Raw | Skipped]) -> list[Focused]:
    return [(raw.image, raw.focus) for raw in chunk if isinstance(raw, Raw) and isinstance(raw.image, bytes)]


def _chunks(raws: Iterable[Raw | Skipped]) -> Iterator[list[Raw | Skipped]]:
    """Group samples by CHUNK, or fewer once their files reach CHUNK_BYTES."""
    chunk: list[Raw | Skipped] = []
    size = 0
    for raw in raws:
        chunk.append(raw)
        size += len(raw.image) if isinstance(raw, Raw) and isinstance(raw.image, bytes) else 0
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
