"""Codecs that normalise latents by the statistics of a data set.

`atoll encode` stores latents by the constants in the codec's config, and measures their mean and deviation per channel.
`atoll cluster` writes (latent - mean) / deviation. As latent = (z - shift) * scale, that is the latent of the same
codec with other constants: shift + mean / scale, and scale / deviation. So the codec's config in a card says it all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from atoll.encoders.weights import identity, same
from atoll.errors import AtollError
from atoll.storage.cards import EncodedCard, LatentStatistics
from atoll.storage.shards import Shards

Positive = Annotated[float, Field(gt=0)]
# In atoll.yaml alone: a card has the constants themselves. None: see `uses_measured`.
StatisticsChoice = Annotated[Literal["measured", "codec"] | None, Field(exclude=True)]

_ROUNDING = 2**-10  # float16 stores a number within half of this fraction of it
_NOTEWORTHY = 0.1  # in deviations: latents of a mean or a deviation that differs by more are said to differ
_CONSTANTS = ("shift", "scale")


def uses_measured(config: Mapping[str, Any]) -> bool:
    """Return whether a run with this `codec` in atoll.yaml normalises its latents by measured statistics.

    Without `statistics` it does, unless the codec is "pixels", whose latents are in [-1, 1], or has a shift or a scale.

    Raises:
        AtollError: `statistics` is neither "measured" nor "codec".
    """
    choice: object = config.get("statistics")
    if choice not in ("measured", "codec", None):
        raise AtollError(f"codec.statistics is {choice!r}; expected measured or codec")
    if choice is None:
        return config.get("name") != "pixels" and all(config.get(key) is None for key in _CONSTANTS)
    return choice == "measured"


def standardised(config: Mapping[str, Any], statistics: LatentStatistics, where: Path) -> dict[str, Any]:
    """Return the config of the codec whose latents have mean 0 and deviation 1 in every channel.

    Args:
        config: the codec's config in the card of the latents.
        statistics: of these latents.
        where: they are; begins messages.

    Raises:
        AtollError: a channel does not vary, or the codec has no constants.
    """
    for channel, (mean, std) in enumerate(zip(statistics.mean, statistics.std, strict=True)):
        # What varies less than its rounding is noise, which the division would blow up.
        if std <= abs(mean) * _ROUNDING:
            raise AtollError(
                f"{where}: channel {channel} of the latents does not vary (mean {mean:.6g}, deviation {std:.3g}), so "
                "it cannot be normalised; set codec.statistics: codec in atoll.yaml, or take data or a codec that vary"
            )
    shift, scale = _constants(config, len(statistics.mean), where)
    pairs = zip(shift, scale, statistics.mean, strict=True)
    return {
        **config,
        "shift": [h + mean / s for h, s, mean in pairs],
        "scale": [s / std for s, std in zip(scale, statistics.std, strict=True)],
    }


def with_measured(shards: Shards) -> Shards:
    """Return encoded images as `with_codec`, normalised by the statistics in their card.

    Raises:
        AtollError: the card has none, or as `standardised`.
    """
    card = shards.data_card
    statistics = card.statistics if isinstance(card, EncodedCard) else None
    if statistics is None:
        raise AtollError(
            f"{shards.path}: has no statistics of its latents; encode again with --force, or set codec.statistics: "
            "codec in atoll.yaml"
        )
    return with_codec(shards, standardised(card.codec, statistics, shards.path), shards.path)


def with_codec(shards: Shards, codec: Mapping[str, Any], owner: Path) -> Shards:
    """Return shards whose latents, and the codec in whose card, are those of a codec with other constants.

    Args:
        shards: latents of the same network.
        codec: the config, from the card of clusters or of an ensemble.
        owner: of this card, for messages.

    Raises:
        AtollError: the latents are of another codec.
    """
    card = shards.data_card
    if same(card.codec, codec):
        return shards
    if _network(card.codec) != _network(codec):
        raise AtollError(
            f"{shards.path}: its codec is {identity(card.codec)}, that of {owner} is {identity(codec)}; encode the "
            "images with the codec of the run"
        )
    channels = shards.shape("latent")[0]
    old, new = _constants(card.codec, channels, shards.path), _constants(codec, channels, owner)
    return shards.with_latents(_map_between(old, new), card.model_copy(update={"codec": dict(codec)}))


def statistics_note(shards: Shards, codec: Mapping[str, Any]) -> str:
    """Describe how far statistics of encoded images are from those that a run normalises by; "" if they are alike.

    Args:
        shards: the images, as they were encoded.
        codec: the run's.
    """
    card = shards.data_card
    statistics = card.statistics if isinstance(card, EncodedCard) else None
    if statistics is None or same(card.codec, codec):
        return ""
    # Mean and deviation of the normalised latents: 0 and 1 for the run's own images.
    channels = len(statistics.mean)
    to_run = _map_between(_constants(card.codec, channels, shards.path), _constants(codec, channels, shards.path))
    means = [m * g + o for m, g, o in zip(statistics.mean, to_run.gain.tolist(), to_run.offset.tolist(), strict=True)]
    stds = [std * g for std, g in zip(statistics.std, to_run.gain.tolist(), strict=True)]
    if max(map(abs, means)) <= _NOTEWORTHY and max(abs(std - 1) for std in stds) <= _NOTEWORTHY:
        return ""
    return (
        f"the run keeps its statistics; by them the new latents have means of {min(means):.2f} to {max(means):.2f} and "
        f"deviations of {min(stds):.2f} to {max(stds):.2f} (its own: 0 and 1)"
    )


def own_constants(codec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constants of a card's codec if each channel has its own, as measured ones do; else nothing.

    Trainings of one network on latents of other constants are other trainings.
    """
    values = {key: codec.get(key) for key in _CONSTANTS}
    return {"constants": values} if any(isinstance(value, list | tuple) for value in values.values()) else {}


def other_statistics(one: Any, other: Any) -> tuple[str, str] | None:
    """Describe the constants of two codec configs of one network that differ, such as "scale[3] 1.25".

    Args:
        one, other: entries of cards, of any kind.

    Returns:
        The first constants that differ, of either; None if the entries are equal, or differ in more than constants.
    """
    if not isinstance(one, Mapping) or not isinstance(other, Mapping) or _network(one) != _network(other):
        return None
    mine, theirs = list[str](), list[str]()
    for key in _CONSTANTS:
        values = [value if isinstance(value, list | tuple) else [value] for value in (one.get(key), other.get(key))]
        # One number stands for all channels.
        longest = max(map(len, values))
        pairs = zip(*(value * longest if len(value) == 1 else value for value in values), strict=False)
        channel = next((c for c, (a, b) in enumerate(pairs) if a != b), None)
        if channel is not None or len(set(map(len, values)) - {1}) > 1:
            for texts, value in zip((mine, theirs), values, strict=True):
                place = f"[{channel or 0}]" if len(value) > 1 else ""
                texts.append(f"{key}{place} {value[channel or 0] if len(value) > 1 else value[0]}")
    return (", ".join(mine), ", ".join(theirs)) if mine else None


def refuse_other_statistics(path: Path | str, codec: Any, first: Path | str, other: Any) -> None:
    """Raise AtollError if the latents of `path` and `first`, experts or shards, differ in their statistics alone.

    codec, other: the entries of their cards.
    """
    if constants := other_statistics(codec, other):
        raise AtollError(
            f"{path}: its latents are normalised by {constants[0]}, those of {first} by {constants[1]}; parts of one "
            "model need the same statistics (codec.statistics in atoll.yaml): train both on the clusters/ of one run"
        )


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """latent * gain + offset, for each channel.

    Attributes:
        gain, offset: [C] float64.
    """

    gain: Tensor
    offset: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """Map latents [..., C, H, W] to latents of the same dtype, computed in float32."""
        gain, offset = (value.float().reshape(-1, 1, 1) for value in (self.gain, self.offset))
        # Two roundings, in this order: the same bits on every machine. In place, on a copy.
        return latents.to(torch.float32, copy=True).mul_(gain).add_(offset).to(latents.dtype)


def _map_between(old: tuple[list[float], list[float]], new: tuple[list[float], list[float]]) -> ChannelMap:
    """The map from latents of one (shift, scale) to latents of another."""
    (old_shift, old_scale), (new_shift, new_scale) = (
        [torch.tensor(values, dtype=torch.float64) for values in constants] for constants in (old, new)
    )
    return ChannelMap(new_scale / old_scale, (old_shift - new_shift) * new_scale)


def _network(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in identity(config).items() if key not in _CONSTANTS}


def _constants(config: Mapping[str, Any], channels: int, where: Path) -> tuple[list[float], list[float]]:
    """The shift and the scale of each channel in a card's codec config."""
    values = []
    for key in _CONSTANTS:
        value = config.get(key)
        listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * channels
        # A card may be a stranger's.
        numbers = [float(one) for one in listed if isinstance(one, int | float)]
        if len(listed) != channels or len(numbers) != channels:
            raise AtollError(
                f"{where}: its codec has {key} {value!r:.60}; expected a number, or one for each of the {channels} "
                "channels"
            )
        values.append(numbers)
    if min(values[1]) <= 0:
        raise AtollError(f"{where}: its codec has a scale of {min(values[1])}; expected numbers above 0")
    return values[0], values[1]
