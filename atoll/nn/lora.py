"""Low-rank updates of linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

A frozen layer W x + b becomes W x + b + s B (A x), with A [r,inputs], B [outputs,r] and s = alpha / r. B is zero at
first, so the network's output is what it was, to the bit. The tensors are named as peft and diffusers name them:

    blocks.0.attention.qkv.lora_A.weight    [r,inputs]
    blocks.0.attention.qkv.lora_B.weight    [outputs,r]
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.storage.cards import LoraRecord

A, B = ".lora_A.weight", ".lora_B.weight"  # ends of the names of a layer's two matrices


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trainable update of low rank; [...,inputs] -> [...,outputs].

    Args:
        base: the layer.
        rank: r.
        scale: s, of the update.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        # The paper draws A from a Gaussian. peft draws it as nn.Linear does, which takes the width into account.
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.base(x), self.lora_B(self.lora_A(x)), alpha=self.scale)  # [...,outputs]

    # Networks look at these of a linear layer.
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


def add_lora(network: nn.Module, record: LoraRecord) -> list[str]:
    """Freeze a network, and add a low-rank update to its target layers, in place.

    Args:
        network: any; its blocks are the elements of its module lists.
        record: rank, alpha and targets. A is drawn from torch's global generator.

    Returns:
        The names of the updated layers, in the network's order.

    Raises:
        AtollError: a target that no layer has, or a rank that is no lower than a layer's own.
    """
    names = target_layers(network, record.targets)
    layers: list[nn.Linear] = [network.get_submodule(name) for name in names]  # type: ignore[misc]
    # Refused before anything changes.
    for name, layer in zip(names, layers, strict=True):
        if record.rank >= (full := min(layer.in_features, layer.out_features)):
            raise AtollError(
                f"lora: rank {record.rank}, but {name} maps {layer.in_features} to {layer.out_features}; expected a "
                f"rank below {full}, or other lora.targets"
            )
    network.requires_grad_(False)
    for name, layer in zip(names, layers, strict=True):
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, LowRankLinear(layer, record.rank, record.alpha / record.rank))
    return names


def target_layers(network: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers in blocks whose names end in a target; without targets, of all of them.

    Raises:
        AtollError: no layer is in a block, or none ends in a target.
    """
    # A block is an element of a module list; embeddings, conditioning and the last layer are outside.
    inside = {
        f"{name}.{child}" for name, module in network.named_modules() if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    }  # fmt: skip
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linear if any(name == block or name.startswith(f"{block}.") for block in inside)]
    if not layers:
        raise AtollError("lora: this network has no linear layer inside of a block; train it without --lora")
    for target in targets:
        if not any(_ends(name, target) for name in layers):
            raise AtollError(f"lora.targets: no layer ends in {target!r}; expected some of {', '.join(_kinds(layers))}")
    return [name for name in layers if not targets or any(_ends(name, target) for target in targets)]


def lora_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the two matrices of every updated layer of a network by `add_lora`, under their names in files."""
    return {name: parameter for name, parameter in network.named_parameters() if name.endswith((A, B))}


@torch.no_grad()
def merge_lora(
    weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], record: LoraRecord, scale: float, where: str
) -> dict[str, Tensor]:
    """Add a low-rank update to the weights of the network that it was trained on.

    Args:
        weights: of the network, by name.
        lora: A and B of each updated layer, by name.
        record: rank and alpha.
        scale: the update is multiplied by this, beside alpha / rank; 0 returns the weights.
        where: the update's file, for messages.

    Returns:
        The weights; new tensors in place of the updated ones, in their dtype.

    Raises:
        AtollError: the update does not fit the network.
    """
    merged = dict(weights)
    layers = sorted({name.removesuffix(A).removesuffix(B) for name in lora})
    for name in layers:
        a, b, weight = lora.get(name + A), lora.get(name + B), weights.get(f"{name}.weight")
        if a is None or b is None or weight is None:
            raise AtollError(f"{where}: {name:.100} is no pair of matrices for a layer of its base; get a fresh copy")
        r, shape = record.rank, tuple(weight.shape)
        if len(shape) != 2 or a.shape != (r, shape[1]) or b.shape != (shape[0], r):
            raise AtollError(
                f"{where}: {name:.100} has {list(a.shape)} and {list(b.shape)} for a weight of {list(shape)} and rank "
                f"{r}; get a fresh copy"
            )
        # In float32, whatever the weights are stored in; rounded once.
        update = torch.add(weight.float(), b.float() @ a.float(), alpha=scale * record.alpha / r)
        merged[f"{name}.weight"] = update.to(weight)
    return merged


def _ends(name: str, target: str) -> bool:
    """Whether a name ends in a target, at a dot."""
    return name == target or name.endswith(f".{target}")


def _kinds(layers: Sequence[str]) -> list[str]:
    """The names inside of a block, each once: attention.qkv, mlp.0."""
    kinds: dict[str, None] = {}
    for name in layers:
        parts = name.split(".")
        # What follows the last number that is not the name's end.
        last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
        kinds[".".join(parts[last + 1 :])] = None
    return list(kinds)
