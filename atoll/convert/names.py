"""Remove wrappers' prefixes from tensor names: DDP, torch.compile, FSDP, AveragedModel, Lightning, DeepSpeed."""

import re
from collections.abc import Iterable

from torch import Tensor

from atoll.errors import AtollError

# Before every name, in any order and number.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "base_model.", "net.", "network.", "_forward_module.")
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


def _shared(names: Iterable[str]) -> str:
    """Return a prefix of `PREFIXES` that all names share; "" if there is none."""
    # A prefix that only some names share is part of a name.
    names = list(names)
    return next((p for p in PREFIXES if names and all(n.startswith(p) and n != p for n in names)), "")
