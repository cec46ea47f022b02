"""Images and captions -> encoded/: shards of latents and features, the captions beside them: `atoll encode`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.codec import Codec, build_codec
from atoll.condition import Encoder, build_encoder
from atoll.data import Images, Source, build_source
from atoll.errors import AtollError
from atoll.feature import Feature, build_feature
from atoll.manifest import Manifest
from atoll.shards import INDEX, Shards, ShardWriter

Progress = Callable[[int, int, str], None]  # (images done, images in all, a note)


def encode_run(run: Path, manifest: Manifest, force: bool = False, progress: Progress | None = None) -> str:
    """Encodes the manifest's data into `run`/encoded and says in a line what was done.

    Raises:
        AtollError: as `encode`; or an unknown codec, condition encoder or feature.
    """
    data, out = manifest.data, run / "encoded"
    source = build_source({"name": data.source, "subset": data.subset, "size": data.size})
    parts = build_codec(manifest.codec), build_feature(manifest.feature), build_encoder(manifest.condition)
    written = encode(source, out, *parts, force=force, progress=progress)
    return f"{out} {'written' if written else 'is there already'}: {len(source):,} images"


def encode(
    source: Source,
    out: Path,
    codec: Codec,
    feature: Feature,
    encoder: Encoder,
    *,
    batch: int = 256,
    shard_rows: int = 4096,
    force: bool = False,
    progress: Progress | None = None,
) -> bool:
    """Writes `out`: columns latent (float16) and feature (float32), captions as text. Streams; twice gives equal bytes.

    The index's card tells source, codec, condition encoder and feature. If `out` already holds these very images,
    encoded in this very way, nothing is done.

    Args:
        encoder: only its config is kept; captions are encoded in training, on the fly.
        batch: images at a time. shard_rows: rows per file.
        force: replace an earlier encoding.

    Returns:
        Whether something was written.

    Raises:
        AtollError: `out` holds another encoding or anything else, an image gives NaN or infinity, the disk is full.
    """
    card = {
        "source": {**source.config(), "sha256": source.fingerprint()},
        "codec": codec.config(),
        "condition": encoder.config(),
        "feature": feature.config(),
    }
    if not force and _is_there(out, card):
        return False
    start, done = time.perf_counter(), 0
    with ShardWriter(out, card, shard_rows) as writer, torch.inference_mode():
        for part in source.batches(batch):
            latent = _finite(codec.encode(part.images).half(), part, "latent")
            columns = {"latent": latent, "feature": _finite(feature(part.images), part, "feature")}
            writer.append(part.keys, part.captions, part.splits, columns)
            done += len(part)
            if progress is not None:
                progress(done, len(source), f"{done / (time.perf_counter() - start):,.0f} images/s")
    return True


def _is_there(out: Path, card: dict[str, Any]) -> bool:
    """Whether `out` holds shards with this card. Raises AtollError if it holds shards with another."""
    if not (out / INDEX).is_file():
        return False
    found = Shards(out).card
    for key in card:
        if found.get(key) != card[key]:
            raise AtollError(
                f"{out}: was encoded with {key} {found.get(key)}, asked for is {card[key]}; "
                "replace it with --force, or name another run"
            )
    return True


def _finite(column: Tensor, part: Images, what: str) -> Tensor:
    bad = ~column.flatten(1).isfinite().all(1)
    if bad.any():
        key = part.keys[int(bad.nonzero()[0])]
        raise AtollError(f"the {what} of image {key!r} is not finite; check the image, and the codec's shift and scale")
    return column
