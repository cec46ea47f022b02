"""Snapshots of power-function averages, and experts reconstructed from them with another width."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import read_card, read_tensors, save_artifact, write_bytes
from atoll.storage.cards import EmaRecord, ExpertCard
from atoll.storage.layout import TrainingLayout
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.tensor_hash import TensorHash, split_hash, with_hash
from atoll.train.ema import gamma_of, solve
from atoll.train.island import Island, gather
from atoll.train.state import State
from atoll.train.targets import is_projector

_METADATA = {"mark", "sigma_rel"}  # of a snapshot's file, beside the hash


@dataclass(frozen=True)
class Snapshot:
    """A saved average.

    Attributes:
        file: of its tensors.
        step: of the training.
        profile: the number of its width in train.ema_profiles.
    """

    file: Path
    step: int
    profile: int


class Snapshots:
    """The snapshots of one training, in ema/ of its directory."""

    def __init__(self, directory: Path, mark: str, island: Island):
        self.files, self.mark, self.island = TrainingLayout(directory), mark, island

    def save(self, state: "State") -> None:
        """Write the current average of each width, atomically; every process of the island must call this."""
        from safetensors.torch import save

        # One file per width; the name holds step and number of the width.
        for number, (sigma_rel, average) in enumerate(zip(state.settings.ema_profiles, state.profiles, strict=True)):
            # Sharded tensors are gathered by all processes.
            named = zip(state.names, average, strict=True)
            tensors = {name: gather(tensor).cpu() for name, tensor in named if not is_projector(name)}
            if self.island.is_first:
                self.files.ema.mkdir(exist_ok=True)
                metadata = {"mark": self.mark, "sigma_rel": repr(sigma_rel)}
                file = self.files.snapshot(state.numbers.step, number)
                write_bytes(file, save(tensors, with_hash(tensors, metadata)))

    def drop_after(self, step: int) -> None:
        """Remove the snapshots of later steps, which will be trained again."""
        # Only the process that writes snapshots removes them.
        if self.island.is_first:
            for snapshot in snapshots_of(self.files.ema):
                if snapshot.step > step:
                    snapshot.file.unlink()


def snapshots_of(directory: Path) -> list[Snapshot]:
    """Return the snapshots in a directory, in the order of their steps."""
    snapshots = []
    for file in sorted(directory.glob("[0-9]*.safetensors")):
        # The name holds the step and the number of the width.
        step, profile = file.stem.split("-")
        snapshots.append(Snapshot(file, int(step), int(profile)))
    return snapshots


def reconstruct_expert(expert: Path, sigma_rel: float, out: Path, step: int | None = None) -> Path:
    """Reconstruct the expert whose weights are averaged with another width, from the snapshots of its training.

    The new expert has no calibration, since that was measured on other weights.

    Args:
        expert: the artifact where training wrote it, beside its .train- directory.
        sigma_rel: the width, see `atoll.train.ema`; a fraction of the steps until the average ends.
        out: the directory of the new artifact.
        step: of a snapshot, at which the average ends, as if training had ended there; None: the last step.

    Returns:
        `out`.

    Raises:
        AtollError: no snapshots, or those of another training; none of this step; sigma_rel out of range; `out` exists
            already.
    """
    # Check the arguments, then fit the width by the snapshots' profiles.
    gamma = gamma_of(sigma_rel)
    if out.exists():
        raise AtollError(f"{out}: exists already; choose another directory, or remove it")
    card = read_card(expert, ExpertCard)
    training = card.training
    if training is None:
        raise AtollError(f"{expert}: its card has no training; name an expert that was trained here")
    directory = TrainingLayout.of(expert.resolve()).ema
    snapshots = snapshots_of(directory)
    if not snapshots:
        raise AtollError(f"{directory}: no snapshots; train with train.ema_profiles, such as [0.05, 0.1]")
    if step is not None:
        # Between two snapshots the weights are unknown.
        steps = sorted({snapshot.step for snapshot in snapshots})
        if step not in steps:
            raise AtollError(f"{directory}: no snapshot of step {step}; expected one of {_listed(steps)}")
        snapshots = [snapshot for snapshot in snapshots if snapshot.step <= step]
    tensors = read_tensors(expert, card)
    # A training that was extended took its first snapshots under an earlier plan.
    marks = {training.mark, *(plan.mark for plan in training.plans or ())}
    widths = [_width(snapshot, marks) for snapshot in snapshots]
    gammas = [gamma_of(width) for width in widths]
    factors = solve([s.step for s in snapshots], gammas, training.steps if step is None else step, gamma)
    # The same factors, applied to the weights.
    average = _weighted(snapshots, factors, {k: v for k, v in tensors.items() if k.startswith("network.")})
    ema = EmaRecord(
        sigma_rel=sigma_rel,
        snapshots=len(snapshots),
        widths=sorted(set(widths)),
        of=card.weights_sha256,
        **({} if step is None else {"step": step}),
    )
    changes = {"training": training.model_copy(update={"ema": ema}), "calibration": None}
    save_artifact(out, card.model_copy(update=changes), average)
    return out


def _listed(steps: list[int]) -> str:
    """The steps as text, at most six of them."""
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])


def _width(snapshot: Snapshot, marks: set[str]) -> float:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(snapshot.file, framework="pt") as stored:
            metadata, _ = split_hash(stored.metadata() or {}, _METADATA)
        if metadata["mark"] in marks:
            return float(metadata["sigma_rel"])
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise _damaged(snapshot.file, error) from None
    raise AtollError(f"{snapshot.file}: belongs to another training than the expert; name the expert of that training")


def _weighted(snapshots: list[Snapshot], factors: np.ndarray, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted sums of the snapshots' tensors, in float64; buffers keep their values in `tensors`."""
    sums: dict[str, Tensor] = {}
    for snapshot, factor in zip(snapshots, factors.tolist(), strict=True):
        for name, value in _intact_tensors(snapshot.file):
            # In float64: factors of both signs cancel.
            part = value.double() * factor
            key = f"network.{name}"
            sums[key] = sums[key].add_(part) if key in sums else part
    return {**tensors, **{name: value.to(tensors[name].dtype) for name, value in sums.items()}}


def _intact_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield a snapshot's tensors by name. Raises AtollError if it is damaged, after the last tensor at the latest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            metadata, expected = split_hash(stored.metadata() or {}, _METADATA)
            content = TensorHash(metadata)
            for name in sorted(stored.keys()):
                value = stored.get_tensor(name)
                content.add(name, value)
                if not bool(value.isfinite().all()):
                    raise ValueError(f"{name} holds NaN or infinity")
                yield name, value
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise _damaged(file, error) from None
    if expected is not None and content.hexdigest() != expected:
        raise _damaged(file, "its contents are not those that were written, their sha256 is another")


def _damaged(file: Path, why: str | BaseException) -> AtollError:
    # A snapshot that does not fit into memory is intact.
    if isinstance(why, BaseException):
        refuse_out_of_memory(why, file)
    return AtollError(f"{file}: damaged ({why}); remove it to use the others")
