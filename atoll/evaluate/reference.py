"""The real images that drawn ones are compared with, in every feature space, and the cache of their features."""

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
from atoll.storage.shards import hash_of_keys

FORMAT = 1


class ReferenceData:
    """Two disjoint sets of real images.

    All drawn images are compared with the base. The probe provides the prompts and the score of a perfect model.

    Attributes:
        probe, base: their rows.
        captions: of the probe.
        spaces: the pixels' principal components, then the spaces of the settings.
        published: for each space, its reference statistics if the settings name some, else None.
        key: hash of everything that these depend on; numbers with one key are comparable image by image.

    Raises:
        AtollError: too few real images; weights or reference statistics of a feature network are missing or belong to
            another network.
    """

    def __init__(self, reference: Reference, settings: EvaluateSettings, directory: Path):
        # The images, and the feature networks with their published statistics.
        self.reference, self.settings = reference, settings
        self.probe, self.base = reference.split(settings)
        self.captions = reference.captions(self.probe)
        self._networks = [build_space_feature(space.feature) for space in settings.spaces]
        self._published = self._load_statistics()
        # The cache, with a number for every distinct prompt.
        self._store = ResultCache(directory, self._describe())
        self.key = self._store.key
        # `atoll compare` pairs images of equal prompts.
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        self._store.part("prompts", lambda: {"number": torch.tensor([numbers[caption] for caption in self.captions])})
        # The fitted spaces.
        self.spaces = self._spaces()
        self.published = self._project_statistics()

    def _describe(self) -> dict[str, Any]:
        """Everything that the features and their comparison depend on: its hash is the key."""
        s = self.settings
        # Of the settings, those that the features and the noise depend on.
        keys = ("seed", "images", "reference", "components", "batch", "held_out", "levels")
        left_out = self.reference.encoded.left_out_keys
        return {
            **({"skip": hash_of_keys(left_out)} if left_out else {}),
            "format": FORMAT,
            "encoded": self.reference.encoded.sha256,
            "codec": [identity(self.reference.codec.config()), s.precision],
            **{key: getattr(s, key) for key in keys},
            "spaces": [
                [identity(network.config()), space.components, *([] if gaussian is None else [gaussian.sha256])]
                for network, space, gaussian in zip(self._networks, s.spaces, self._published, strict=True)
            ],
        }

    def _spaces(self) -> list[Features]:
        """The pixels' space and the settings' ones; those not yet cached are fitted in one pass over the base."""
        # The spaces that need a fit: the pixels', and projections without published statistics.
        requested = list(enumerate(zip(self._networks, self.settings.spaces, self._published, strict=True)))
        fits: dict[str, PixelFit | SpaceFit] = {"pixels": PixelFit(self.settings.components)}
        for number, (feature, space, gaussian) in requested:
            if space.components is not None and gaussian is None:
                fits[f"space-{number}"] = SpaceFit(feature, space.components)
        # Fit those that are not cached.
        missing = [fit for name, fit in fits.items() if not self._store.has(name)]
        for rows in self.base.split(self.settings.batch) if missing else ():
            images = self.reference.images(rows)
            # Decode each batch once for all fits.
            for fit in missing:
                fit.update(images)
        # Build every space from its fit, from published statistics, or from the network alone.
        spaces: list[Features] = [_load_pixels(self._store.part("pixels", partial(_tensors_of, fits["pixels"])))]
        for number, (feature, space, gaussian) in requested:
            name = f"space-{number}"
            # Published statistics define the space themselves.
            if gaussian is not None:
                spaces.append(FeatureSpace.of(feature, gaussian, space.components))
                continue
            # No projection: the features themselves.
            if name not in fits:
                spaces.append(FeatureSpace(feature))
                continue
            # Load the fitted projection, or cache the new one.
            part = self._store.part(name, partial(_tensors_of, fits[name]))
            spaces.append(FeatureSpace(feature, part["mean"], part["basis"], float(part["explained"])))
        return spaces

    def _load_statistics(self) -> list[Gaussian | None]:
        """Published statistics for each space of the settings, or None."""
        files = [space.statistics for space in self.settings.spaces]
        # Without statistics, no image has to be decoded for its size.
        if not any(files):
            return [None] * len(files)
        # Statistics are valid for one image size.
        shape = self.reference.images(self.base[:1]).shape[1:]  # [C,h,w]
        return [
            None if file is None else load_gaussian(_expand(file), feature, shape)
            for file, feature in zip(files, self._networks, strict=True)
        ]

    def _project_statistics(self) -> list[Gaussian | None]:
        """The published statistics within each space; pixels have none."""
        published: list[Gaussian | None] = [None]
        for space, gaussian in zip(self.spaces[1:], self._published, strict=True):
            assert isinstance(space, FeatureSpace)
            published.append(None if gaussian is None else space.seen(gaussian))
        return published

    def features(self, images: Tensor) -> TensorDict:
        """Features of images [B, c, h, w] in every space, by the space's number."""
        return {str(i): space(images) for i, space in enumerate(self.spaces)}

    def statistics(self, which: str, run: MapFunction) -> list[Statistics]:
        """Statistics of the "probe" or the "base" in every space; missing batches are computed through `run`."""
        # Both sets are cached in parts of one batch.
        rows = self.probe if which == "probe" else self.base

        def load_or_compute(numbered: tuple[int, Tensor]) -> TensorDict:
            # The images are decoded only if the part is not cached.
            number, part = numbered
            return self._store.part(f"{which}-{number:05d}", lambda: self.features(self.reference.images(part)))

        # Sum up in the order of the batches, so that the result does not depend on the workers.
        result = [Statistics(space.dim, self.settings.max_features) for space in self.spaces]
        for part in run(load_or_compute, enumerate(rows.split(self.settings.batch))):
            for number, statistics in enumerate(result):
                statistics.update(part[str(number)])
        return result


def _expand(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _tensors_of(fit: PixelFit | SpaceFit) -> TensorDict:
    """The tensors of a finished fit, for the cache."""
    # A fit always has a projection; whole spaces are not fitted.
    fitted = fit.done()
    assert fitted.mean is not None
    assert fitted.basis is not None
    about = {"mean": fitted.mean, "basis": fitted.basis}
    # The pixels' space also has a pooling size.
    if isinstance(fitted, PixelPCA):
        return {**about, "numbers": torch.tensor([fitted.pool, fitted.explained], dtype=torch.float64)}
    return {**about, "explained": torch.tensor([fitted.explained], dtype=torch.float64)}


def _load_pixels(part: TensorDict) -> PixelPCA:
    """The pixels' space from its cached tensors."""
    pool, explained = part["numbers"].tolist()
    return PixelPCA(part["mean"], part["basis"], int(pool), explained)
