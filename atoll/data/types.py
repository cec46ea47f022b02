"""What a source of captioned images is: raw samples, in blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atoll.storage.shards import Split


@dataclass(frozen=True, eq=False)
class Raw:
    """One sample as its source holds it.

    key: unique in the source. image: the bytes of an image file, or its pixels [C,H,W] uint8 where nothing is left to
    decode. caption: "" where there is none.
    """

    key: str
    image: bytes | np.ndarray
    caption: str
    split: Split


@dataclass(frozen=True)
class Skipped:
    """A sample, or the rest of a block, that cannot be used. reason: one line that names what was found."""

    key: str
    reason: str


@dataclass(frozen=True)
class Block:
    """A part of a source that is read in one go and becomes one shard: a tar, some row groups, a range of files.

    name: unique in the source. samples: how many it holds, None where only reading would tell. content: what the
    source needs to read it; plain values, so that a block can be sent to another process or machine.
    """

    name: str
    samples: int | None
    content: Any


class Source(ABC):
    """Captioned images in a fixed order, in blocks. Subclasses are final and can be pickled."""

    name: ClassVar[str]

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The blocks in order: the same at every call, without reading an image."""

    @abstractmethod
    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        """The samples of a block in order, one at a time. What is damaged comes as `Skipped`; nothing good is lost."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what is read: with the same config and fingerprint, the samples are the same."""
