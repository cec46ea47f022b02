"""Remove wrappers' prefixes from tensor names: DDP, torch.compile, FSDP, AveragedModel, Lightning, DeepSpeed."""

import re
import warnings
from collections.abc import Iterable

from torch import Tensor

from atoll.errors import AtollError

# Before every name, in any order and number.
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "ema_model.", "base_model.", "net.", "network.", "_forward_module."),
    *("denoiser.", "diffusion_model."),
)
# Every network that is converted has one of these tensors, once.
_FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")
# Inside names: a block that was compiled, sharded or recomputed by itself. No network has these names of its own.
INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Scalars beside the weights, which averages count with: torch's AveragedModel, and others.
COUNTERS = ("n_averaged", "initted", "num_updates", "step", "decay")


def unwrapped(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Rename tensors to the names that the network itself gives them.

    Args:
        tensors: tensors by their names in the file.
        where: the file, for the message.

    Raises:
        AtollError: two tensors would have the same name.
    """
    # Inside prefixes first: they may follow any outer one.
    names = {name: INSIDE.sub("", name) for name in tensors}
    # A counter has the prefixes of the outer wrappers only, so remove prefixes and counters in turns.
    prefix = ""
    while True:
        names = {name: inner.removeprefix(prefix) for name, inner in names.items()}
        names = {name: inner for name, inner in names.items() if inner not in COUNTERS or tensors[name].numel() > 1}
        if not (prefix := _shared(names.values())):
            break
    # Two networks in one file would overwrite each other.
    result = {inner: tensors[name] for name, inner in names.items()}
    if len(result) < len(names):
        inner = next(inner for inner in names.values() if list(names.values()).count(inner) > 1)
        raise AtollError(
            f"{where}: holds {inner} twice under different prefixes; save one network's state_dict() alone"
        )
    return result


def one_network(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of the one network in a Lightning module, which may hold a codec, text encoder or metrics too.

    Args:
        tensors: tensors by name, from `unwrapped`.
        where: the file, for messages.

    Raises:
        AtollError: there are several networks, such as weights and their average.
    """
    # The network's own tensor at the top: nothing is around it.
    if not tensors.keys().isdisjoint(_FIRST):
        return tensors
    around = sorted({name.removesuffix(mark) for name in tensors for mark in _FIRST if name.endswith(f".{mark}")})
    if len(around) > 1:
        raise AtollError(
            f"{where}: holds {len(around)} networks, {', '.join(f'{prefix}*' for prefix in around[:4])}; expected one: "
            "save the state_dict() of the one to convert, the averaged one if there is one"
        )
    if not around:
        return tensors
    # Nothing is left out in silence.
    prefix = around[0]
    rest = sorted({f"{name.split('.')[0]}.*" for name in tensors if not name.startswith(prefix)})
    if rest:
        more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
        warnings.warn(f"{where}: reading {prefix}*; {', '.join(rest[:4])}{more} not read", stacklevel=4)
    inner = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return unwrapped(inner, where)


def _shared(names: Iterable[str]) -> str:
    """Return a prefix of `PREFIXES` that all names share; "" if there is none."""
    # A prefix that only some names share is part of a name.
    names = list(names)
    return next((p for p in PREFIXES if names and all(n.startswith(p) and n != p for n in names)), "")
