"""Encode one block of a source to one shard: the same code in this process and on Ray's machines."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from atoll.data.crop import Framing
from atoll.data.partial import TEXT, BlockRows, PartialEncoding
from atoll.data.pool import Decoders, Framed
from atoll.data.seal import ShardLayout
from atoll.data.types import Block, Skipped, Source
from atoll.encoders.codec import Codec, build_codec
from atoll.encoders.feature import Feature, build_feature
from atoll.encoders.targets import TargetNetwork
from atoll.image_size import ImageSize
from atoll.manifest import Manifest
from atoll.runtime.device import best_device, has_bf16
from atoll.storage.shards import LATENTS, OTHERS, TARGET

# Images per call. A convolutional network on a CPU is fastest on batches that fit its caches.
_BATCH = {"cpu": 8, "cuda": 64}
_BUFFERS = 1 << 30  # bytes of the rows that wait for their shard, with buckets


@dataclass(frozen=True)
class Frozen:
    """The frozen networks that encode images, on their device."""

    codec: Codec
    feature: Feature
    device: torch.device
    precision: str  # the codec's: "fp32" or "bf16"
    flips: bool
    framing: Framing
    targets: TargetNetwork | None = None  # its components are fitted later, see `atoll.data.targets`

    @staticmethod
    def build(manifest: Manifest, device: torch.device | None = None) -> "Frozen":
        """Build the networks of the manifest. Raises AtollError as `build_codec` and `build_feature` do."""
        data, device = manifest.data, device or best_device()
        # "auto" uses bf16 only where the hardware supports it.
        bf16 = data.precision == "bf16" or (data.precision == "auto" and has_bf16(device))
        codec, feature = build_codec(manifest.codec), build_feature(manifest.feature)
        codec = codec.to(device, torch.bfloat16 if bf16 else torch.float32)

        # Features set the clusters, so they stay in fp32 unless the network is known to tolerate bf16.
        def placed(network: Feature) -> Feature:
            half = bf16 and (network.takes_bf16 or data.precision == "bf16")
            return network.to(device, torch.bfloat16 if half else torch.float32)

        feature, targets, chosen = placed(feature), None, manifest.targets
        if chosen.feature is not None:
            # One network may serve both.
            same = chosen.feature == manifest.feature
            network = feature if same else placed(build_feature(chosen.feature))
            targets = TargetNetwork(network, chosen.dims, chosen.grid)
        framing = Framing(data.size, codec.image_channels, data.smallest_side)
        if data.buckets is not None:
            sizes = data.buckets.table(data.size, manifest.size_step(codec.factor))
            framing = replace(framing, sizes=sizes, max_cut=data.buckets.max_cut)
        return Frozen(codec, feature, device, "bf16" if bf16 else "fp32", data.flips, framing, targets)

    @property
    def layout(self) -> ShardLayout:
        """How the latents are laid out in shards; one of each bucket, twice in memory, stays within `_BUFFERS`."""
        sizes = self.framing.sizes
        if not sizes:
            return ShardLayout()
        shape = (self.codec.channels, *sizes[0].latent(self.codec.factor))
        shapes = dict.fromkeys(LATENTS if self.flips else LATENTS[:1], shape)
        row = 4 * self.feature.dim + 2 * math.prod(shape) * len(shapes)  # bytes
        row += 2 * self.targets.dims * self.targets.grid**2 if self.targets is not None else 0
        return ShardLayout(shapes, max(1, min(ShardLayout().rows, _BUFFERS // (2 * len(sizes) * row))))

    def __call__(self, pixels: np.ndarray, squares: np.ndarray | None = None) -> dict[str, Tensor]:
        """Encode images to columns: latent (float16), feature (float32), with flips latent_flip, with targets target.

        Args:
            pixels: [B, C, h, w] uint8.
            squares: the same images as squares [B, C, size, size] uint8, for the feature; None: `pixels` are.
        """
        images = torch.from_numpy(pixels).to(self.device).float() / 255  # [B,C,h,w]
        square = images if squares is None else torch.from_numpy(squares).to(self.device).float() / 255
        # float16 halves the shards.
        columns = {"latent": self.codec.encode(images).half(), "feature": self.feature(square).float()}
        if self.flips:
            columns["latent_flip"] = self.codec.encode(images.flip(-1)).half()
        # The image as the latent shows it; training mirrors the targets with the latent.
        if self.targets is not None:
            columns[TARGET] = self.targets(images)
        return {name: column.cpu() for name, column in columns.items()}


@dataclass
class _Good:
    """The good samples of one size of a block so far."""

    text: dict[str, list[str]] = field(default_factory=lambda: {"key": [], "caption": [], "split": [], OTHERS: []})
    pixels: list[bytes] = field(default_factory=list)  # hashes
    notes: list[str] = field(default_factory=list)
    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, samples: list[Framed], columns: dict[str, Tensor], rows: Tensor) -> None:
        # `rows` selects the finite samples; text and tensors must stay aligned.
        for i in rows.tolist():
            for name in TEXT:
                self.text[name].append(getattr(samples[i], name))
            self.text[OTHERS].append(samples[i].others)
            self.pixels.append(samples[i].sha)
            self.notes += samples[i].notes
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column[rows])


def encode_block(
    number: int,
    block: Block,
    source: Source,
    frozen: Frozen,
    decoders: Decoders,
    partial: PartialEncoding,
    tell: Callable[[int, int], None] = lambda good, skipped: None,
) -> None:
    """Read, decode and encode a block, and write its shard into `partial`.

    Batches never cross the end of a block, so its bytes do not depend on the process or the order of encoding. A sample
    whose latent or feature is not finite is skipped.

    Args:
        number: number of the block.
        block: the block to encode.
        source: reads the block.
        frozen: the networks.
        decoders: the processes that decode.
        partial: the unfinished encoding to write to.
        tell: called with the numbers of good and failed samples of each batch.
    """
    sizes: dict[ImageSize, _Good] = {}
    skipped: list[Skipped] = []
    main = ImageSize(frozen.framing.size, frozen.framing.size)
    # Hash the files at the same time: the second reader finds them in the page cache.
    with ThreadPoolExecutor(1) as hashing:
        files = hashing.submit(source.record, block)
        frames = decoders.frames(source.read(block))
        for size, batch in batches(frames, _BATCH.get(frozen.device.type, 8), main):
            samples = [sample for sample in batch if isinstance(sample, Framed)]
            bad = [sample for sample in batch if isinstance(sample, Skipped)]
            if samples:
                squares = [sample.square for sample in samples if sample.square is not None]
                with torch.inference_mode():
                    columns = frozen(
                        np.stack([sample.pixels for sample in samples]), np.stack(squares) if squares else None
                    )
                # A sample is good only if all of its columns are finite.
                finite = torch.stack([column.flatten(1).isfinite().all(1) for column in columns.values()]).all(0)
                bad += [
                    Skipped(samples[i].key, "not finite: its latent or feature; mind the codec's shift and scale")
                    for i in (~finite).nonzero().flatten().tolist()
                ]
                sizes.setdefault(size, _Good()).add(samples, columns, finite.nonzero().flatten())
            skipped += bad
            tell(len(batch) - len(bad), sum(sample.failed for sample in bad))
        parts = {
            str(size) if frozen.framing.sizes else "": BlockRows(
                good.text, good.pixels, {name: torch.cat(chunks) for name, chunks in good.columns.items()}
            )
            for size, good in sorted(sizes.items())
        }
        notes = [note for good in sizes.values() for note in good.notes]
        partial.write(number, parts, skipped, notes, files.result())


def batches(
    items: Iterable[Framed | Skipped], count: int, main: ImageSize
) -> Iterator[tuple[ImageSize, list[Framed | Skipped]]]:
    """Group samples of one size; those that are skipped count with the sample before them.

    Args:
        items: the samples.
        count: samples of a batch.
        main: the size of those that are skipped before the first one.
    """
    waiting: dict[ImageSize, list[Framed | Skipped]] = {}
    size = main
    for item in items:
        if isinstance(item, Framed):
            size = ImageSize(*item.pixels.shape[1:])
        batch = waiting.setdefault(size, [])
        batch.append(item)
        if len(batch) == count:
            yield size, waiting.pop(size)
    yield from waiting.items()
