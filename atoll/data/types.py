"""Raw samples and the sources that yield them, in blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atoll.data.crop import Box
from atoll.data.fingerprint import FileRecord, Listing, record_files
from atoll.storage.shards import Split

# Start of notes on captions that are beside a sample and were not read.
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
        image: the bytes of an image file, or pixels [C, H, W] uint8 if there is nothing to decode.
        square: of pixels that are no square, the same image as one: what the feature network reads.
        caption: the first one; "" if there is none.
        split: whether the sample trains or is held out.
        notes: parts that were left out or changed; each is a line whose words before ":" or "(" name the kind.
        others: further captions, as `Shard.others` holds them.
        focus: what must stay inside the crop; None if nothing does.
    """

    key: str
    image: bytes | np.ndarray
    caption: str
    split: Split
    notes: tuple[str, ...] = ()
    others: str = ""
    focus: Box | None = None
    square: np.ndarray | None = None


@dataclass(frozen=True)
class Skipped:
    """A sample, or the rest of a block, that cannot be used.

    Attributes:
        key: key of the sample, or name of the block.
        reason: one line; its words before ":" or "(" name the kind.
        failed: whether it counts as a failure; dead links and masks do not and are counted separately.
    """

    key: str
    reason: str
    failed: bool = True


@dataclass(frozen=True)
class Block:
    """A part of a source that is read in one go and becomes one shard: a tar, some row groups, a range of files.

    Attributes:
        name: unique in the source.
        samples: number of samples; None if unknown before reading.
        content: data that the source needs to read it; plain values, so that a block can be sent to another machine.
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
        """Return the blocks in order: the same at every call, without reading an image."""

    @abstractmethod
    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        """Yield the samples of a block in order; damaged ones as `Skipped`. No good sample is lost."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the settings for cards, as plain values."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the data: samples differ only if config or fingerprint do (`atoll.data.fingerprint`)."""

    def notes(self) -> Sequence[str]:
        """Return notes for the user: splits that were recognised, files that are not read."""
        return ()

    def listing(self) -> Listing | None:
        """Return the files that are read, with sizes and times; None for a source without files."""
        return None

    def record(self, block: Block) -> list[FileRecord]:
        """Return size, time and content hash of the files of a block; empty for a source without files."""
        return record_files(self.root, block.files) if block.files else []

    root: str | None = None  # of the files
