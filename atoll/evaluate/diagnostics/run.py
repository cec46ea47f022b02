"""The alignment diagnostics of a run: its held-out latents, its clusters' data and its trajectories."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.encoders.codec import Codec
from atoll.encoders.text import PromptEncoder
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.cluster_space import ClusterSpace
from atoll.evaluate.diagnostics.routers import ConditionSource, HeldOut
from atoll.evaluate.diagnostics.trajectory import Diagnostics, Draw, diagnose
from atoll.evaluate.metrics.frechet import Features
from atoll.manifest import EvaluateSettings
from atoll.randomness import cpu_generator, random_rows, seeded_noise
from atoll.storage.shards import LATENTS, Shards

_IMAGES_PER_CLUSTER = 1024  # random training images that represent a cluster, at most


def diagnose_run(
    ensemble: Ensemble,
    *,
    clusters: Sequence[Shards],
    encoder: PromptEncoder,
    codec: Codec,
    space: Features,
    settings: EvaluateSettings,
    device: str | torch.device = "cpu",
) -> Diagnostics:
    """Diagnose `settings.diagnostic_samples` trajectories and at most four times as many held-out latents.

    Args:
        ensemble: with its own routing.
        clusters: shards of the run's clusters, in the experts' numbering.
        encoder: of the prompts.
        codec: decodes latents to images.
        space: feature space for distances to the clusters' data.
        settings: sampling, levels, seed and batch size.
        device: of the networks.

    Raises:
        AtollError: there are no clusters, or none has held-out rows.
    """
    if not clusters:
        raise AtollError(
            "evaluate.diagnostic_samples needs the clusters' shards in the run; copy clusters/ here, or set it to 0"
        )
    # Every expert is compared with the others at every level.
    if some := [expert.name for expert in ensemble.experts if expert.objective.levels is not None]:
        raise AtollError(
            f"evaluate.diagnostic_samples evaluates every expert at every level, and {', '.join(some)} are of some "
            "levels only; set it to 0"
        )
    # The trajectories use the captions of some of the held-out latents.
    held_out, encode = _held_out_latents(clusters, encoder, settings)
    sampled = random_rows(len(held_out.x0), settings.diagnostic_samples, cpu_generator(settings.seed))

    # Distances are taken between decoded images.
    def features(latents: Tensor) -> Tensor:
        return space(codec.decode(latents))

    # Trajectories start from seeded noise, with prompts from the held-out latents.
    return diagnose(
        ensemble,
        seeded_noise([settings.seed + i for i in range(len(sampled))], held_out.x0.shape[1:]),
        lambda numbers: encode(sampled[numbers]),
        space=ClusterSpace.of(_batches(clusters, settings), features, space.name),
        held_out=held_out,
        draw=Draw(settings.steps, settings.method, settings.guidance_scale),
        levels=settings.levels,
        clusters=held_out.labels[sampled],
        seed=settings.seed,
        batch=settings.batch,
        device=device,
    )


def _held_out_latents(
    clusters: Sequence[Shards], encoder: PromptEncoder, settings: EvaluateSettings
) -> tuple[HeldOut, ConditionSource]:
    """Held-out latents from all clusters, and the function that encodes their captions by row number."""
    # A few random rows of every cluster.
    count = -(-4 * settings.diagnostic_samples // len(clusters))
    rows = [_random_rows(shards, "val", count, settings.seed) for shards in clusters]
    x0 = torch.cat([shards.read("latent", own).float() for shards, own in zip(clusters, rows, strict=True)])
    # Diagnostics on training latents would favour the experts that have seen them.
    if len(x0) == 0:
        raise AtollError(f"{clusters[0].path} and the others: no rows of split val; encode with some held out")
    # The cluster of each latent is its label.
    labels = torch.cat([torch.full((len(own),), number) for number, own in enumerate(rows)])
    captions = [shards.captions[row] for shards, own in zip(clusters, rows, strict=True) for row in own.tolist()]
    tokens = encoder.tokenize(captions)

    # Encode prompts batch by batch: all states would not fit into memory.
    def condition(numbers: Tensor) -> tuple[Condition, ...]:
        return encoder.encode(tokens.index(numbers))

    return HeldOut(x0, labels, [settings.seed + i for i in range(len(x0))], condition), condition


def _random_rows(shards: Shards, split: Literal["train", "val"], count: int, seed: int) -> Tensor:
    """At most `count` random rows of the split that have the main size."""
    rows = shards.rows(split, LATENTS[0])
    return rows[random_rows(len(rows), count, cpu_generator(seed))]


def _batches(clusters: Sequence[Shards], settings: EvaluateSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Training latents of each cluster, with the cluster's number."""
    for number, shards in enumerate(clusters):
        # A bounded number of images per cluster, batch by batch.
        for rows in _random_rows(shards, "train", _IMAGES_PER_CLUSTER, settings.seed).split(settings.batch):
            yield shards.read("latent", rows).float(), torch.full((len(rows),), number)
