"""The alignment diagnostics of a run: where its held-out latents, clusters and trajectories come from."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from atoll.condition import Condition, Conditions
from atoll.encoders.codec import Codec
from atoll.encoders.text import PromptEncoder, TextEncoder
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.cluster_space import ClusterSpace
from atoll.evaluate.diagnostics.routers import HeldOut
from atoll.evaluate.diagnostics.trajectory import Diagnostics, Draw, diagnose
from atoll.evaluate.metrics.frechet import Features
from atoll.manifest import EvaluateSettings
from atoll.randomness import cpu_generator, random_rows, seeded_noise
from atoll.storage.shards import Shards

_OF_CLUSTER = 1024  # images at most, at random, that stand for a cluster


def diagnose_run(
    ensemble: Ensemble,
    clusters: Sequence[Shards],
    encoder: TextEncoder | PromptEncoder,
    codec: Codec,
    space: Features,
    settings: EvaluateSettings,
    device: str | torch.device = "cpu",
) -> Diagnostics:
    """Diagnose `settings.diagnostic_samples` trajectories and at most four times as many held-out latents.

    clusters: of the run, numbered as the experts' are. space: what distances to their data are taken in.

    Raises:
        AtollError: no clusters, or none of them holds out anything.
    """
    if not clusters:
        raise AtollError(
            "evaluate.diagnostic_samples needs the clusters' shards beside the run; copy clusters/ here, or set it to 0"
        )
    rows = [
        _some(shards, "val", -(-4 * settings.diagnostic_samples // len(clusters)), settings.seed) for shards in clusters
    ]
    x0 = torch.cat([shards.read("latent", own).float() for shards, own in zip(clusters, rows, strict=True)])
    if len(x0) == 0:
        raise AtollError(f"{clusters[0].path} and the others hold no rows of split val; encode with some held out")
    labels = torch.cat([torch.full((len(own),), number) for number, own in enumerate(rows)])
    captions = [shards.captions[row] for shards, own in zip(clusters, rows, strict=True) for row in own.tolist()]
    tokens = encoder.tokenize(captions)

    def condition(numbers: Tensor) -> Condition | Conditions:
        return encoder.encode(tokens.index(numbers))

    held_out = HeldOut(x0, labels, [settings.seed + i for i in range(len(x0))], condition)
    drawn = random_rows(len(x0), settings.diagnostic_samples, cpu_generator(settings.seed))

    def features(latents: Tensor) -> Tensor:
        return space(codec.decode(latents))

    return diagnose(
        ensemble,
        seeded_noise([settings.seed + i for i in range(len(drawn))], x0.shape[1:]),
        lambda numbers: condition(drawn[numbers]),
        ClusterSpace.of(_batches(clusters, settings), features, space.name),
        held_out,
        Draw(settings.steps, settings.method, settings.guidance_scale),
        settings.levels,
        labels[drawn],
        settings.seed,
        settings.batch,
        device,
    )


def _some(shards: Shards, split: Literal["train", "val"], count: int, seed: int) -> Tensor:
    """At most `count` rows of the split, at random."""
    rows = shards.rows(split)
    return rows[random_rows(len(rows), count, cpu_generator(seed))]


def _batches(clusters: Sequence[Shards], settings: EvaluateSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Training latents of each cluster with its number."""
    for number, shards in enumerate(clusters):
        for rows in _some(shards, "train", _OF_CLUSTER, settings.seed).split(settings.batch):
            yield shards.read("latent", rows).float(), torch.full((len(rows),), number)
