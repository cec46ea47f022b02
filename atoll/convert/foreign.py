"""Use diffusers' networks as experts without conversion: `atoll convert SOURCE --keep`.

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
from atoll.convert.kind import CLASSES, KEPT_ONLY, CheckpointKind, check_kind, detect, original_objective
from atoll.convert.pipeline_folder import PipelineFolder
from atoll.convert.pixart_original import as_diffusers, is_original
from atoll.convert.read import Checkpoint, Taker, read_checkpoint
from atoll.encoders.codec import build_codec
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import USER, Trust
from atoll.errors import AtollError
from atoll.nn import Foreign, build_network
from atoll.nn.foreign import arguments_of
from atoll.nn.foreign_calls import Class
from atoll.objective import Objective

GUIDANCE = {"flux": 3.5, "flux2": 4.0}  # what diffusers' pipelines give to guidance-distilled networks
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
    guidance: float | None = None,
    trust: Trust = USER,
) -> Path:
    """Write the checkpoint at `source` as the expert artifact `out` without converting it, and return `out`.

    Args:
        kind: one of `CLASSES`; "auto" detects it by the class in config.json, or by the tensors' names.
        objective: its training objective, as arguments of `Objective`; None: as published, eps on linear-beta for
            PixArt and DiT, flow on the linear path for the others.
        condition: the text encoder; None: that of the pipeline's directory, if it is one. A DiT's is "label", with the
            names of its classes in their order.
        codec: as `build_codec` reads it; None: that of the pipeline's directory, else unknown, and no ensemble can
            sample the expert.
        name: the expert's name; "": that of `out`.
        clusters, k: the clusters it covers, and how many there are; None: one more than the highest number.
        assignment: which clusters these are, as in the cards of its ensemble's other parts.
        size: (H, W) of the ensemble's latents; None: the network's own. PixArt and DiT have no other.
        guidance: the scale that a guidance-distilled network embeds; None: 3.5 for FLUX, 4 for FLUX.2.
        trust: what `condition` and `codec` may reach, if they are from a card.

    Raises:
        AtollError: another kind of checkpoint, no config.json, one that diffusers cannot build, tensors missing,
            misshapen or unknown, a condition encoder that does not fit, or `out` exists already.
    """
    # What lies beside the network, if the source is a whole pipeline.
    folder = PipelineFolder.read(source)
    if codec is None and (own := folder.codec()) is not None:
        codec = build_codec(own).config()  # with the hash of its weights
    destination = Destination(out, name, clusters, k, codec, assignment, trust)
    # The kind of the checkpoint, and its training objective.
    checkpoint = read_checkpoint(source)
    kind = detect(checkpoint) if kind == "auto" else check_kind(checkpoint, kind)
    if kind not in CLASSES:
        raise AtollError(f"{checkpoint.where}: a {kind!r} cannot be kept, only one of {', '.join(CLASSES)}: convert it")
    aim = _aim(kind, checkpoint, objective, folder)
    if kind == "pixart" and is_original(checkpoint):
        checkpoint = as_diffusers(checkpoint, size)
    network = _network(checkpoint, kind, destination.factor, size, guidance, folder)
    if size not in (None, network.size):
        raise AtollError(
            f"{source}: its latents are {network.size[0]}x{network.size[1]}, requested are {size[0]}x{size[1]}; "
            "a network that is kept keeps its size: convert it, without --keep"
        )
    return destination.write(
        network,
        (network.channels, *network.size),
        aim,
        _condition(network, condition or folder.condition(), trust),
        {"kind": kind, "modulation": "kept", "source": checkpoint.files},
    )


def _aim(
    kind: CheckpointKind, checkpoint: Checkpoint, objective: Mapping[str, Any] | None, folder: PipelineFolder
) -> Objective:
    """Return the expert's objective: the original's, or the caller's with the original's range of times."""
    own = original_objective(kind, checkpoint)
    if objective is None:
        if kind in KEPT_ONLY:
            folder.check_scheduler()
        return Objective(**own)
    aim = Objective(**{"time_scale": own["time_scale"], **objective})
    if kind in KEPT_ONLY and aim.time_scale != own["time_scale"]:
        raise AtollError(
            f"objective.time_scale: got {aim.time_scale:g}; a {kind!r} reads time as 0..{own['time_scale']:g}: set "
            f"time_scale: {own['time_scale']:g}"
        )
    return aim


def _network(
    checkpoint: Checkpoint,
    kind: CheckpointKind,
    factor: int,
    size: LatentSize | None,
    guidance: float | None,
    folder: PipelineFolder,
) -> Foreign:
    """Build diffusers' network with the checkpoint's weights."""
    cls = CLASSES[kind]
    config = _config(checkpoint, cls)
    entry: dict[str, Any] = {"name": "diffusers", "class": cls, "config": config}
    side = config.get("sample_size", 128)
    if kind == "pixart" and isinstance(side, int):
        entry["pixels"] = [side * factor] * 2  # PixArt's resolution embedders read the size in pixels
    if kind in KEPT_ONLY:
        entry |= _constants(checkpoint, kind, factor, size, folder)
        default = GUIDANCE.get(kind) if config.get("guidance_embeds", kind == "flux2") else None
        entry["guidance"] = default if guidance is None else guidance
    elif guidance is not None:
        raise AtollError(f"guidance {guidance:g}: a {kind!r} embeds none; leave --guidance out")
    # Build the network on the meta device, without memory, then assign the checkpoint's tensors.
    with torch.device("meta"):
        network = build_network(entry)
    assert isinstance(network, Foreign)
    # The taker checks that every tensor is used, and none is missing.
    own = network.network.state_dict()
    taker, dtype = Taker(checkpoint), _dtype(checkpoint)
    taker.drop(*(name for name in UNREAD if name not in own))
    weights = {name: taker.take(name, *value.shape, dtype=dtype) for name, value in own.items()}
    taker.done()
    network.network.load_state_dict(weights, assign=True)
    return network


def _constants(
    checkpoint: Checkpoint, kind: CheckpointKind, factor: int, size: LatentSize | None, folder: PipelineFolder
) -> dict[str, Any]:
    """Return the size of the latents, unless it is the network's own square, as the card's entry."""
    config = checkpoint.config or {}
    own = config.get("sample_size")
    if own is None and size is None:
        side = folder.latent_side(kind, factor)
        if side is None:
            raise AtollError(f"{checkpoint.where}: nothing tells the size of its latents; say it (--size 64, or 48x64)")
        size = side, side
    return {} if size in (None, (own, own)) else {"size": list(size or ())}


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that the weights are kept in: bfloat16 if all of them are, else float32."""
    # Half the memory, and the dtype that these networks are published and evaluated in.
    dtypes = {value.dtype for value in checkpoint.tensors.values() if value.is_floating_point()}
    return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32


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
    # DiT reads the number of a class; the others read the states of their own text encoders.
    needed, pooled = network.condition_width, network.pooled_width
    labels = network.config.cls == "DiTTransformer2DModel"
    expected = (
        f"--condition label,labels=FILE with its {needed} classes"
        if labels
        else f"--condition with its own, {needed} wide"
    )
    if pooled is not None and not labels:
        expected += f" with a pooled vector of {pooled}"
    if condition is None:
        raise AtollError(f"a network that is kept reads the condition of its training: name the encoder: {expected}")
    encoder = build_encoder(condition, trust)
    if encoder.dim != needed or (labels and encoder.name != "label"):
        raise AtollError(
            f"condition: {encoder.name!r} with states {encoder.dim} wide does not fit; expected {expected}"
        )
    if pooled not in (None, encoder.pooled_dim):
        raise AtollError(
            f"condition: {encoder.name!r}, its pooled vector is {encoder.pooled_dim}, does not fit; expected {expected}"
        )
    # A network that masks nothing was trained with padding that is text.
    if not network.reads_mask and not encoder.null(1).mask.all():
        raise AtollError(
            f"condition: {encoder.name!r} pads captions, and {network.config.cls} has no mask; expected {expected}, "
            "whose padding is part of its training"
        )
    # The complete entry, as in the cards of trained experts: it holds the labels, not the path of their file.
    return encoder.config()
