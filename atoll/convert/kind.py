"""Detect the kind of a foreign checkpoint, and the objective and time scale of its training.

DiT, SiT and REPA's networks have the same tensors, but compute different quantities:

    "dit"    eps on linear-beta, time 0..999
    "sit"    velocity on the linear path with t = 1 at data, time 0..1 (arXiv 2401.08740)
    "repa"   velocity on the linear path with t = 1 at noise, time 0..1 (arXiv 2410.06940)

A training file's arguments, REPA's projectors or the file's name decide between them. If nothing does, a checkpoint
with variance outputs, DiT's default, is read as a DiT with a warning; any other one needs `--kind`.

The networks of diffusers are recognised by the class in their config.json. Those without a counterpart among Atoll's
own networks can only be kept as they are.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, get_args

from atoll.convert.read import Checkpoint
from atoll.errors import AtollError
from atoll.nn.foreign_calls import Class

CheckpointKind = Literal[
    "dit", "sit", "repa", "pixart", "diffusers-dit", "prx", "sd3", "sana", "lumina2", "flux", "flux2"
]
KINDS: tuple[CheckpointKind, ...] = get_args(CheckpointKind)
# The kinds that can be kept as they are, and those of them that cannot be converted.
CLASSES: dict[CheckpointKind, Class] = {
    "pixart": "PixArtTransformer2DModel",
    "diffusers-dit": "DiTTransformer2DModel",
    "prx": "PRXTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "sana": "SanaTransformer2DModel",
    "lumina2": "Lumina2Transformer2DModel",
    "flux": "FluxTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
}
KEPT_ONLY: tuple[CheckpointKind, ...] = ("prx", "sd3", "sana", "lumina2", "flux", "flux2")
DIT_LAYOUT: tuple[CheckpointKind, ...] = ("dit", "sit", "repa")  # whose tensors have the same names
PIXART_LAYOUT = ("x_embedder.proj.weight", "t_block.1.weight")  # PixArt's own names, not diffusers'
PIXEL_CHANNELS = (1, 3)  # SiT and REPA train on an autoencoder's latents, which have more
PROJECTORS = "projectors."  # REPA's, used in training only
# Tensor names that identify a layout.
MARKS: dict[CheckpointKind, tuple[tuple[str, ...], ...]] = {
    "dit": (("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"),),
    "diffusers-dit": (("pos_embed.proj.weight", "proj_out_1.weight"),),
    "pixart": (("pos_embed.proj.weight", "adaln_single.linear.weight"), PIXART_LAYOUT),
}
TIME_SCALES: dict[CheckpointKind, float] = {
    **dict.fromkeys(("dit", "pixart", "diffusers-dit"), 999.0),
    **dict.fromkeys(("sit", "repa", "prx", "lumina2", "flux", "flux2"), 1.0),
    **dict.fromkeys(("sd3", "sana"), 1000.0),
}
# Original layouts of networks that only diffusers' layout can be kept of: tensor names -> the class.
ORIGINALS: dict[tuple[str, ...], Class] = {
    ("double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"): "Flux2Transformer2DModel",
    ("double_blocks.0.img_attn.qkv.weight",): "FluxTransformer2DModel",
    ("joint_blocks.0.x_block.attn.qkv.weight",): "SD3Transformer2DModel",
    ("x_embedder.proj.weight", "blocks.0.mlp.inverted_conv.conv.weight"): "SanaTransformer2DModel",
    ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"): "Lumina2Transformer2DModel",
}
# Paths and predictions in the training scripts -> in Atoll. GVP is alpha = cos(pi t / 2), sigma = sin(pi t / 2).
GVP = {"name": "cosine", "s": 1e-8}
PATHS: dict[str, dict[str, Any]] = {
    "sit": {"Linear": "linear", "GVP": GVP},
    "repa": {"linear": "linear", "cosine": GVP},
}
PREDICTIONS = {"sit": {"velocity": "flow", "noise": "eps"}, "repa": {"v": "flow"}}


def detect(checkpoint: Checkpoint, objective: Mapping[str, Any] | None = None) -> CheckpointKind:
    """Detect the kind of a checkpoint by its tensors' names, training arguments and file name.

    Args:
        checkpoint: the checkpoint.
        objective: the training objective according to the caller; None if unknown.

    Raises:
        AtollError: the kind is unknown, or several kinds are possible.
    """
    # The class in config.json, and layouts of which nothing can be made.
    own_class = (checkpoint.config or {}).get("_class_name")
    for kind in KEPT_ONLY:
        if CLASSES[kind] == own_class:
            return kind
    _refuse_original(checkpoint)
    # Tensor names are certain.
    for kind, layouts in MARKS.items():
        if any(all(mark in checkpoint.tensors for mark in marks) for marks in layouts):
            return _of_dit_layout(checkpoint, objective or {}) if kind in DIT_LAYOUT else kind
    # No layout fits: list some names, so that the reader sees what the file holds.
    known = "; ".join(f"{kind} ({' or '.join(', '.join(marks) for marks in many)})" for kind, many in MARKS.items())
    names = ", ".join(sorted(checkpoint.tensors)[:4]) or "no tensors"
    own = f"config.json names a {own_class}; " if own_class else ""
    classes = ", ".join(CLASSES[kind] for kind in KEPT_ONLY)
    raise AtollError(
        f"{checkpoint.where}: unknown layout ({own}{names}, ...); recognised are {known}; and diffusers' "
        f"directories of {classes}"
    )


def _refuse_original(checkpoint: Checkpoint) -> None:
    """Raise AtollError for the original layout of a network that can only be kept in diffusers' layout."""
    for marks, cls in ORIGINALS.items():
        if all(mark in checkpoint.tensors for mark in marks):
            raise AtollError(
                f"{checkpoint.where}: a {cls} in its original layout; expected diffusers' layout: write it with "
                f"{cls}.from_single_file(...).save_pretrained(DIR), and name DIR"
            )


def check_kind(checkpoint: Checkpoint, kind: str) -> CheckpointKind:
    """Validate a kind named by the caller. Warn if the training arguments contradict it.

    Raises:
        AtollError: the kind is unknown.
    """
    # An unknown kind would fail later with a less helpful message.
    if kind not in KINDS:
        raise AtollError(f"unknown kind {kind!r}; expected auto or one of {', '.join(KINDS)}")
    # Only a warning: the caller may know better than the saved arguments.
    trained = _kind_of_arguments(checkpoint)
    if kind in DIT_LAYOUT and trained not in (None, kind):
        warnings.warn(
            f"{checkpoint.where}: read as a {kind!r}, as requested; its training arguments are those of a {trained!r}",
            stacklevel=4,
        )
    return kind


def original_objective(kind: CheckpointKind, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's training objective as arguments of `Objective`.

    Raises:
        AtollError: the training arguments name a path or a prediction that `Objective` cannot express.
    """
    # The time embedder reads the range of its training.
    time_scale = TIME_SCALES[kind]
    # Velocities on the linear path. Sana's times have a factor in config.json.
    if kind in KEPT_ONLY:
        factor = (checkpoint.config or {}).get("timestep_scale", 1.0) if kind == "sana" else 1.0
        if not isinstance(factor, int | float) or isinstance(factor, bool) or factor <= 0:
            raise AtollError(
                f"{checkpoint.where}: config.json: got timestep_scale {factor!r:.40}; expected a number above 0"
            )
        return {"prediction": "flow", "schedule": "linear", "time_scale": time_scale * factor}
    # DiT and PixArt follow DDPM; their training scripts offer nothing else.
    if kind not in PATHS:
        return {"prediction": "eps", "schedule": "linear-beta", "time_scale": time_scale}
    # SiT's and REPA's scripts offer several; their defaults come first in the tables.
    path = str(checkpoint.args.get("path_type", next(iter(PATHS[kind]))))
    prediction = str(checkpoint.args.get("prediction", next(iter(PREDICTIONS[kind]))))
    if path not in PATHS[kind] or prediction not in PREDICTIONS[kind]:
        raise AtollError(
            f"{checkpoint.where}: trained with path {path!r} and prediction {prediction!r}; expected one of "
            f"{', '.join(PATHS[kind])} and one of {', '.join(PREDICTIONS[kind])}. To only start training from its "
            "weights, name an objective"
        )
    return {
        "prediction": PREDICTIONS[kind][prediction],
        "schedule": PATHS[kind][path],
        "time_scale": time_scale,
    }


def predicts_velocity(checkpoint: Checkpoint) -> bool:
    """Return whether a SiT predicts a velocity, whose sign depends on the direction of time."""
    # A SiT's script predicts velocity by default.
    return str(checkpoint.args.get("prediction", "velocity")) == "velocity"


def _of_dit_layout(checkpoint: Checkpoint, objective: Mapping[str, Any]) -> CheckpointKind:
    """Detect which of the three kinds with DiT's tensors it is. Raises AtollError if that is unclear."""
    # Certain evidence: the training script, REPA's own layers, the caller's convention.
    if (trained := _kind_of_arguments(checkpoint)) is not None:
        return trained
    if any(name.startswith(PROJECTORS) for name in checkpoint.tensors):
        return "repa"
    if objective.get("prediction") == "flow" and objective.get("time_scale") == 1.0:
        return "repa"  # t = 1 at noise, unscaled
    # Weak evidence: the file name, and the variance outputs that DiT trains by default.
    choose = "say which it is: --kind dit, sit or repa"
    named = _kind_of_name(checkpoint.where)
    if named == "dit":
        return named
    if named is not None:
        raise AtollError(f"{checkpoint.where}: its name says {named!r}, but its tensors fit a DiT as well; {choose}")
    if (reason := _no_variance(checkpoint)) is not None:
        raise AtollError(f"{checkpoint.where}: could be a DiT, a SiT or REPA's ({reason}); {choose}")
    warnings.warn(
        f"{checkpoint.where}: read as a DiT; a SiT has the same tensors. If it is one, add --kind sit", stacklevel=5
    )
    return "dit"


def _kind_of_arguments(checkpoint: Checkpoint) -> CheckpointKind | None:
    """Detect the kind by the training arguments in the file; None if they do not determine it."""
    # Each training script has arguments of its own.
    args = checkpoint.args
    model = args.get("model")
    if "path_type" in args:
        # Both scripts have the argument; REPA's has lower-case paths, and an encoder to align with.
        is_repa = str(args["path_type"]) in PATHS["repa"] or "enc_type" in args or "proj_coeff" in args
        return "repa" if is_repa else "sit"
    return "dit" if isinstance(model, str) and model.startswith("DiT") else None


def _kind_of_name(where: str) -> CheckpointKind | None:
    """Detect the kind by the file name, such as SiT-XL-2-256x256.pt; None if it names no kind."""
    # Only the name: directories may be called anything.
    name = PurePath(where).name
    for kind in DIT_LAYOUT[::-1]:
        if re.search(rf"(?<![a-z]){kind}(?![a-z])", name, re.IGNORECASE):
            return kind
    return None


def _no_variance(checkpoint: Checkpoint) -> str | None:
    """Explain why a checkpoint differs from DiT's default, which trains variance outputs; None if it does not."""
    # Weights and kernel show the channels of outputs and inputs.
    weight, kernel = (checkpoint.tensors.get(n) for n in ("final_layer.linear.weight", "x_embedder.proj.weight"))
    if weight is None or kernel is None or weight.ndim != 2 or kernel.ndim != 4:
        return None  # damaged: the conversion names it
    channels, patch = kernel.shape[1:3]
    # A network on pixels can only be a DiT.
    if channels in PIXEL_CHANNELS:
        return None
    if len(weight) == channels * patch**2:
        return "it has no variance outputs, which a DiT has by default"
    if len(weight) != 2 * channels * patch**2:
        return None
    # SiT has these outputs too, but no gradient ever reaches them: they stay at their initial zero.
    eps, variance = weight.unflatten(0, (patch**2, 2, channels)).unbind(1)
    return "its variance outputs were never trained" if eps.any() and not variance.any() else None
