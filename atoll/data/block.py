"""Encode one block of a source to one shard: the same code in this process and on Ray's machines."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from atoll.data.image import Framing
from atoll.data.partial import TEXT, PartialEncoding
from atoll.data.pool import Decoders, Framed
from atoll.data.types import Block, Skipped, Source
from atoll.encoders.codec import Codec, build_codec
from atoll.encoders.feature import Feature, build_feature
from atoll.manifest import Manifest
from atoll.runtime.device import best_device, has_bf16
from atoll.storage.shards import OTHERS

# Images per call. A convolutional network on a CPU is fastest on batches that fit its caches.
_BATCH = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Frozen:
    """The frozen networks that encode images, on their device."""

    codec: Codec
    feature: Feature
    device: torch.device
    precision: str  # the codec's: "fp32" or "bf16"
    flips: bool
    framing: Framing

    @staticmethod
    def build(manifest: Manifest, device: torch.device | None = None) -> "Frozen":
        """Build the networks of the manifest. Raises AtollError as `build_codec` and `build_feature` do."""
        data, device = manifest.data, device or best_device()
        # "auto" uses bf16 only where the hardware supports it.
        bf16 = data.precision == "bf16" or (data.precision == "auto" and has_bf16(device))
        codec, feature = build_codec(manifest.codec), build_feature(manifest.feature)
        codec = codec.to(device, torch.bfloat16 if bf16 else torch.float32)
        # Features set the clusters, so they stay in fp32 unless the network is known to tolerate bf16.
        half = bf16 and (feature.takes_bf16 or data.precision == "bf16")
        feature = feature.to(device, torch.bfloat16 if half else torch.float32)
        framing = Framing(data.size, codec.image_channels, data.smallest_side)
        return Frozen(codec, feature, device, "bf16" if bf16 else "fp32", data.flips, framing)

    def __call__(self, pixels: np.ndarray) -> dict[str, Tensor]:
        """Encode images [B, C, h, w] uint8 to columns: latent (float16), feature (float32), with flips latent_flip."""
        images = torch.from_numpy(pixels).to(self.device).float() / 255  # [B,C,h,w]
        # float16 halves the shards.
        columns = {"latent": self.codec.encode(images).half(), "feature": self.feature(images).float()}
        if self.flips:
            columns["latent_flip"] = self.codec.encode(images.flip(-1)).half()
        return {name: column.cpu() for name, column in columns.items()}


@dataclass
class _Good:
    """The good samples of a block so far."""

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
    good, skipped = _Good(), []
    # Hash the files at the same time: the second reader finds them in the page cache.
    with ThreadPoolExecutor(1) as hashing:
        files = hashing.submit(source.record, block)
        for batch in _batches(decoders.frames(source.read(block)), _BATCH.get(frozen.device.type, 8)):
            samples = [sample for sample in batch if isinstance(sample, Framed)]
            bad = [sample for sample in batch if isinstance(sample, Skipped)]
            if samples:
                with torch.inference_mode():
                    columns = frozen(np.stack([sample.pixels for sample in samples]))
                # A sample is good only if all of its columns are finite.
                finite = torch.stack([column.flatten(1).isfinite().all(1) for column in columns.values()]).all(0)
                bad += [
                    Skipped(samples[i].key, "not finite: its latent or feature; mind the codec's shift and scale")
                    for i in (~finite).nonzero().flatten().tolist()
                ]
                good.add(samples, columns, finite.nonzero().flatten())
            skipped += bad
            tell(len(batch) - len(bad), sum(sample.failed for sample in bad))
        columns = {name: torch.cat(parts) for name, parts in good.columns.items()}
        partial.write(number, good.text, good.pixels, columns, skipped, good.notes, files.result())


def _batches(items: Iterable[Framed | Skipped], size: int) -> Iterator[list[Framed | Skipped]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
