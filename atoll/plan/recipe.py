"""Shapes, widths and counts from a manifest, before any image is read or any frozen network loaded."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest import ExpertSettings, Manifest, MonolithSettings, TrainSettings
from atoll.plan.cost import NetworkSizes, RouterSizes, sizes_of
from atoll.plan.fit import Switches
from atoll.plan.targets_cost import target_bytes
from atoll.storage.layout import RunLayout

CAPTION_BYTES = 120  # a web caption of some 20 words; captions are stored as text
T5_WIDTHS = {"small": 512, "base": 768, "large": 1024, "xl": 2048, "xxl": 4096}  # of v1.1's encoders
# Hidden widths of Gemma 2 2B, Mistral Small 3 and Qwen 2.5 VL 7B. FLUX.2 [klein] exists with two.
LANGUAGE_MODEL_WIDTHS = dict.fromkeys(("prx", "sana", "lumina2"), 2304) | {"flux2": 5120, "qwenimage": 3584}


@dataclass(frozen=True)
class Text:
    """The sizes of an encoded caption: T tokens, S wide, and a pooled vector P wide or None."""

    tokens: int
    dim: int
    pooled: int | None


def parse_text(words: str) -> Text:
    """Parse "77x768", tokens and width of a caption, or "77x768x768" with a pooled vector.

    Raises:
        AtollError: anything else.
    """
    # Both sizes have a bound, so that no plan computes with absurd ones.
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", words)
    if match is None:
        raise AtollError(f"--text {words!r}: expected tokens and width of a caption, such as 77x768 (or 77x768x768)")
    return Text(int(match[1]), int(match[2]), int(match[3]) if match[3] else None)


def _local_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json beside weights on this machine; empty if there is none."""
    from atoll.storage.artifact import read_json  # imports torch

    # A repository of the hub is not on this machine, and nothing is downloaded for a plan.
    place = os.path.expanduser(os.path.expandvars(str(config.get("weights", ""))))
    file = Path(place) / str(config.get("subfolder", "")) / "config.json"
    return read_json(file) if place and file.is_file() else {}


def text_of(condition: Mapping[str, Any]) -> Text:
    """The sizes of a condition encoder's output, from its config.

    Raises:
        AtollError: the widths are known only once the encoder is loaded.
    """
    # Each encoder states its widths in another way.
    name = condition.get("name")
    if name in ("hash", "wordllama"):
        tokens, dim = {"hash": (16, 64), "wordllama": (32, 256)}[name]
        tokens, dim = int(condition.get("length", tokens)), int(condition.get("dim", dim))
        return Text(tokens, dim, dim)
    if name == "clip":  # CLIP-L/14, unless the weights are on this machine
        local = _local_config(condition)
        local = local.get("text_config", local)
        dim = int(local.get("hidden_size", 768))
        pooled = dim if condition.get("pooled", "last") == "last" else int(local.get("projection_dim", dim))
        return Text(int(condition.get("length") or local.get("max_position_embeddings", 77)), dim, pooled)
    if name == "label":
        from atoll.encoders.text.label import read_labels  # imports torch

        labels = condition.get("labels", ())
        dim = len(read_labels(labels if isinstance(labels, str | int) else tuple(labels)))
        return Text(1, dim, dim)
    if name == "t5":
        # T5's width follows from its size's name, unless a config.json is here.
        size = re.search(r"(small|base|large|xxl|xl)", str(condition.get("weights", "")).lower())
        width = _local_config(condition).get("d_model") or (T5_WIDTHS[size[1]] if size else None)
        if width:
            return Text(int(condition.get("length", 120)), int(width), None)
    # The text encoders of diffusers' pipelines: the published widths, unless their config.json are here.
    if name == "sd3":
        return Text(77 + int(condition.get("length") or 256), 4096, 2048)
    if name == "flux":
        return Text(int(condition.get("length") or 512), 4096, 768)
    if (language_model := _language_model(condition)) is not None:
        return language_model
    raise AtollError(f"condition {dict(condition)}: its widths are known only once it is loaded; give --text 77x768")


def _language_model(condition: Mapping[str, Any]) -> Text | None:
    """The sizes of a caption encoded by a language model; None for other encoders, and unknown widths."""
    from atoll.encoders.text.prompt_styles import STYLES  # imports torch

    name = str(condition.get("name"))
    if (style := STYLES.get(name)) is None:
        return None
    # A pipeline's directory has its text encoder in a folder.
    subfolder = "" if name in ("gemma", "qwen") else "text_encoder"
    local = _local_config({"subfolder": subfolder, **condition})
    local = local.get("text_config", local)
    width = local.get("hidden_size") or LANGUAGE_MODEL_WIDTHS.get(name)
    layers = max(1, len(style.layers))
    return Text(int(condition.get("length") or style.length), int(width) * layers, None) if width else None


def latent_shape(manifest: Manifest) -> tuple[int, int, int]:
    """(C, H, W) of the latents of a run's images, of the main size if there are several.

    Raises:
        AtollError: an unknown codec, or its factor does not divide the size.
    """
    return latent_sizes(manifest)[0].shape


@dataclass(frozen=True)
class SizedLatent:
    """One size of a run's images.

    Attributes:
        image: in pixels.
        shape: (C, H, W) of the latents.
        share: fraction of the images that have it.
    """

    image: ImageSize
    shape: tuple[int, int, int]
    share: float


def latent_sizes(manifest: Manifest, counts: Mapping[str, int] | None = None) -> tuple[SizedLatent, ...]:
    """Every size of a run's images, the main one first: one, or those of `data.buckets`.

    Args:
        manifest: of the run.
        counts: images of each size, by "WIDTHxHEIGHT"; None: all sizes have equally many.

    Raises:
        AtollError: as `latent_shape`; a side of a bucket that codec and networks do not divide; images of other sizes.
    """
    channels, factor = _codec_extent(manifest)
    buckets, size = manifest.data.buckets, manifest.data.size
    square = ImageSize(size, size)
    images = (square,) if buckets is None else buckets.table(size, manifest.size_step(factor))
    if counts and (others := counts.keys() - set(map(str, images))):
        raise AtollError(
            f"the encoded images have the size {min(others)}, atoll.yaml names {', '.join(map(str, images))}; "
            "encode again (atoll encode --force)"
        )
    total = sum(counts.values()) if counts else 0
    shares = [counts.get(str(image), 0) / total if counts and total else 1 / len(images) for image in images]
    return tuple(
        SizedLatent(image, (channels, *image.latent(factor)), share)
        for image, share in zip(images, shares, strict=True)
    )


def _codec_extent(manifest: Manifest) -> tuple[int, int]:
    """(channels of the latent, pixels per latent pixel). Raises AtollError as `latent_shape`."""
    from atoll.encoders.codec.extents import EXTENTS, extent_of  # its package imports torch

    codec, size = manifest.codec, manifest.data.size
    name, local = codec.get("name"), _local_config(codec)
    if name == "pixels":
        channels, factor = int(codec.get("channels", 1)), 1
    elif name == "taef2":
        channels, factor = 32, 8
    elif name in EXTENTS:  # those of the published weights, unless the weights are on this machine
        extent = extent_of(name, local, str(codec.get("weights", "")))
        channels, factor = extent.channels, extent.factor
        if extent.side not in (None, size):
            raise AtollError(
                f"data.size {size}, codec {name}: it takes images of {extent.side} pixels a side; set that"
            )
    else:
        raise AtollError(f"codec {name!r}: unknown latent shape; expected one of pixels, taef2, {', '.join(EXTENTS)}")
    # Listed sizes are checked where their table is made.
    if manifest.data.buckets is None and size % factor:
        raise AtollError(
            f"data.size {size}, codec {name}: it shrinks sides {factor} times; take a multiple of {factor}"
        )
    return channels, factor


def network_of(
    manifest: Manifest, part: ExpertSettings | MonolithSettings, latent: tuple[int, int, int], text: Text
) -> NetworkSizes:
    """The network that one expert, or the common model, trains."""
    # The sizes of the manifest, completed by those of the data.
    settings = manifest.network_of(part)
    channels, height, width = latent
    sizes = {"size": (height, width), "channels": channels, "states_dim": text.dim}
    network = sizes_of(
        {**settings.config(), **sizes, "pooled_dim": text.pooled if settings.pooled else None}, text.tokens
    )
    if height % network.patch or width % network.patch:
        raise AtollError(f"network.patch {network.patch} does not divide the latent, {height}x{width}; change one")
    return network


def router_of(manifest: Manifest, latent: tuple[int, int, int], text: Text) -> RouterSizes:
    """The run's router."""
    # The router sees the latent itself, without text states.
    settings, (channels, height, width) = manifest.router.network, latent
    return RouterSizes(
        size=(height, width),
        channels=channels,
        patch=settings.patch,
        width=settings.width,
        depth=settings.depth,
        mlp_ratio=settings.ratio,
        clusters=manifest.clusters.k,
        pooled_dim=text.pooled if settings.pooled else None,
        modulation=settings.modulation,
        block=settings.name,
    )


def switches_of(train: TrainSettings) -> tuple[Switches, int]:
    """The recipe's switches and its gradient accumulation."""
    # The names agree with those of `train` in atoll.yaml.
    names = ("checkpointing", "optimizer_state", "ema_device", "compile", "fused_backward", "block_swap")
    return Switches(**{name: getattr(train, name) for name in names}), train.accumulate


@dataclass(frozen=True)
class Encoded:
    """A run's encoded data.

    Attributes:
        rows: number of images.
        latent: (C, H, W), of the main size.
        sizes: images of each size, by "WIDTHxHEIGHT"; empty if all have one.
        cut: captions that are longer than the text encoder reads, and the fraction of their text that is cut; or None.
    """

    rows: int
    latent: tuple[int, int, int]
    sizes: Mapping[str, int] = field(default_factory=dict)
    cut: tuple[int, float] | None = None


def encoded(run: Path) -> Encoded | None:
    """Read the index of the run's encoded images; None if there is none yet.

    Raises:
        AtollError: an index that cannot be read.
    """
    from atoll.storage.artifact import read_json
    from atoll.storage.shards import INDEX

    # A run that is still encoding has no index.
    index = RunLayout(run).encoded / INDEX
    if not index.is_file():
        return None
    content = read_json(index)
    try:
        channels, height, width = content["columns"]["latent"]["shape"]
        counts = (content.get("card") or {}).get("counts") or {}
        cut = counts.get("cut")
        cut = (int(cut["captions"]), float(cut["fraction"])) if cut else None
        sizes = {str(size): int(images) for size, images in (counts.get("sizes") or {}).items()}
        return Encoded(int(content["rows"]), (channels, height, width), sizes, cut)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise AtollError(f"{index}: no rows of latents in it; encode again (atoll encode --force)") from None


def cluster_bytes(manifest: Manifest, sizes: Sequence[SizedLatent], images: int) -> float:
    """Bytes that an island downloads: an even part of float16 latents (twice with flips), captions, targets."""
    # float16 latents, and the caption as text.
    values = sum(math.prod(size.shape) * size.share for size in sizes)
    row = values * 2 * (2 if manifest.data.flips else 1) + CAPTION_BYTES + target_bytes(manifest)
    return images / manifest.clusters.k * row
