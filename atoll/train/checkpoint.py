"""Training state on disk: one safetensors file, whole or not there, from which training continues bit for bit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from atoll.artifact import write_bytes
from atoll.errors import AtollError

CHECKPOINT = "checkpoint.safetensors"


def fingerprint(settings: dict[str, Any]) -> str:
    """A hash of what must not change between a run and its continuation."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def save_checkpoint(
    directory: Path,
    step: int,
    module: nn.Module,
    ema: list[Tensor],
    optimizer: torch.optim.Optimizer,
    mark: str,
) -> None:
    """Writes the state after `step` steps. The previous checkpoint stays whole until the new one is on the disk.

    Random numbers need no state: every batch is a function of (seed, step) alone.
    """
    tensors: dict[str, Tensor] = {}
    for (name, parameter), average in zip(module.named_parameters(), ema, strict=True):
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"ema.{name}"] = average
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    data = save({name: value.contiguous() for name, value in tensors.items()}, {"step": str(step), "mark": mark})
    write_bytes(directory / CHECKPOINT, data)


def load_checkpoint(
    directory: Path, module: nn.Module, ema: list[Tensor], optimizer: torch.optim.Optimizer, mark: str
) -> int:
    """Restores what `save_checkpoint` wrote, in place, and returns its step.

    Raises:
        AtollError: the file is damaged, or was written under other settings.
    """
    file = directory / CHECKPOINT
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("mark") != mark:
                raise AtollError(
                    f"{file}: was written under other settings or other data; restore them, "
                    "or start again with --restart"
                )
            for (name, parameter), average in zip(module.named_parameters(), ema, strict=True):
                with torch.no_grad():
                    parameter.copy_(stored.get_tensor(f"model.{name}"))
                    average.copy_(stored.get_tensor(f"ema.{name}"))
                keys = [key for key in stored.keys() if key.startswith("optimizer.") and key.endswith(f".{name}")]  # noqa: SIM118
                optimizer.state[parameter] = {
                    key.split(".")[1]: stored.get_tensor(key) for key in keys if key.split(".", 2)[2] == name
                }
            return int(metadata["step"])
    except (SafetensorError, OSError) as error:
        raise AtollError(f"{file}: damaged ({error}); start again with --restart") from None
