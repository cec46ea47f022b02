"""Fits the components of the targets of representation, once, before the first block is encoded."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from atoll.data.block import Frozen, batches
from atoll.data.partial import PartialEncoding
from atoll.data.pool import Decoders, Framed
from atoll.data.types import Block, Raw, Source
from atoll.data.watch import EncodeProgress
from atoll.encoders.targets import COMPONENTS, Components, FeatureMoments
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest.targets import TargetsSettings
from atoll.randomness import cpu_generator, hashed_seed
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import EncodedCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import INDEX, Shards

SAMPLE = 1024  # images that the components are fitted to; the largest covariance, of 1280 features, needs fewer
_BLOCKS = 16  # of a source, at most, that the sample is read from
_BATCH = 8  # images per call of the network


def components_like(run: Path, settings: TargetsSettings, frozen: Frozen) -> Path | None:
    """Return the file of components that `targets.like` names; None if they are to be fitted.

    Raises:
        AtollError: no targets there, or of another network, number or grid.
    """
    if settings.like is None or frozen.targets is None:
        return None
    named = run / settings.like
    encoded = named if (named / INDEX).is_file() else RunLayout(named).encoded
    there = Shards(encoded).card(EncodedCard).targets
    expected = frozen.targets.record()
    if there is None or there.sha256 is None:
        raise AtollError(f"targets.like: {encoded} stores no targets; name a run that does, or leave it out")
    if (identity(there.feature), there.dims, there.grid) != (expected.feature, expected.dims, expected.grid):
        raise AtollError(
            f"targets.like: {encoded} has targets {_said(there)}, atoll.yaml names {_said(expected)}; make them equal"
        )
    file = encoded / COMPONENTS
    if not file.is_file() or sha256_file(file) != there.sha256:
        raise AtollError(f"{file}: missing or altered; copy it again from where it is intact")
    return file


def with_components(frozen: Frozen, partial: PartialEncoding) -> Frozen:
    """Return the networks with the components that an unfinished encoding holds."""
    if frozen.targets is None:
        return frozen
    components = Components.read(partial.path / COMPONENTS, frozen.targets.dims)
    return replace(frozen, targets=replace(frozen.targets, components=components))


def prepare_components(
    source: Source,
    blocks: Sequence[Block],
    frozen: Frozen,
    partial: PartialEncoding,
    *,
    like: Path | None,
    seed: int,
    workers: int,
    progress: EncodeProgress | None,
) -> Frozen:
    """Write the components into an unfinished encoding, unless it holds them, and return the networks with them.

    They are fitted to `SAMPLE` training images, which the seed determines, from blocks all over the source.

    Args:
        source: reads the blocks.
        blocks: all of them.
        frozen: the networks; without targets, nothing happens.
        partial: the unfinished encoding.
        like: a file of components to take in their place.
        seed: of the sample.
        workers: processes that decode.
        progress: called with a note before a fit.

    Raises:
        AtollError: no training image, or features that vary in too few directions.
    """
    if frozen.targets is None:
        return frozen
    file = partial.path / COMPONENTS
    if like is not None and not file.is_file():
        Components.read(like, frozen.targets.dims).write(file)
    if not file.is_file():
        if progress is not None:
            progress(0, None, f"fitting the targets to at most {SAMPLE:,} images")
        moments = FeatureMoments()
        with Decoders(frozen.framing, workers) as decoders, torch.inference_mode():
            for pixels in _sampled(source, blocks, frozen, decoders, seed):
                images = torch.from_numpy(pixels).to(frozen.device).float() / 255
                moments.add(frozen.targets.feature.patches(images, frozen.targets.grid))
        if not moments.count:
            raise AtollError("targets: the source holds no training image to fit them to; check data.path")
        moments.components(frozen.targets.dims).write(file)
    return with_components(frozen, partial)


def _sampled(
    source: Source, blocks: Sequence[Block], frozen: Frozen, decoders: Decoders, seed: int
) -> Iterator[np.ndarray]:
    """Yield the pixels [b,C,h,w] uint8 of sampled training images, in batches of one shape."""
    # The whole of a block is read, as files are often sorted, but only the sample is decoded.
    order = torch.randperm(len(blocks), generator=cpu_generator(hashed_seed("targets", seed))).tolist()
    quota, left = math.ceil(SAMPLE / max(1, min(len(blocks), _BLOCKS))), SAMPLE
    main = ImageSize(frozen.framing.size, frozen.framing.size)
    for number in order:
        if left <= 0:
            return
        raws = _spread(source, blocks[number], min(quota, left))
        for _, batch in batches(decoders.frames(raws), _BATCH, main):
            if pixels := [sample.pixels for sample in batch if isinstance(sample, Framed)]:
                left -= len(pixels)
                yield np.stack(pixels)


def _spread(source: Source, block: Block, count: int) -> Iterator[Raw]:
    """Yield at most `count` training samples of a block, evenly spaced if their number is known."""
    stride, place, chosen = max(1, (block.samples or 0) // count), 0, 0
    for sample in source.read(block):
        if not isinstance(sample, Raw) or sample.split != "train":
            continue
        if place % stride == 0:
            yield sample
            chosen += 1
        place += 1
        if chosen == count:
            return


def _said(record: object) -> str:
    return str({key: value for key, value in vars(record).items() if key != "sha256"})
