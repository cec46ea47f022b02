"""The targets of representation in training: tokens of a middle block predict what encoding stored (REPA, 2410.06940).

    loss = objective + weight * mean over tokens of (1 - cosine(projector(tokens), targets))

The term counts in the first batches only: it speeds up the start and holds back the end (HASTE, arXiv 2505.16792).
The cosine, as in REPA, does not depend on the scale of the targets, which resizing to the token grid changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.manifest.targets import TargetsSettings
from atoll.randomness import hashed_seed
from atoll.storage.cards import ClusterShardsCard, TargetsRecord
from atoll.storage.shards import TARGET, Shards

PROJECTOR = "projector"  # the attribute of the network while it is trained; its weights are no part of the artifact
_NETWORKS = ("dit", "mmdit")  # that return tokens of a block


@dataclass(frozen=True)
class TargetsTerm:
    """The term of a training.

    Attributes:
        weight: of the term.
        block: the number of blocks after which tokens are read.
        end: batches with a smaller index have the term.
        record: of the stored targets.
    """

    weight: float
    block: int
    end: int
    record: TargetsRecord

    @staticmethod
    def of(
        settings: TrainSettings, chosen: TargetsSettings, shards: Sequence[Shards], network: dict[str, Any]
    ) -> "TargetsTerm | None":
        """Return the term that the settings name; None without one.

        Args:
            settings: of the training.
            chosen: the section `targets` of atoll.yaml.
            shards: the rows to train on.
            network: its config.

        Raises:
            AtollError: shards without targets, or with others than atoll.yaml names, or than each other; a network
                that returns no tokens, or has fewer blocks.
        """
        if not settings.targets_weight:
            return None
        record = _stored(shards)
        _refuse_other(shards[0], record, chosen)
        if (name := network.get("name")) not in _NETWORKS:
            raise AtollError(
                f"train.targets_weight: a network {name!r} returns no tokens of its blocks; expected "
                f"{' or '.join(_NETWORKS)}, or set train.targets_weight: 0"
            )
        depth = network["depth"]
        block = settings.targets_block or max(1, depth // 2)
        if block > depth:
            raise AtollError(f"train.targets_block: {block}, and the network has {depth} blocks; lower it")
        return TargetsTerm(settings.targets_weight, block, batches_with_targets(settings), record)

    def attach(self, network: nn.Module, seed: int) -> None:
        """Make a projector part of the network, for training; with a tap, the network then returns predictions."""
        # The global generator is left as it was.
        with torch.random.fork_rng([]):
            torch.manual_seed(hashed_seed("projector", seed))
            network.add_module(PROJECTOR, projector(network.config.width, self.record.dims))  # type: ignore[union-attr, arg-type]
        # Within the network's call, where DDP and FSDP2 see it.
        network.register_forward_hook(_project)

    @staticmethod
    def detach(network: nn.Module) -> None:
        """Remove the projector; the network is as it was before `attach`."""
        delattr(network, PROJECTOR)
        network._forward_hooks = type(network._forward_hooks)(
            (key, hook) for key, hook in network._forward_hooks.items() if hook is not _project
        )

    def losses(self, predicted: Tensor, targets: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the term of each row, [B] float32.

        Args:
            predicted: for every token, [B,N,dims].
            targets: [B,dims,g,g], of the same images.
            grid: (rows, columns) of the tokens, row by row.
        """
        # A bucket's image fills the whole grid of its targets, whatever its aspect.
        places = F.interpolate(targets.float(), grid, mode="bilinear", antialias=True)  # [B,dims,h,w]
        similar = F.cosine_similarity(predicted.float(), places.flatten(2).transpose(1, 2), dim=2)  # [B,N]
        return self.weight * (1 - similar).mean(1)  # [B]


def projector(width: int, dims: int) -> nn.Sequential:
    """Return REPA's projector of tokens [B,N,width] to targets [B,N,dims]: three linear layers, here of the width."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dims))


def is_projector(name: str) -> bool:
    """Return whether a parameter of a network in training belongs to the projector."""
    return name.startswith(f"{PROJECTOR}.")


def batches_with_targets(settings: TrainSettings) -> int:
    """Return how many batches have the term; those that a rollback skips count, too."""
    return int(settings.targets_until * settings.steps) if settings.targets_weight else 0


def _project(network: nn.Module, _: Any, output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Replace the tokens of a tap by the projector's predictions."""
    if isinstance(output, tuple):
        prediction, tokens = output
        return prediction, getattr(network, PROJECTOR)(tokens)
    return None


def _stored(shards: Sequence[Shards]) -> TargetsRecord:
    """Return the record of the targets of all shards. Raises AtollError if some have none, or others."""
    records = [part.card(ClusterShardsCard).targets for part in shards]
    for part, record in zip(shards, records, strict=True):
        if record is None or TARGET not in part.columns:
            raise AtollError(
                f"{part.path}: stores no targets, which train.targets_weight needs; set targets.feature in atoll.yaml, "
                "encode and cluster again with --force, or set train.targets_weight: 0"
            )
        if record != records[0]:
            raise AtollError(
                f"{part.path}: its targets are {record.plain()}, those of {shards[0].path} are "
                f"{records[0].plain() if records[0] else None}; encode both with one set of components (targets.like)"
            )
        if part.shape(TARGET) != (expected := (record.dims, record.grid, record.grid)):
            raise AtollError(
                f"{part.path}: its targets have the shape {list(part.shape(TARGET))}, its card says {list(expected)}; "
                "cluster again with --force"
            )
    assert records[0] is not None
    return records[0]


def _refuse_other(part: Shards, record: TargetsRecord, chosen: TargetsSettings) -> None:
    """Raise AtollError if atoll.yaml names other targets than the shards store; it may name none."""
    if chosen.feature is None:
        return
    # What atoll.yaml leaves open is what encoding chose. The network itself is not needed here.
    stored = {**_prefixed(record.feature), "dims": record.dims, "grid": record.grid}
    wanted = {**_prefixed(identity(chosen.feature)), "dims": chosen.dims, "grid": chosen.grid}
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise AtollError(
                f"{part.path}: stores targets with {key} {stored.get(key)!r}, atoll.yaml names {value!r}; make "
                f"targets.{key} equal, or encode and cluster again with --force"
            )


def _prefixed(feature: dict[str, Any]) -> dict[str, Any]:
    return {f"feature.{key}": value for key, value in feature.items()}
