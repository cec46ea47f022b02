"""Learning rates by width (muP): the rate that was found at a small width serves a larger one.

Let n be a network's width and n0 `train.lr_width`. AdamW steps the matrices whose inputs have n values, hidden ones and
the last layer, with the rate lr n0 / n. Vectors, tables and the matrices that embed inputs of a fixed size keep lr
(Yang et al. 2022, arXiv 2203.03466, Table 3; Table 8 with its output multiplier is the same for Adam, and a last layer
that starts at zero needs no other rule. For diffusion transformers: arXiv 2505.15270).

Muon's step of a hidden matrix has the spectral norm lr 0.2 sqrt(max(rows, columns)), which grows with sqrt(n).
The spectral condition (Yang et al. 2023, arXiv 2310.17813) asks for sqrt(rows / columns), which does not depend on n.
So its rate is lr sqrt(n0 / n).

The decay of a step, lr times weight_decay, is the same for all parameters, so it does not depend on the width.
Initialisation is not changed: the variance of the blocks' matrices falls with 1 / n as it is, and gates and the last
layer start at zero.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.nn.lora import A, B

_NETWORKS = ("dit", "mmdit", "router")
# The layers with inputs of a fixed size, by their names in the networks of `atoll.nn`; and a second layer behind one.
_INPUTS = ("embed", "embed_states", "embed_size", "conditioner.time.0", "conditioner.pooled")
_HIDDEN = "embed_states.2"


def rate_scales(
    module: nn.Module,
    trained: Sequence[tuple[str, nn.Parameter]],
    muon: Iterable[nn.Parameter],
    settings: TrainSettings,
) -> dict[nn.Parameter, float]:
    """Return the factors of the rates that differ from 1.

    Args:
        module: the network.
        trained: its trained parameters by name.
        muon: those that Muon steps.
        settings: of the training.

    Raises:
        AtollError: a network without a known width, or a low-rank update.
    """
    if settings.lr_width is None:
        return {}
    config = getattr(module, "config", None)
    if (name := getattr(config, "name", None)) not in _NETWORKS:
        raise AtollError(
            f"train.lr_width: the matrices of a network {name!r} are not known; expected {', '.join(_NETWORKS)}, or "
            "leave it out"
        )
    if any(parameter.endswith((A, B)) for parameter, _ in trained):
        raise AtollError("train.lr_width: a low-rank update has a rank, and no width; leave it out of lora.train")
    ratio, by_muon = settings.lr_width / config.width, set(muon)  # type: ignore[union-attr]
    scales = {p: ratio**0.5 if p in by_muon else ratio for name, p in trained if grows_with_width(name, p)}
    return {p: scale for p, scale in scales.items() if scale != 1}


def grows_with_width(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter of this name is a matrix whose inputs grow with the network's width."""
    layer, _, kind = name.rpartition(".")
    if kind != "weight" or parameter.ndim != 2:
        return False
    return layer == _HIDDEN or not f"{layer}.".startswith(tuple(f"{one}." for one in _INPUTS))


def by_scale(parameters: Iterable[nn.Parameter], scales: dict[nn.Parameter, float]) -> list[list[nn.Parameter]]:
    """Return groups of parameters with equal factors, in the order of their first ones."""
    groups: dict[float, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(scales.get(p, 1.0), []).append(p)
    return list(groups.values())
