"""Detect the kind of a foreign checkpoint, and the objective and time scale of its training.

DiT, SiT and REPA's networks have the same tensors, but compute different quantities:

    "dit"    eps on linear-beta, time 0..999
    "sit"    velocity on the linear path with t = 1 at data, time 0..1 (arXiv 2401.08740)
    "repa"   velocity on the linear path with t = 1 at noise, time 0..1 (arXiv 2410.06940)

A training file's arguments, REPA's projectors or the file's name decide between them. If nothing does, a checkpoint
with variance outputs, DiT's default, is read as a DiT with a warning; any other one needs `--kind`.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, get_args

from atoll.convert.read import Checkpoint
from atoll.errors import AtollError

CheckpointKind = Literal["dit", "sit", "repa", "pixart", "diffusers-dit"]
KINDS: tuple[CheckpointKind, ...] = get_args(CheckpointKind)
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
    **dict.fromkeys(("sit", "repa"), 1.0),
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
    # The layout comes first, since names are certain.
    for kind, layouts in MARKS.items():
        if any(all(mark in checkpoint.tensors for mark in marks) for marks in layouts):
            return _of_dit_layout(checkpoint, objective or {}) if kind in DIT_LAYOUT else kind
    # No layout fits: list some names, so that the reader sees what the file holds.
    known = "; ".join(f"{kind} ({' or '.join(', '.join(marks) for marks in many)})" for kind, many in MARKS.items())
    names = ", ".join(sorted(checkpoint.tensors)[:4]) or "no tensors"
    raise AtollError(f"{checkpoint.where}: unknown layout ({names}, ...); recognised are {known}")


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
