"""Sources of captioned images, and the stage that encodes them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from atoll.errors import AtollError


@dataclass(frozen=True, eq=False)
class Images:
    """Some captioned images of a source.

    keys: unique in the source. splits: "train" or "val" per image. images: [B,C,H,W] float32 in [0,1].
    """

    keys: list[str]
    captions: list[str]
    splits: list[str]
    images: Tensor

    def __len__(self) -> int:
        return len(self.keys)


class Source(ABC):
    """Captioned images in a fixed order. Subclasses are final; `build_source` makes one again from its config."""

    name: ClassVar[str]

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def batches(self, size: int) -> Iterator[Images]:
        """All images in order, `size` at a time, so that they never are in memory together."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of what is read: with the same config and fingerprint, the images are the same."""


def build_source(config: Mapping[str, Any]) -> Source:
    """The source that a config describes. Raises AtollError for an unknown name, key or value."""
    from atoll.data.glyphs import Glyphs, GlyphsConfig

    if config.get("name") != Glyphs.name:
        raise AtollError(f"unknown source {config.get('name')!r}; expected {Glyphs.name!r}")
    checked = GlyphsConfig.parse(config)
    return Glyphs(checked.subset, checked.size)
