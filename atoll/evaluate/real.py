"""The real pictures that drawn ones are compared with, in every feature space, and where that is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.evaluate.measure import Reference, Run
from atoll.evaluate.metrics import Features, PixelPCA
from atoll.evaluate.picture_metrics import Statistics
from atoll.evaluate.spaces import FeatureSpace, build_space, build_space_feature
from atoll.evaluate.store import Part, Store
from atoll.manifest import EvaluateSettings, SpaceSettings
from atoll.weights import identity

FORMAT = 1


class Real:
    """Two disjoint sets of real pictures: the base, which all are compared with, and the probe, which gives the prompts
    and what a perfect model scores.

    Attributes:
        probe, base: their rows.
        captions: of the probe.
        spaces: the pixels' principal components, then those that the settings name.
        key: of all that these depend on: numbers of one key may be compared picture by picture.

    Raises:
        AtollError: too few real pictures; weights of a feature network that are not found, or of another.
    """

    def __init__(self, reference: Reference, settings: EvaluateSettings, directory: Path):
        self.reference, self.settings = reference, settings
        self.probe, self.base = reference.split(settings)
        self.captions = reference.captions(self.probe)
        self._features = [build_space_feature(space.feature) for space in settings.spaces]
        self._store = Store(directory, self._about())
        self.key = self._store.key
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        self._store.part("prompts", lambda: {"number": torch.tensor([numbers[caption] for caption in self.captions])})
        self.spaces = [self._pixels(), *(self._space(i, space) for i, space in enumerate(settings.spaces))]

    def _about(self) -> dict[str, Any]:
        s = self.settings
        keys = ("seed", "images", "reference", "components", "batch", "held_out", "levels")
        return {
            "format": FORMAT,
            "encoded": self.reference.encoded.sha256,
            "codec": [identity(self.reference.codec.config()), s.precision],
            **{key: getattr(s, key) for key in keys},
            "spaces": [
                [identity(feature.config()), space.components]
                for feature, space in zip(self._features, s.spaces, strict=True)
            ],
        }

    def _base_images(self) -> Iterator[Tensor]:
        return (self.reference.images(rows) for rows in self.base.split(self.settings.batch))

    def _pixels(self) -> PixelPCA:
        def fit() -> Part:
            found = PixelPCA.fit(self._base_images(), self.settings.components)
            numbers = torch.tensor([found.pool, found.explained], dtype=torch.float64)
            return {"mean": found.mean, "basis": found.basis, "numbers": numbers}

        part = self._store.part("pixels", fit)
        pool, explained = part["numbers"].tolist()
        return PixelPCA(part["mean"], part["basis"], int(pool), explained)

    def _space(self, number: int, asked: SpaceSettings) -> Features:
        feature = self._features[number]
        if asked.components is None:
            return FeatureSpace(feature)

        def fit() -> Part:
            found = build_space(asked, self._base_images())
            assert found.mean is not None
            assert found.basis is not None
            explained = torch.tensor([found.explained], dtype=torch.float64)
            return {"mean": found.mean, "basis": found.basis, "explained": explained}

        part = self._store.part(f"space-{number}", fit)
        return FeatureSpace(feature, part["mean"], part["basis"], float(part["explained"]))

    def seen(self, images: Tensor) -> Part:
        """Features of pictures [B, c, h, w] in every space, by its number."""
        return {str(i): space(images) for i, space in enumerate(self.spaces)}

    def statistics(self, which: str, run: Run) -> list[Statistics]:
        """Of the "probe" or the "base" in every space; batch by batch, those that are not there yet by `run`."""
        rows = self.probe if which == "probe" else self.base

        def make(numbered: tuple[int, Tensor]) -> Part:
            number, part = numbered
            return self._store.part(f"{which}-{number:05d}", lambda: self.seen(self.reference.images(part)))

        found = [Statistics(space.dim, self.settings.kept) for space in self.spaces]
        for part in run(make, enumerate(rows.split(self.settings.batch))):
            for number, statistics in enumerate(found):
                statistics.update(part[str(number)])
        return found
