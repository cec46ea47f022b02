"""Use diffusers' PixArt and DiT as experts without conversion: `atoll convert SOURCE --keep`.

`convert` builds a native network. `keep` writes the tensors unchanged beside a card, and diffusers' class evaluates
them (`atoll.nn.foreign`). The expert can be sampled, calibrated, trained on (`train.init`), and assembled with
any other expert of the same latents.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from atoll.convert import Destination
from atoll.convert.dit import LatentSize
from atoll.convert.kind import CheckpointKind, check_kind, detect, original_objective
from atoll.convert.pixart_original import as_diffusers, is_original
from atoll.convert.read import Checkpoint, Taker, read_checkpoint
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import USER, Trust
from atoll.errors import AtollError
from atoll.nn import Foreign, build_network
from atoll.nn.foreign import arguments_of
from atoll.nn.foreign_calls import Class
from atoll.objective import Objective

CLASSES: dict[str, Class] = {"pixart": "PixArtTransformer2DModel", "diffusers-dit": "DiTTransformer2DModel"}
# Older versions stored the positions and the null caption of training; no network reads them.
UNREAD = ("pos_embed.pos_embed", "caption_projection.y_embedding")


def keep(
    source: Path,
    out: Path,
    kind: CheckpointKind | Literal["auto"] = "auto",
    objective: Mapping[str, Any] | None = None,
    *,
    condition: Mapping[str, Any] | None = None,
    codec: Mapping[str, Any] | None = None,
    name: str = "",
    clusters: Sequence[int] = (0,),
    k: int | None = None,
    assignment: str | None = None,
    size: LatentSize | None = None,
    trust: Trust = USER,
) -> Path:
    """Write the checkpoint at `source` as the expert artifact `out` without converting it, and return `out`.

    Args:
        kind: "pixart" or "diffusers-dit"; "auto" detects it by the tensors' names.
        objective: its training objective, as arguments of `Objective`; None: eps on linear-beta, as published.
        condition: the text encoder; a DiT's is "label", with the names of its classes in their order.
        codec: as `build_codec` reads it; None: unknown, and no ensemble can sample the expert.
        name: the expert's name; "": that of `out`.
        clusters, k: the clusters it covers, and how many there are; None: one more than the highest number.
        assignment: which clusters these are, as in the cards of its ensemble's other parts.
        size: (H, W) of the ensemble's latents; must be the network's own.
        trust: what `condition` and `codec` may reach, if they are from a card.

    Raises:
        AtollError: another kind of checkpoint, no config.json, one that diffusers cannot build, tensors missing,
            misshapen or unknown, a condition encoder that does not fit, or `out` exists already.
    """
    # The kind of the checkpoint, and its training objective.
    destination = Destination(out, name, clusters, k, codec, assignment, trust)
    checkpoint = read_checkpoint(source)
    kind = detect(checkpoint) if kind == "auto" else check_kind(checkpoint, kind)
    aim = Objective(**(original_objective(kind, checkpoint) if objective is None else dict(objective)))
    if kind == "pixart" and is_original(checkpoint):
        checkpoint = as_diffusers(checkpoint, size)
    # The network, which keeps its size.
    network = _network(checkpoint, kind, destination.factor)
    if size not in (None, network.size):
        raise AtollError(
            f"{source}: its latents are {network.size[0]}x{network.size[1]}, requested are {size[0]}x{size[1]}; "
            "a network that is kept keeps its size: convert it, without --keep"
        )
    return destination.write(
        network,
        (network.channels, *network.size),
        aim,
        _condition(network, condition, trust),
        {"kind": kind, "modulation": "kept", "source": checkpoint.files},
    )


def _network(checkpoint: Checkpoint, kind: str, factor: int) -> Foreign:
    """Build diffusers' network with the checkpoint's weights."""
    # Only the classes of diffusers can be rebuilt from a config.json.
    if kind not in CLASSES:
        raise AtollError(f"{checkpoint.where}: a {kind!r} cannot be kept, only one of {', '.join(CLASSES)}: convert it")
    # Build the network on the meta device, without memory, then assign the checkpoint's tensors.
    cls = CLASSES[kind]
    config = _config(checkpoint, cls)
    # PixArt's resolution embedders read the size in pixels.
    side = config.get("sample_size", 128)
    pixels = [side * factor] * 2 if kind == "pixart" and isinstance(side, int) else None
    with torch.device("meta"):
        network = build_network({"name": "diffusers", "class": cls, "config": config, "pixels": pixels})
    assert isinstance(network, Foreign)
    # The taker checks that every tensor is used, and none is missing.
    taker = Taker(checkpoint)
    taker.drop(*UNREAD)
    weights = {name: taker.take(name, *value.shape) for name, value in network.network.state_dict().items()}
    taker.done()
    network.network.load_state_dict(weights, assign=True)
    return network


def _config(checkpoint: Checkpoint, cls: Class) -> dict[str, Any]:
    """Return the class's arguments from config.json. Unknown keys are errors unless their value is null or false."""
    # Without config.json the class would take its defaults, and other sizes.
    if checkpoint.config is None:
        raise AtollError(
            f"{checkpoint.where}: no config.json beside it, which tells the network's sizes; put the one that "
            "diffusers wrote with these weights there"
        )
    # An unknown key with a value may change the network; null and false switch nothing on.
    known = arguments_of(cls)
    for key, value in checkpoint.config.items():
        if key not in known and not key.startswith("_") and value not in (None, False):
            raise AtollError(f"{checkpoint.where}: config.json: got {key} {value!r}, which {cls} does not know")
    return {key: value for key, value in checkpoint.config.items() if key in known}


def _condition(network: Foreign, condition: Mapping[str, Any] | None, trust: Trust) -> dict[str, Any]:
    """Return the card's entry for the condition encoder. Raises AtollError unless the encoder fits the network."""
    # PixArt reads the states of its own text encoder; DiT reads the number of a class.
    needed = network.condition_width
    labels = network.config.cls == "DiTTransformer2DModel"
    expected = (
        f"--condition label,labels=FILE with its {needed} classes"
        if labels
        else f"--condition with its own, {needed} wide"
    )
    if condition is None:
        raise AtollError(f"a network that is kept reads the condition of its training: name the encoder: {expected}")
    encoder = build_encoder(condition, trust)
    if encoder.dim != needed or (labels and encoder.name != "label"):
        raise AtollError(
            f"condition: {encoder.name!r} with states {encoder.dim} wide does not fit; expected {expected}"
        )
    # The complete entry, as in the cards of trained experts: it holds the labels, not the path of their file.
    return encoder.config()
