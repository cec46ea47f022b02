"""The real images that drawn ones are compared with, in every feature space, and where that is kept."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.encoders.weights import identity
from atoll.evaluate.metrics.frechet import Features, PixelFit, PixelPCA
from atoll.evaluate.metrics.gaussian import Gaussian, load_gaussian
from atoll.evaluate.metrics.image_metrics import Statistics
from atoll.evaluate.metrics.spaces import FeatureSpace, SpaceFit, build_space_feature
from atoll.evaluate.store import ResultCache, TensorDict
from atoll.evaluate.types import MapFunction, Reference
from atoll.manifest import EvaluateSettings

FORMAT = 1


class ReferenceData:
    """Two disjoint sets of real images: the base, which all are compared with, and the probe, which gives the prompts
    and what a perfect model scores.

    Attributes:
        probe, base: their rows.
        captions: of the probe.
        spaces: the pixels' principal components, then those that the settings name.
        published: for each space the reference statistics that its settings name, in that space; or None.
        key: of all that these depend on: numbers of one key may be compared image by image.

    Raises:
        AtollError: too few real images; weights of a feature network that are not found, or of another; reference
            statistics likewise.
    """

    def __init__(self, reference: Reference, settings: EvaluateSettings, directory: Path):
        self.reference, self.settings = reference, settings
        self.probe, self.base = reference.split(settings)
        self.captions = reference.captions(self.probe)
        self._features = [build_space_feature(space.feature) for space in settings.spaces]
        self._published = self._load_statistics()
        self._store = ResultCache(directory, self._about())
        self.key = self._store.key
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        self._store.part("prompts", lambda: {"number": torch.tensor([numbers[caption] for caption in self.captions])})
        self.spaces = self._spaces()
        self.published = self._seen_statistics()

    def _about(self) -> dict[str, Any]:
        s = self.settings
        keys = ("seed", "images", "reference", "components", "batch", "held_out", "levels")
        return {
            "format": FORMAT,
            "encoded": self.reference.encoded.sha256,
            "codec": [identity(self.reference.codec.config()), s.precision],
            **{key: getattr(s, key) for key in keys},
            "spaces": [
                [identity(feature.config()), space.components, *([] if given is None else [given.sha256])]
                for feature, space, given in zip(self._features, s.spaces, self._published, strict=True)
            ],
        }

    def _spaces(self) -> list[Features]:
        """The pixels' and the settings'; those that are not fitted yet, in one pass over the base."""
        asked = list(enumerate(zip(self._features, self.settings.spaces, self._published, strict=True)))
        fits: dict[str, PixelFit | SpaceFit] = {"pixels": PixelFit(self.settings.components)}
        for number, (feature, space, given) in asked:
            if space.components is not None and given is None:
                fits[f"space-{number}"] = SpaceFit(feature, space.components)
        missing = [fit for name, fit in fits.items() if not self._store.has(name)]
        for rows in self.base.split(self.settings.batch) if missing else ():
            images = self.reference.images(rows)
            for fit in missing:
                fit.update(images)
        found: list[Features] = [_load_pixels(self._store.part("pixels", partial(_done, fits["pixels"])))]
        for number, (feature, space, given) in asked:
            name = f"space-{number}"
            if given is not None:
                found.append(FeatureSpace.of(feature, given, space.components))
                continue
            if name not in fits:
                found.append(FeatureSpace(feature))
                continue
            part = self._store.part(name, partial(_done, fits[name]))
            found.append(FeatureSpace(feature, part["mean"], part["basis"], float(part["explained"])))
        return found

    def _load_statistics(self) -> list[Gaussian | None]:
        """For each space that the settings name."""
        files = [space.statistics for space in self.settings.spaces]
        if not any(files):
            return [None] * len(files)
        shape = self.reference.images(self.base[:1]).shape[1:]  # [C,h,w]
        return [
            None if file is None else load_gaussian(_path(file), feature, shape)
            for file, feature in zip(files, self._features, strict=True)
        ]

    def _seen_statistics(self) -> list[Gaussian | None]:
        found: list[Gaussian | None] = [None]  # nobody publishes those of our pixels
        for space, given in zip(self.spaces[1:], self._published, strict=True):
            assert isinstance(space, FeatureSpace)
            found.append(None if given is None else space.seen(given))
        return found

    def seen(self, images: Tensor) -> TensorDict:
        """Features of images [B, c, h, w] in every space, by its number."""
        return {str(i): space(images) for i, space in enumerate(self.spaces)}

    def statistics(self, which: str, run: MapFunction) -> list[Statistics]:
        """Of the "probe" or the "base" in every space; batch by batch, those that are not there yet by `run`."""
        rows = self.probe if which == "probe" else self.base

        def make(numbered: tuple[int, Tensor]) -> TensorDict:
            number, part = numbered
            return self._store.part(f"{which}-{number:05d}", lambda: self.seen(self.reference.images(part)))

        found = [Statistics(space.dim, self.settings.max_features) for space in self.spaces]
        for part in run(make, enumerate(rows.split(self.settings.batch))):
            for number, statistics in enumerate(found):
                statistics.update(part[str(number)])
        return found


def _path(given: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(given)))


def _done(fit: PixelFit | SpaceFit) -> TensorDict:
    fitted = fit.done()
    assert fitted.mean is not None
    assert fitted.basis is not None
    about = {"mean": fitted.mean, "basis": fitted.basis}
    if isinstance(fitted, PixelPCA):
        return {**about, "numbers": torch.tensor([fitted.pool, fitted.explained], dtype=torch.float64)}
    return {**about, "explained": torch.tensor([fitted.explained], dtype=torch.float64)}


def _load_pixels(part: TensorDict) -> PixelPCA:
    pool, explained = part["numbers"].tolist()
    return PixelPCA(part["mean"], part["basis"], int(pool), explained)
