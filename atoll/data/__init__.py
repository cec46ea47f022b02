"""Sources of captioned pictures, and the stage that encodes them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.shards import Split


@dataclass(frozen=True, eq=False)
class Raw:
    """One sample as its source holds it.

    key: unique in the source. image: the bytes of a picture file, or its pixels [C,H,W] uint8 where nothing is left to
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
    """Captioned pictures in a fixed order, in blocks. Subclasses are final and can be pickled."""

    name: ClassVar[str]

    @abstractmethod
    def blocks(self) -> Sequence[Block]:
        """The blocks in order: the same at every call, without reading a picture."""

    @abstractmethod
    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        """The samples of a block in order, one at a time. What is damaged comes as `Skipped`; nothing good is lost."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what is read: with the same config and fingerprint, the samples are the same."""


def build_source(data: DataSettings) -> Source:
    """The source that the manifest's `data` section describes.

    Raises:
        AtollError: a path that does not exist or holds nothing, a column that is not there, a missing package.
    """
    if data.source == "glyphs":
        from atoll.data.glyphs import Glyphs

        return Glyphs(data.subset, data.size)
    if data.path is None:
        raise AtollError(f"data.source is {data.source!r} and data.path is not set; set it to where the pictures are")
    if data.source == "folder":
        from atoll.data.folder import Folder

        return Folder(data)
    if data.source == "webdataset":
        from atoll.data.tars import Tars

        return Tars(data)
    from atoll.data.parquet import Parquet

    return Parquet(data)
