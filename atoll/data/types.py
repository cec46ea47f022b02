"""Raw samples and the sources that give them, in blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atoll.data.fingerprint import FileRecord, Listing, record_files
from atoll.storage.shards import Split

# A note of a sample that begins so says that captions lie beside it and were not read.
UNREAD_CAPTIONS = "captions that were not read"


class Unfit(Exception):
    """A sample that cannot be used; the text is the reason, in one line."""


class Damaged(Exception):
    """A file that cannot be read further; the text is the reason."""


class Oversized(int):
    """In place of a text that is too long for a caption: its length in bytes."""


@dataclass(frozen=True, eq=False)
class Raw:
    """One sample as its source holds it.

    Attributes:
        key: unique in the source.
        image: the bytes of an image file, or its pixels [C,H,W] uint8 where there is nothing to decode.
        caption: "" where there is none.
        split: whether the sample trains or is held out.
        notes: what was left out of it, or changed; each a line whose words before ":" or "(" name the kind.
    """

    key: str
    image: bytes | np.ndarray
    caption: str
    split: Split
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A sample, or the rest of a block, that cannot be used.

    Attributes:
        key: of the sample, or the name of the block.
        reason: one line; its words before ":" or "(" name the kind.
        failed: whether it counts as a failure; a dead link or a mask does not, and is counted apart.
    """

    key: str
    reason: str
    failed: bool = True


@dataclass(frozen=True)
class Block:
    """A part of a source that is read in one go and becomes one shard: a tar, some row groups, a range of files.

    Attributes:
        name: unique in the source.
        samples: how many it holds; None where only reading would tell.
        content: what the source needs to read it; plain values, so that a block can be sent to another machine.
        files: the files, below the source's root, that are read for this block and for no earlier one.
    """

    name: str
    samples: int | None
    content: Any
    files: tuple[str, ...] = ()


class Source(ABC):
    """Captioned images in a fixed order, in blocks. Subclasses are final and can be pickled."""

    name: ClassVar[str]

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The blocks in order: the same at every call, without reading an image."""

    @abstractmethod
    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        """The samples of a block in order, one at a time. Damaged ones come as `Skipped`; no good one is lost."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values for cards."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data: samples differ only where config or fingerprint do (see `atoll.data.fingerprint`)."""

    def notes(self) -> Sequence[str]:
        """What a person should know of the data: splits that were recognised, files that are not read."""
        return ()

    def listing(self) -> Listing | None:
        """The files that are read, with sizes and times; None for a source without files."""
        return None

    def record(self, block: Block) -> list[FileRecord]:
        """Size, time and content hash of the files of a block; empty for a source without files."""
        return record_files(self.root, block.files) if block.files else []

    root: str | None = None  # of the files
