"""The stage `atoll statistics`: reference statistics of a run's images, for others to compare with."""

from collections.abc import Callable
from pathlib import Path

import torch

from atoll.encoders.codec import build_codec
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import Moments
from atoll.evaluate.metrics.gaussian import save_gaussian
from atoll.evaluate.metrics.spaces import LABELS, build_space_feature, hash_of
from atoll.manifest import Manifest
from atoll.storage.layout import RunLayout
from atoll.storage.shards import LATENTS, Shards

StatisticsProgress = Callable[[int, int], None]  # (images done, images in all)


@torch.inference_mode()
def statistics_run(run: Path, manifest: Manifest, out: Path, progress: StatisticsProgress | None = None) -> list[Path]:
    """Write mean and covariance of the run's training images, for every feature in `evaluate.spaces`.

    The images are decoded from encoded/, like those that `atoll evaluate` compares with. Memory does not grow with
    their number.

    Args:
        run: directory of the run.
        manifest: its atoll.yaml.
        out: output directory; a file is named after its feature and hash ("MNv2-3fa9c2d1.safetensors").
        progress: called after each batch.

    Returns:
        The files, one per feature.

    Raises:
        AtollError: `evaluate.spaces` is empty, encoded/ is missing or holds fewer than two training images, or
            features are not finite.
    """
    # Check the features and the data.
    features = [build_space_feature(space.feature) for space in manifest.evaluate.spaces]
    if not features:
        raise AtollError(f"{run}: evaluate.spaces is empty; name a feature, such as [{{feature: {{name: hog}}}}]")
    encoded = Shards(RunLayout(run).encoded)
    # Held-out images are left out, as in the evaluation's base, and images of another size than the main one.
    rows = encoded.rows("train", LATENTS[0])
    if len(rows) < 2:
        raise AtollError(f"{encoded.path}: {len(rows)} training images; expected at least 2")
    # Sum up batch by batch.
    trust = manifest.trust_in_cards(run)
    codec, sums, shape, done = build_codec(encoded.data_card.codec, trust), [Moments(f.dim) for f in features], None, 0
    for part in rows.split(manifest.evaluate.batch):
        # One decoding serves all features.
        images = codec.decode(encoded.read("latent", part).float())  # [B,C,H,W]
        for feature, moments in zip(features, sums, strict=True):
            moments.update(feature(images))
        # The files also record the image size.
        shape, done = tuple(images.shape[1:]), done + len(part)
        if progress is not None:
            progress(done, len(rows))
    assert shape is not None
    # Non-finite features would make every distance NaN.
    broken = [feature.name for feature, moments in zip(features, sums, strict=True) if not moments.finite]
    if broken:
        raise AtollError(f"the feature {broken[0]!r} of these images is not finite; check the data")
    # Write one file per feature, with a description of the images.
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{LABELS[feature.name]}-{hash_of(feature)[:8]}.safetensors" for feature in features]
    about = f"{len(rows)} training images of {encoded.sha256}"
    for file, feature, moments in zip(files, features, sums, strict=True):
        save_gaussian(file, moments, feature, shape, about)
    return files
