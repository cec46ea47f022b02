"""Foreign checkpoints into experts: `atoll convert`. Nothing of a foreign file is executed.

    "dit"             facebookresearch/DiT: a `.pt` or safetensors file
    "diffusers-dit"   diffusers' DiTTransformer2DModel: a directory, or a file beside its config.json
    "pixart"          diffusers' PixArtTransformer2DModel: the same

The result is an expert's directory like any other: it can be sampled, calibrated, and trained on. With the objective of
the original (eps, linear-beta) it computes what the original does, if nothing was fitted; with another one it is where
training starts (HDDM, arXiv 2603.06741, Eqs. 19-20: the weights stay, and flow time is fed as DiT's 0..999).

arguments.py   what a conversion is told: by a run's manifest, or in the words of the command line
read.py        foreign files, and what is missing, misshapen or left over in them
dit.py         the two layouts of DiT        pixart.py   PixArt
modulation.py  DiT's modulation per block as AdaLN-Single
native.py      what all layouts are turned into
foreign.py     diffusers' PixArt and DiT kept as they are, not turned into anything
paris.py       Paris's directory, experts and router, into an ensemble's parts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from atoll.convert.dit import ImageSize, from_diffusers_dit, from_dit
from atoll.convert.modulation import share
from atoll.convert.native import Native
from atoll.convert.pixart import from_pixart
from atoll.convert.read import Checkpoint, read_checkpoint
from atoll.encoders.codec import build_codec
from atoll.encoders.text import build_encoder
from atoll.errors import AtollError
from atoll.nn import DiT, DiTConfig, Foreign, build_network
from atoll.objective import Objective
from atoll.storage.artifact import save_artifact

__all__ = ["KINDS", "MODULATIONS", "CheckpointKind", "Modulation", "convert", "detect"]

CheckpointKind = Literal["dit", "pixart", "diffusers-dit"]
Modulation = Literal["fit", "reinit", "per-block"]
KINDS: tuple[CheckpointKind, ...] = get_args(CheckpointKind)
MODULATIONS: tuple[Modulation, ...] = get_args(Modulation)
MARKS: dict[CheckpointKind, tuple[str, ...]] = {
    "dit": ("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"),
    "diffusers-dit": ("pos_embed.proj.weight", "proj_out_1.weight"),
    "pixart": ("pos_embed.proj.weight", "adaln_single.linear.weight"),
}
ORIGINAL = {"prediction": "eps", "schedule": "linear-beta"}  # what all three kinds were trained with
TIME_SCALE = 999.0
FACTOR = 8  # of the autoencoder that all three kinds were trained with


@dataclass(frozen=True)
class Destination:
    """Where an expert from a foreign checkpoint goes, and what its card says that no checkpoint tells.

    Attributes: as `convert` takes them.

    Raises:
        AtollError: something at `out` already, no cluster, or one that is not from 0 to k - 1.
    """

    out: Path
    name: str
    clusters: Sequence[int]
    k: int | None
    codec: Mapping[str, Any] | None
    assignment: str | None

    def __post_init__(self) -> None:
        if self.out.exists():
            raise AtollError(f"{self.out}: exists already; choose another place, or remove it")
        clusters, k = self.clusters, self.k
        if not clusters or min(clusters) < 0 or (k is not None and max(clusters) >= k):
            raise AtollError(f"clusters {list(clusters)} of {k}: expected at least one, numbered from 0 to k - 1")

    @property
    def factor(self) -> int:
        """Pixels of an image per latent pixel, each way."""
        return build_codec(self.codec).factor if self.codec else FACTOR

    def write(
        self,
        network: DiT | Foreign,
        latent_shape: Sequence[int],
        objective: Objective,
        condition: Mapping[str, Any],
        conversion: Mapping[str, Any],
    ) -> Path:
        """Writes the artifact; latent_shape: (C, H, W); condition and conversion: as they are to stand in the card."""
        card = {
            "name": self.name or self.out.name,
            "clusters": list(self.clusters),
            "k": self.k or max(self.clusters) + 1,
            "objective": objective.config(),
            "network": network.config.model_dump(mode="json"),
            "latent_shape": list(latent_shape),
            "codec": dict(self.codec) if self.codec else {"name": "unknown"},
            "condition": dict(condition),
            "assignment": self.assignment,
            "calibration": None,
            "training": {"mark": "converted", "steps": 0},
            "conversion": dict(conversion),
        }
        weights = {f"network.{key}": value for key, value in network.state_dict().items()}
        save_artifact(self.out, "expert", card, weights)
        return self.out


def convert(
    source: Path,
    out: Path,
    kind: CheckpointKind | Literal["auto"] = "auto",
    objective: Mapping[str, Any] | None = None,
    modulation: Modulation | None = None,
    condition: Mapping[str, Any] | None = None,
    codec: Mapping[str, Any] | None = None,
    name: str = "",
    clusters: Sequence[int] = (0,),
    k: int | None = None,
    assignment: str | None = None,
    network: Mapping[str, Any] | None = None,
    size: ImageSize | None = None,
    heads: int | None = None,
    pooled: bool = False,
    seed: int = 0,
) -> Path:
    """Converts the checkpoint at `source` into the expert artifact `out`, and returns `out`.

    Args:
        kind: "auto" tells it by the tensors' names.
        objective: arguments of `Objective`; None: eps on linear-beta, what the original was trained with.
        modulation: of DiT's two kinds. "fit" (None): AdaLN-Single nearest to theirs; "reinit": AdaLN-Single as in a new
            network (HDDM); "per-block": theirs, exactly. PixArt has AdaLN-Single already and keeps it: None.
        condition: the text encoder, as `build_encoder` reads it. PixArt's states must be as wide as its own; None
            there: that of a network whose encoder is not known, which can be trained on but not sampled.
        codec: as `build_codec` reads it; None: not known, as above.
        name: of the expert; "": that of `out`.
        clusters, k: the clusters it is of, and how many there are; None: one more than the highest named.
        assignment: which clusters these are, as the cards of its ensemble's other parts have it.
        network: what a DiT's config must say, such as depth: a checkpoint that says otherwise is an error. Its heads
            and modulation are taken where `heads` and `modulation` are None.
        size: (H, W) of the latent; None: the square of the original. For another one the positions are stretched.
        heads: of a "dit" whose size is none of the published ones.
        pooled: the network also reads the condition's pooled vector; the layer for it starts at zero.
        seed: of what the checkpoint does not have: the text's projection, N(0, 0.02), and cross-attention, whose
            output is zero.

    Raises:
        AtollError: an unknown layout or value, tensors missing, misshapen or unknown, a pickle that holds more than
            tensors, or something at `out` already.
    """
    destination = Destination(out, name, clusters, k, codec, assignment)
    if modulation not in (None, *MODULATIONS):
        raise AtollError(f"unknown modulation {modulation!r}; expected one of {', '.join(MODULATIONS)}")
    aim = _aim(objective)
    checkpoint = read_checkpoint(source)
    kind = detect(checkpoint) if kind == "auto" else kind
    wanted = dict(network or {})
    heads = heads or (wanted.get("heads") if kind == "dit" else None)
    native = _native(checkpoint, kind, size, heads, destination.factor)
    told = _modulation(kind, modulation, wanted)
    if told in ("fit", "reinit"):
        native = share(native, fit=told == "fit")
    _check(native, wanted, source)
    texts, pooled_dim = _text_widths(native, condition, pooled)
    built = _network(native, texts, pooled_dim, seed)
    files, notes = checkpoint.files, native.notes
    del checkpoint, native  # gigabytes that need not be there while the artifact is written
    return destination.write(
        built,
        (built.config.channels, *built.config.size),
        aim,
        build_encoder(condition).config() if condition else {"name": "unknown", "dim": texts},
        {"kind": kind, "modulation": told, "source": files, "seed": seed, **notes},
    )


def detect(checkpoint: Checkpoint) -> CheckpointKind:
    """The kind of a checkpoint, by the names of its tensors. Raises AtollError where it is none that is known."""
    for kind, marks in MARKS.items():
        if all(mark in checkpoint.tensors for mark in marks):
            return kind
    known = "; ".join(f"{kind} ({', '.join(marks)})" for kind, marks in MARKS.items())
    found = ", ".join(sorted(checkpoint.tensors)[:4]) or "no tensors"
    raise AtollError(f"{checkpoint.where}: unknown layout ({found}, ...); recognised are {known}")


def _aim(objective: Mapping[str, Any] | None) -> Objective:
    """The expert's objective. Raises AtollError for one that feeds the network other times than the original's."""
    aim = Objective(**(ORIGINAL if objective is None else dict(objective)))
    if aim.time_scale != TIME_SCALE:
        raise AtollError(f"objective.time_scale: got {aim.time_scale}; the original reads time as 0..999: leave it out")
    return aim


def _native(
    checkpoint: Checkpoint, kind: CheckpointKind, size: ImageSize | None, heads: int | None, factor: int
) -> Native:
    if kind not in KINDS:
        raise AtollError(f"unknown kind {kind!r}; expected auto or one of {', '.join(KINDS)}")
    if kind == "dit":
        return from_dit(checkpoint, size, heads)
    if heads is not None:
        raise AtollError(f"heads {heads}: config.json tells the heads of a {kind!r}; leave them out")
    if kind == "diffusers-dit":
        return from_diffusers_dit(checkpoint, size)
    return from_pixart(checkpoint, size, factor)


def _modulation(kind: CheckpointKind, asked: Modulation | None, wanted: Mapping[str, Any]) -> str:
    """What the card says of the modulation: "single" is PixArt's own."""
    if kind == "pixart" and asked is not None:
        raise AtollError(f"modulation {asked!r}: PixArt has AdaLN-Single and keeps it exactly; leave it out")
    if kind == "pixart":
        return "single"
    return asked or ("per-block" if wanted.get("modulation") == "per-block" else "fit")


def _check(native: Native, wanted: Mapping[str, Any], source: Path) -> None:
    """Raises AtollError unless the network's config says what is wanted."""
    got = {key: native.config.get(key, DiTConfig.model_fields[key].default) for key in wanted}
    other = [f"{key} {got[key]} (wanted: {value})" for key, value in wanted.items() if got[key] != value]
    if other:
        raise AtollError(f"{source}: its network has {', '.join(other)}; make atoll.yaml's network and codec equal")


def _text_widths(native: Native, condition: Mapping[str, Any] | None, pooled: bool) -> tuple[int, int | None]:
    """Widths of the condition's states and, where it is to be read, of its pooled vector."""
    own = native.config.get("states_dim")
    if condition is None:
        if own is None:
            raise AtollError(
                "DiT knows no text: say which condition encoder the expert is to have (--condition clip,weights=..., "
                "or the --run that it is for)"
            )
        if pooled:
            raise AtollError("pooled: without a `condition` encoder nothing tells the width of its pooled vector")
        return own, None
    encoder = build_encoder(condition)
    if own not in (None, encoder.dim):
        raise AtollError(f"condition: its states are {encoder.dim} wide, the checkpoint's {own}; name its own encoder")
    if pooled and encoder.pooled_dim is None:
        raise AtollError("pooled: this condition encoder has no pooled vector; leave it out")
    return encoder.dim, encoder.pooled_dim if pooled else None


def _network(native: Native, states_dim: int, pooled_dim: int | None, seed: int) -> DiT:
    """A new network with the checkpoint's weights in place of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network({"name": "dit", **native.config, "states_dim": states_dim, "pooled_dim": pooled_dim})
    assert isinstance(network, DiT)
    weights: dict[str, Tensor] = {}
    if pooled_dim:  # zero, so that the network still computes what the checkpoint did
        weights = {k: torch.zeros_like(v) for k, v in network.state_dict().items() if ".pooled." in k}
    network.load_state_dict(weights | native.weights, strict=False)
    return network
