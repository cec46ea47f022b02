"""Convert Paris's open weights (arXiv 2510.03434) to an ensemble's parts: eight experts of XL/2 and their router.

The source is a directory as released, with these files:

    expert_0/diffusion_pytorch_model.safetensors ... expert_7/...       router/pytorch_model.safetensors

The networks are `atoll.nn.paris`, and the tensors keep their values. The objective is flow on Atoll's linear path: in
diffusers' FlowMatchEulerDiscreteScheduler x = (1 - sigma) x0 + sigma noise, the velocity is noise - x0, and the network
reads 1000 sigma as its time. Prompts are CLIP-L/14's last hidden states, and latents are those of sd-vae-ft-mse times
0.18215; neither network is needed to convert.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.convert.dit import published_heads
from atoll.convert.read import Checkpoint, Taker, read_checkpoint
from atoll.encoders.codec import build_codec
from atoll.encoders.text import build_encoder
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import save_artifact, whole_directory
from atoll.storage.cards import CONVERTED, ConversionRecord, ExpertCard, RouterCard, TrainingRecord
from atoll.storage.layout import RunLayout

OBJECTIVE = Objective("flow", "linear", time_scale=1000.0)
CONDITION = {"name": "clip", "weights": "openai/clip-vit-large-patch14"}
CODEC = {"name": "kl", "weights": "stabilityai/sd-vae-ft-mse", "shift": 0.0, "scale": 0.18215}
SAMPLING = {"steps": 50, "guidance_scale": 7.5, "method": "euler", "routing": "top-2"}  # as published
ROUTER = ("router/pytorch_model.safetensors", "router/pytorch_model.bin")


def is_paris(source: Path) -> bool:
    """Return whether `source` has Paris's layout: a router, and experts beside it."""
    return any((source / name).is_file() for name in ROUTER) and any(source.glob("expert_*"))


def convert_paris(
    source: Path,
    out: Path,
    condition: Mapping[str, Any] | None = None,
    codec: Mapping[str, Any] | None = None,
    heads: int | None = None,
) -> tuple[list[Path], Path]:
    """Convert the directory `source` into `out`/experts/0, ... and `out`/router; return the experts and the router.

    Missing experts cause a warning. Memory: one expert at a time.

    Args:
        condition: the text encoder, as `build_encoder` reads it; None: CLIP-L/14 by its name on the hub, not loaded.
        codec: the latent codec, as `build_codec` reads it; None: sd-vae-ft-mse by its name, not loaded.
        heads: attention heads of experts and router; needed only for sizes that were never published.

    Raises:
        AtollError: no router or no expert, tensors missing, misshapen or unknown, an expert of a cluster that the
            router does not know, an encoder of another width, a codec of other channels, or something at `out` already.
    """
    if out.exists():
        raise AtollError(f"{out}: exists already; choose another directory, or remove it")
    # The router comes first: it determines the number of clusters and the shape of the latents.
    checkpoint = read_checkpoint(_router_file(source))
    router, router_weights = _router(checkpoint, heads)
    numbers = _experts(source, router["clusters"])
    # Entries that all parts share: the latents, their codec, the text encoder and the clusters.
    encoder = None if condition is None else build_encoder(condition)
    decoder = None if codec is None else build_codec(codec)
    if decoder is not None and decoder.channels != router["channels"]:
        raise AtollError(
            f"codec: {decoder.name!r} has latents of {decoder.channels} channels, Paris's have {router['channels']}; "
            "name sd-vae-ft-mse"
        )
    common = {
        "latent_shape": [router["channels"], *router["size"]],
        "codec": dict(CODEC) if decoder is None else decoder.config(),
        "condition": dict(CONDITION) if encoder is None else encoder.config(),
        "assignment": next(iter(checkpoint.files.values())),  # only this router defines the clusters
        "training": TrainingRecord(mark=CONVERTED, steps=0),
    }
    # Write the router, then one expert after the other.
    with whole_directory(out) as directory:
        routing = RouterCard(network=router, clusters=router["clusters"], **common, conversion=_conversion(checkpoint))
        save_artifact(RunLayout(directory).router, routing, router_weights)
        del checkpoint, router_weights
        for number in numbers:
            checkpoint = read_checkpoint(source / f"expert_{number}")
            network, weights = _expert(checkpoint, heads)
            _check(checkpoint, network, router, None if encoder is None else encoder.dim)
            card = ExpertCard(
                name=f"paris-{number}",
                clusters=[number],
                k=router["clusters"],
                objective=OBJECTIVE.config(),
                network=network,
                **common,
                calibration=None,
                conversion=_conversion(checkpoint),
            )
            save_artifact(RunLayout(directory).expert(str(number)), card, weights)
            del checkpoint, weights  # before the next one is read
    return [RunLayout(out).expert(str(number)) for number in numbers], RunLayout(out).router


def _conversion(checkpoint: Checkpoint) -> ConversionRecord:
    """Return the card's entry for the conversion."""
    return ConversionRecord(kind="paris", modulation="kept", source=checkpoint.files)


def _router_file(source: Path) -> Path:
    """Find the router's weights in `source`. Raises AtollError if there are none."""
    # Any of the names will do; the first that exists is read.
    for name in ROUTER:
        if (source / name).is_file():
            return source / name
    raise AtollError(f"{source}: no {ROUTER[0]}; expected Paris's directory: router/, expert_0/, expert_1/, ...")


def _experts(source: Path, clusters: int) -> list[int]:
    """List the numbers of the experts in `source`, ascending."""
    # Names such as expert_00 and expert_x are not part of the release.
    names = {path.name.removeprefix("expert_") for path in source.glob("expert_*") if path.is_dir()}
    numbers = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
    if not numbers:
        raise AtollError(f"{source}: no expert_0, expert_1, ... beside the router; fetch at least one")
    if numbers[-1] >= clusters:
        raise AtollError(
            f"{source}: expert_{numbers[-1]}, and the router knows {clusters} clusters, 0 to {clusters - 1}; "
            "get experts and router from one place"
        )
    if missing := [f"expert_{number}" for number in range(clusters) if number not in numbers]:
        warnings.warn(f"{source}: {', '.join(missing)} not there; the others take their weight", stacklevel=3)
    return numbers


def _expert(checkpoint: Checkpoint, heads: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert an expert: return its network config and its artifact's tensors."""
    # The sizes follow from the tensors.
    taker = Taker(checkpoint)
    config = {"name": "paris", **_sizes(checkpoint, taker, heads), "states_dim": taker.shape("text_proj.weight", 2)[1]}
    return _taken(taker, config)


def _router(checkpoint: Checkpoint, heads: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert the router: return its network config and its artifact's tensors."""
    taker = Taker(checkpoint)
    # The last layer has one output per cluster.
    clusters = taker.shape("head.4.weight", 2)[0]
    return _taken(taker, {"name": "paris-router", **_sizes(checkpoint, taker, heads), "clusters": clusters})


def _sizes(checkpoint: Checkpoint, taker: Taker, heads: int | None) -> dict[str, Any]:
    """Derive the sizes of an expert or the router from the tensors."""
    # The positions determine only the product of the latent's sides, so assume a square.
    width, channels, patch, _ = taker.shape("patch_embed.weight", 4)
    tokens = taker.shape("pos_embed", 3)[1]
    side, depth = math.isqrt(tokens) * patch, taker.count("layers")
    if tokens * patch**2 != side**2:
        raise AtollError(f"{checkpoint.where}: pos_embed has {tokens} positions; expected a square's, such as 256")
    return {
        "size": [side, side],
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads or published_heads(checkpoint, width, depth),
        "mlp_ratio": taker.shape("layers.0.mlp.0.weight", 2)[0] / width,
    }


def _taken(taker: Taker, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the network's complete configuration, and its tensors under an artifact's names."""
    # On the meta device, since only the names and shapes are needed.
    with torch.device("meta"):
        network: nn.Module = build_network(config)
    # The release has torch's names of attention: q, k and v in one tensor, or q before k and v.
    weights: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        part, _, end = name.rpartition(".")
        if part.endswith(".out"):  # attention's output
            weights[name] = taker.take(f"{part}_proj.{end}", *value.shape)
        elif part.endswith(".qkv"):
            weights[name] = taker.take(f"{part.removesuffix('qkv')}in_proj_{end}", *value.shape)
        elif part.endswith(".q"):  # q first, then k and v, in one tensor
            width, *rest = value.shape
            both = taker.take(f"{part.removesuffix('q')}in_proj_{end}", 3 * width, *rest)
            weights[name], weights[f"{part.removesuffix('q')}kv.{end}"] = both.split([width, 2 * width])
        elif not part.endswith(".kv"):
            weights[name] = taker.take(name, *value.shape)
    taker.done()
    tensors = {f"network.{name}": value for name, value in weights.items()}
    return network.config.model_dump(mode="json"), tensors  # type: ignore[union-attr,operator]


def _check(checkpoint: Checkpoint, network: dict[str, Any], router: dict[str, Any], width: int | None) -> None:
    """Raise AtollError unless the expert has the router's latents and reads states of the condition's width."""
    # Experts and router evaluate the same latent.
    mine, theirs = ([config["channels"], *config["size"]] for config in (network, router))
    if mine != theirs:
        raise AtollError(f"{checkpoint.where}: its latents are {mine}, the router's {theirs}; get both from one place")
    if width not in (None, network["states_dim"]):
        raise AtollError(
            f"condition: its states are {width} wide, those of {checkpoint.where} {network['states_dim']}; "
            "name its own encoder"
        )
