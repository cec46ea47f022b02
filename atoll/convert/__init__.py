"""Convert foreign checkpoints to experts: `atoll convert`. Nothing in a foreign file is executed.

    "dit"             facebookresearch/DiT: a PyTorch or safetensors file
    "sit", "repa"     SiT's and REPA's networks: the same layout, with other conventions of time and velocity
    "diffusers-dit"   diffusers' DiTTransformer2DModel: a directory, or a file beside its config.json
    "pixart"          PixArt: the same of diffusers' PixArtTransformer2DModel, or PixArt's own `.pth`
    "prx", "sd3", "sana", "lumina2", "flux", "flux2"    diffusers' directories, which are kept only

The result is an ordinary expert: it can be sampled, calibrated and trained further. With the original's objective it
computes the same as the original, if nothing was fitted. With another objective it is a starting point for training
(HDDM, arXiv 2603.06741, Eqs. 19-20: the weights stay, and flow time is fed as DiT's 0..999).

arguments.py        arguments of a conversion, from a run's manifest or from the command line
read.py, names.py   foreign files and their tensors' names; checks for missing, misshapen and unknown tensors
kind.py             the kind of a checkpoint, and its training objective
dit.py, sit.py      the two layouts of DiT; SiT's time
pixart.py           PixArt in diffusers' layout         pixart_original.py   PixArt's own layout
modulation.py       DiT's modulation per block as AdaLN-Single
native.py           the common target of all layouts
foreign.py          diffusers' networks without conversion; pipeline_folder.py: the codec and the encoder beside them
paris.py            Paris's directory, experts and router, as an ensemble's parts
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from atoll.convert.dit import LatentSize, from_diffusers_dit, from_dit
from atoll.convert.kind import (
    CLASSES,
    DIT_LAYOUT,
    KEPT_ONLY,
    KINDS,
    TIME_SCALES,
    CheckpointKind,
    check_kind,
    detect,
    original_objective,
    predicts_velocity,
)
from atoll.convert.modulation import share
from atoll.convert.native import Native
from atoll.convert.pixart import from_pixart
from atoll.convert.pixart_original import as_diffusers, is_original
from atoll.convert.read import Checkpoint, read_checkpoint
from atoll.convert.sit import reversed_time, unscaled
from atoll.encoders.codec import Codec, build_codec
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.encoders.trust import USER, Trust
from atoll.errors import AtollError
from atoll.nn import DiT, DiTConfig, Foreign, build_network
from atoll.objective import Objective
from atoll.storage.artifact import save_artifact
from atoll.storage.cards import CONVERTED, ConversionRecord, ExpertCard, TrainingRecord

__all__ = ["KINDS", "MODULATIONS", "CheckpointKind", "Modulation", "convert", "detect"]

Modulation = Literal["fit", "reinit", "per-block"]
MODULATIONS: tuple[Modulation, ...] = get_args(Modulation)
FACTOR = 8  # image pixels per latent pixel of the autoencoder that all kinds were trained with


@dataclass(frozen=True)
class Destination:
    """The output directory of a converted expert, and the entries of its card that no checkpoint has.

    Attributes: as in `convert`.

    Raises:
        AtollError: `out` exists already, or a cluster is missing or not in 0..k - 1.
    """

    out: Path
    name: str
    clusters: Sequence[int]
    k: int | None
    codec: Mapping[str, Any] | None
    assignment: str | None
    trust: Trust = USER

    def __post_init__(self) -> None:
        # Fail before gigabytes are read.
        if self.out.exists():
            raise AtollError(f"{self.out}: exists already; choose another directory, or remove it")
        clusters, k = self.clusters, self.k
        if not clusters or min(clusters) < 0 or (k is not None and max(clusters) >= k):
            raise AtollError(f"clusters {list(clusters)} of {k}: expected at least one, numbered from 0 to k - 1")

    @property
    def factor(self) -> int:
        """Pixels of an image per latent pixel, each way."""
        return FACTOR if self._codec is None else self._codec.factor

    @cached_property
    def _codec(self) -> Codec | None:
        return build_codec(self.codec, self.trust) if self.codec else None

    def write(
        self,
        network: DiT | Foreign,
        latent_shape: Sequence[int],
        objective: Objective,
        condition: Mapping[str, Any],
        conversion: Mapping[str, Any],
    ) -> Path:
        """Write the artifact and return its directory.

        Args:
            network: the converted network.
            latent_shape: (C, H, W).
            objective: the expert's objective.
            condition, conversion: entries of the card.

        Raises:
            AtollError: the codec's latents have another number of channels, so they could not be decoded.
        """
        # Fail here, rather than at the first decoding.
        if self._codec is not None and self._codec.channels != latent_shape[0]:
            raise AtollError(
                f"codec: {self._codec.name!r} has latents of {self._codec.channels} channels, the network's have "
                f"{latent_shape[0]}; name the codec that the network was trained with"
            )
        # Steps 0 and the mark "converted" tell later stages that nothing was trained here.
        card = ExpertCard(
            name=self.name or self.out.name,
            clusters=self.clusters,
            k=self.k or max(self.clusters) + 1,
            objective=objective.config(),
            network=network.config.model_dump(mode="json"),
            latent_shape=latent_shape,
            codec=dict(self.codec) if self.codec else {"name": "unknown"},
            condition=dict(condition),
            assignment=self.assignment,
            calibration=None,
            training=TrainingRecord(mark=CONVERTED, steps=0),
            conversion=ConversionRecord(**conversion),
        )
        # The prefix separates the network from a calibration's tensors.
        weights = {f"network.{key}": value for key, value in network.state_dict().items()}
        save_artifact(self.out, card, weights)
        return self.out


def convert(
    source: Path,
    out: Path,
    kind: CheckpointKind | Literal["auto"] = "auto",
    objective: Mapping[str, Any] | None = None,
    modulation: Modulation | None = None,
    *,
    condition: Mapping[str, Any] | None = None,
    codec: Mapping[str, Any] | None = None,
    name: str = "",
    clusters: Sequence[int] = (0,),
    k: int | None = None,
    assignment: str | None = None,
    network: Mapping[str, Any] | None = None,
    size: LatentSize | None = None,
    heads: int | None = None,
    pooled: bool = False,
    seed: int = 0,
    classes: int | None = None,
    trust: Trust = USER,
) -> Path:
    """Convert the checkpoint at `source` into the expert artifact `out`, and return `out`.

    Args:
        kind: "auto" detects it by the tensors' names and the training arguments saved with them.
        objective: arguments of `Objective`; None: what the original was trained with.
        modulation: for the kinds with DiT's modulation. "fit" (None): the nearest AdaLN-Single; "reinit": AdaLN-Single
            as in a new network (HDDM); "per-block": DiT's own, exactly. PixArt has AdaLN-Single and keeps it: None.
        condition: the text encoder, as `build_encoder` reads it. PixArt's states must be as wide as its own. None is
            possible for PixArt alone: an unknown encoder, whose expert can be trained on but not sampled.
        codec: as `build_codec` reads it; None: unknown, as above.
        name: the expert's name; "": that of `out`.
        clusters, k: the clusters it covers, and how many there are; None: one more than the highest number.
        assignment: which clusters these are, as in the cards of its ensemble's other parts.
        network: entries that the network's config must have, such as depth; another value is an error. Its heads and
            modulation are used if `heads` and `modulation` are None.
        size: (H, W) of the latent; None: the square of the original. For another size the positions are stretched.
        heads: attention heads, for layouts without config.json in a size that was never published.
        pooled: the network also reads the condition's pooled vector; the layer for it starts at zero.
        seed: for the weights that the checkpoint lacks: the text's projection, N(0, 0.02), and cross-attention, whose
            output is zero.
        classes: the number of a DiT's classes without the null class; None: as its training arguments say.
        trust: what `condition` and `codec` may reach, if they are from a card.

    Raises:
        AtollError: an unknown layout or value, a checkpoint that could be of several kinds, tensors missing, misshapen
            or unknown, a pickle that could run code, or something at `out` already.
    """
    destination = Destination(out, name, clusters, k, codec, assignment, trust)
    if modulation not in (None, *MODULATIONS):
        raise AtollError(f"unknown modulation {modulation!r}; expected one of {', '.join(MODULATIONS)}")
    # The kind of the checkpoint, and the objective of the expert.
    checkpoint = read_checkpoint(source)
    kind = detect(checkpoint, objective) if kind == "auto" else check_kind(checkpoint, kind)
    if kind in KEPT_ONLY:
        raise AtollError(
            f"{source}: a {CLASSES[kind]} has no counterpart among Atoll's networks; keep it as it is: add --keep"
        )
    aim = _aim(kind, checkpoint, objective)
    # The network from its tensors, with the requested modulation.
    required = dict(network or {})
    own_layout = kind in DIT_LAYOUT or (kind == "pixart" and is_original(checkpoint))  # without config.json
    heads = heads or (required.get("heads") if own_layout else None)
    native = _native(checkpoint, kind, size=size, heads=heads, classes=classes, factor=destination.factor)
    chosen = _modulation(kind, modulation, required)
    if chosen in ("fit", "reinit"):
        native = share(native, fit=chosen == "fit")
    _check(native, required, source)
    encoder = build_encoder(condition, trust) if condition else None
    texts, pooled_dim = _text_widths(native, encoder, pooled)
    built = _network(native, texts, pooled_dim, seed)
    # Free the checkpoint before the artifact is written, which needs another copy of the weights.
    files, notes = checkpoint.files, native.notes | ({"weights": checkpoint.key} if checkpoint.key else {})
    del checkpoint, native
    return destination.write(
        built,
        (built.config.channels, *built.config.size),
        aim,
        encoder.config() if encoder is not None else {"name": "unknown", "dim": texts},
        {"kind": kind, "modulation": chosen, "source": files, "seed": seed, **notes},
    )


def _aim(kind: CheckpointKind, checkpoint: Checkpoint, objective: Mapping[str, Any] | None) -> Objective:
    """Return the expert's objective. Raises AtollError if its time scale is not the original's."""
    # The time embedder keeps its weights, so it must read the same range of times.
    own = TIME_SCALES[kind]
    if objective is None:
        return Objective(**original_objective(kind, checkpoint))
    aim = Objective(**({"time_scale": own} | dict(objective)))
    if aim.time_scale != own:
        raise AtollError(
            f"objective.time_scale: got {aim.time_scale}; a {kind!r} reads time as 0..{own:g}: set time_scale: {own:g}"
            + (", or --kind repa for a network trained with time 0..1" if kind == "dit" else "")
        )
    return aim


def _native(
    checkpoint: Checkpoint,
    kind: CheckpointKind,
    *,
    size: LatentSize | None,
    heads: int | None,
    classes: int | None,
    factor: int,
) -> Native:
    """Convert the checkpoint to a native network that keeps its own modulation."""
    # DiT's layout, in three conventions of time and velocity.
    if kind in DIT_LAYOUT:
        native = from_dit(checkpoint, size, heads, classes)
        if "null" in native.notes:
            warnings.warn(
                f"{checkpoint.where}: has no null class; {native.notes['null']} takes its place, until it is trained",
                stacklevel=3,
            )
        if kind == "sit":
            return reversed_time(native, negate=predicts_velocity(checkpoint))
        return unscaled(native) if kind == "repa" else native
    if classes is not None:
        raise AtollError(f"classes {classes}: only a DiT in its own layout needs them; leave --classes out")
    # PixArt's own layout has no config.json; the two of diffusers do.
    if kind == "pixart" and is_original(checkpoint):
        return from_pixart(as_diffusers(checkpoint, size, heads), size, factor)
    if heads is not None:
        raise AtollError(f"heads {heads}: config.json tells the heads of a {kind!r}; leave them out")
    return from_diffusers_dit(checkpoint, size) if kind == "diffusers-dit" else from_pixart(checkpoint, size, factor)


def _modulation(kind: CheckpointKind, modulation: Modulation | None, required: Mapping[str, Any]) -> str:
    """Return the card's entry for the modulation; "single" is PixArt's own."""
    if kind == "pixart" and modulation is not None:
        raise AtollError(f"modulation {modulation!r}: PixArt has AdaLN-Single and keeps it exactly; leave it out")
    if kind == "pixart":
        return "single"
    # A run whose networks are per-block needs no fit.
    return modulation or ("per-block" if required.get("modulation") == "per-block" else "fit")


def _check(native: Native, required: Mapping[str, Any], source: Path) -> None:
    """Raise AtollError unless the network's config has the required entries."""
    if (wanted := required.get("name", "dit")) != "dit":
        raise AtollError(
            f"{source}: its network is a dit (wanted: {wanted}); make atoll.yaml's network and codec equal"
        )
    # A field that the conversion leaves out has the default of a DiT.
    got = {key: native.config.get(key, DiTConfig.model_fields[key].default) for key in required}
    other = [f"{key} {got[key]} (wanted: {value})" for key, value in required.items() if got[key] != value]
    if other:
        raise AtollError(f"{source}: its network has {', '.join(other)}; make atoll.yaml's network and codec equal")


def _text_widths(native: Native, encoder: TextEncoder | None, pooled: bool) -> tuple[int, int | None]:
    """Return the widths of the condition's states and, if the network reads it, of its pooled vector."""
    # Without an encoder only the checkpoint's own text projection determines the width.
    own = native.config.get("states_dim")
    if encoder is None:
        if own is None:
            raise AtollError(
                "DiT knows no text: say which condition encoder the expert reads (--condition clip,weights=..., "
                "or the --run that it is for)"
            )
        if pooled:
            raise AtollError("pooled: without a `condition` encoder nothing tells the width of its pooled vector")
        return own, None
    # With an encoder, its states must fit that projection.
    if own not in (None, encoder.dim):
        raise AtollError(f"condition: its states are {encoder.dim} wide, the checkpoint's {own}; name its own encoder")
    if pooled and encoder.pooled_dim is None:
        raise AtollError("pooled: this condition encoder has no pooled vector; leave it out")
    return encoder.dim, encoder.pooled_dim if pooled else None


def _network(native: Native, states_dim: int, pooled_dim: int | None, seed: int) -> DiT:
    """Build a new network and replace its initial weights by the checkpoint's."""
    # Forked, so that a conversion leaves the caller's random stream alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network({"name": "dit", **native.config, "states_dim": states_dim, "pooled_dim": pooled_dim})
    assert isinstance(network, DiT)
    # The layer for the pooled vector is zero, so that the network still computes what the checkpoint did.
    weights: dict[str, Tensor] = {}
    if pooled_dim:
        weights = {k: torch.zeros_like(v) for k, v in network.state_dict().items() if ".pooled." in k}
    network.load_state_dict(weights | native.weights, strict=False)
    return network
