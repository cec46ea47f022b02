"""Arguments of a conversion, from the manifest of a run or from the command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from atoll.convert.dit import LatentSize
from atoll.encoders.codec import build_codec
from atoll.encoders.codec.statistics import uses_measured
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import USER, Trust
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import read_card
from atoll.storage.cards import ClusterShardsCard, ExpertCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards

SCHEDULES = {"flow": "linear"}  # the default schedule of a prediction; for any other one linear-beta, DiT's


def arguments_of_run(run: Path, wanted: str, *, allow_hub: bool = False, trust_paths: bool = False) -> dict[str, Any]:
    """Derive the arguments of `convert` for an expert of a run.

    Codec, condition, latent shape and assignment come from the cluster's shards if these exist, else from the manifest.

    Args:
        run: the run's directory.
        wanted: the expert's cluster or full name.
        allow_hub, trust_paths: what the card of the shards may reach, as in `load_ensemble`.

    Raises:
        AtollError: no run, no such expert, damaged shards, or a frozen network is not found.
    """
    # The expert's entry in the manifest.
    manifest = load_manifest(run).allowing(hub=allow_hub, paths=trust_paths)
    part = manifest.find_expert(wanted)
    # Its data. The shards are preferred, because the manifest may have changed since they were written.
    shards = RunLayout(run).cluster(part.cluster)
    data = _data_of(Shards(shards).card(ClusterShardsCard), manifest) if shards.is_dir() else _planned(manifest)
    # Its network. It reads the pooled vector only if the encoder has one.
    channels, height, width = data.latent_shape
    network = manifest.network_of(part).config()
    # The card of the shards may reach only what the manifest names, and what the user allows. The manifest is the
    # user's own.
    trust = manifest.trust_in_cards(run) if shards.is_dir() else USER
    encoder = build_encoder(data.condition, trust)
    reads_pooled = manifest.network_of(part).pooled and encoder.pooled_dim is not None
    return {
        "objective": part.objective.model_dump(),
        "condition": data.condition,
        "codec": data.codec,
        "name": part.full_name,
        "clusters": (part.cluster,),
        "k": manifest.clusters.k,
        "assignment": data.assignment,
        "network": {"channels": channels, **network},
        "size": (height, width),
        "pooled": reads_pooled,
        "trust": trust,
    }


@dataclass(frozen=True)
class _Data:
    """The data that an expert must fit. assignment: None before clustering."""

    codec: dict[str, Any]
    condition: dict[str, Any]
    latent_shape: tuple[int, int, int]
    assignment: str | None


def _data_of(card: ClusterShardsCard, manifest: Manifest) -> _Data:
    # The shards' card states everything that the expert must fit, but for measured statistics: a foreign network knows
    # the latents of the codec's own.
    codec = build_codec(manifest.codec).config() if uses_measured(manifest.codec) else card.codec
    return _Data(codec, card.condition, card.latent_shape, card.assignment)


def _planned(manifest: Manifest) -> _Data:
    """Derive the data's properties from the manifest, before anything is encoded."""
    # The codec's factor decides the size of a latent.
    codec, side = build_codec(manifest.codec), manifest.data.size
    if side % codec.factor:
        raise AtollError(f"data.size {side}: a latent pixel is {codec.factor} pixels; set a multiple of that")
    # Training images are squares of `data.size` pixels.
    shape = (codec.channels, side // codec.factor, side // codec.factor)
    return _Data(codec.config(), build_encoder(manifest.condition).config(), shape, None)


def condition_beside_run(condition: Mapping[str, Any], trust: Trust) -> dict[str, Any]:
    """Return the arguments that replace a run's condition by one that the user wrote on the command line.

    Args:
        condition: the encoder's config; it may reach anything.
        trust: what the cards of the run may reach.
    """
    # Complete, so that it names no file of labels; its weights are those of the user.
    config = build_encoder(condition).config()
    return {"condition": config, "trust": replace(trust, named=trust.named | {str(config.get("weights", ""))})}


def objective_of(prediction: str | None, schedule: str | None) -> dict[str, Any] | None:
    """Parse `--objective` and `--schedule`. Without both return None: the original's objective.

    The default schedule is the linear path for "flow" and linear-beta for any other prediction.
    """
    if prediction is None and schedule is None:
        return None
    # DiT and PixArt were trained on eps.
    prediction = prediction or "eps"
    named = frozen_network("schedule", schedule) if schedule else SCHEDULES.get(prediction, "linear-beta")
    return {"prediction": prediction, "schedule": named}


def frozen_network(option: str, words: str) -> dict[str, Any]:
    """Parse "clip,weights=openai/clip-vit-large-patch14,length=77" into {"name": "clip", ...}, values as YAML.

    Args:
        option: the option's name, for messages.

    Raises:
        AtollError: a value has no key, a key occurs twice, or there is no name.
    """
    # The first word is the name, unless it has a key.
    first, *others = words.split(",")
    pairs = [part.split("=", 1) for part in ([first] if "=" in first else [f"name={first}"]) + others]
    keys = [pair[0].strip() for pair in pairs]
    whole = all(len(pair) == 2 and pair[0].strip() and pair[1].strip() for pair in pairs)
    if not whole or "name" not in keys or len({*keys}) < len(keys):
        raise AtollError(f"--{option} {words!r}: expected a name, and keys with values: NAME,KEY=VALUE,...")
    # Values are parsed as YAML, so that 77 is a number and "77" a text.
    try:
        values = [yaml.safe_load(pair[1]) for pair in pairs]
    except yaml.YAMLError:
        raise AtollError(f"--{option} {words!r}: a value in it cannot be read; put it in quotes") from None
    return dict(zip(keys, values, strict=True))


def codec_of(words: str) -> dict[str, Any]:
    """Parse `--codec` into the card entry of a codec, hash included.

    Raises:
        AtollError: as `frozen_network` and `build_codec` raise it.
    """
    # The loaded codec fills in the hash of its weights.
    return build_codec(frozen_network("codec", words)).config()


def size_of(words: str) -> LatentSize:
    """Parse "32x48", height and width, or "32", a square. Raises AtollError for anything else."""
    # One number is a square.
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", words)
    if match is None:
        raise AtollError(f"--size {words!r}: expected the latent's height and width, such as 32x48, or 32")
    return int(match[1]), int(match[2] or match[1])


def summary(expert: Path) -> str:
    """Describe a converted expert in one line: its source, its objective, and how exact its modulation is."""
    # Everything in the line is in the card.
    card = read_card(expert, ExpertCard)
    conversion, objective = card.conversion, card.objective
    if conversion is None:
        raise AtollError(f"{expert}: was trained, not converted")
    # How exact the conversion is decides whether the expert can be sampled or must be trained first.
    modulation = conversion.modulation
    if residual := conversion.residual:
        modulation += f" (off by {min(residual):.2g} to {max(residual):.2g} of a block's)"
    elif modulation == "reinit":
        modulation += " (new, to be trained)"
    elif conversion.null:
        modulation += f" (exact, but for the null class: {conversion.null})"
    else:
        modulation += " (exact)"
    # Which of a training file's weights were read, such as "ema".
    kind = conversion.kind + (f" ({conversion.weights})" if conversion.weights else "")
    schedule: Mapping[str, Any] = objective["schedule"]
    # A guidance-distilled network has its scale for good.
    guidance = card.network.get("guidance")
    said = "" if guidance is None else f", guidance {guidance:g} embedded"
    return f"{expert} written: from {kind}, {objective['prediction']} on {schedule['name']}, {modulation}{said}"
