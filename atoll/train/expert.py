"""Trains one expert on one cluster's shards and nothing else: `atoll train expert 3`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.artifact import save_artifact
from atoll.calibration import Calibration
from atoll.condition import Encoder, build_encoder
from atoll.errors import AtollError
from atoll.manifest import ExpertSettings, Manifest, MonolithSettings, NetworkSettings, TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.shards import SPLITS, Shards, Split
from atoll.train.batches import CaptionedLatents, Order, drop_condition, seeded
from atoll.train.calibrate import measure_calibration
from atoll.train.loop import Progress, finished, train, training_mark


def train_expert(
    run: Path,
    manifest: Manifest,
    wanted: str,
    resume: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Trains the expert `wanted` (cluster or full name) of the run and returns its artifact's directory.

    Raises:
        AtollError: no such expert, missing or damaged shards, NaN loss, a checkpoint in the way.
    """
    expert = manifest.find_expert(wanted)
    shards = Shards(run / "clusters" / f"cluster-{expert.cluster:03d}")
    number = next(i for i, e in enumerate(manifest.experts) if e is expert)
    job = _Job(
        run / "experts" / expert.full_name,
        expert.full_name,
        expert,
        (expert.cluster,),
        manifest.seed * 1000 + number,
    )
    return _train(job, manifest, [shards], resume, restart, progress)


def train_monolith(
    run: Path,
    manifest: Manifest,
    resume: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Trains the dense model of the comparison on all clusters and returns its artifact's directory."""
    if manifest.monolith is None:
        raise AtollError("atoll.yaml names no monolith; add a `monolith:` section with its objective")
    clusters = tuple(range(manifest.clusters.k))
    shards = [Shards(run / "clusters" / f"cluster-{k:03d}") for k in clusters]
    job = _Job(run / "monolith", "monolith", manifest.monolith, clusters, manifest.seed * 1000 + 999)
    return _train(job, manifest, shards, resume, restart, progress)


class _Job:
    """What tells one training of a denoiser from another."""

    def __init__(
        self,
        path: Path,
        name: str,
        part: ExpertSettings | MonolithSettings,
        clusters: tuple[int, ...],
        seed: int,
    ):
        self.path, self.name, self.part, self.clusters, self.seed = path, name, part, clusters, seed


def _train(
    job: _Job,
    manifest: Manifest,
    shards: Sequence[Shards],
    resume: bool,
    restart: bool,
    progress: Progress | None,
) -> Path:
    card = shards[0].card
    encoder = build_encoder(card["condition"])
    objective = Objective(**job.part.objective.model_dump())
    settings = manifest.train_of(job.part)
    network_config = dit_config(manifest.network_of(job.part), card["latent_shape"], encoder.dim, encoder.pooled_dim)
    latents, captions = _read(shards)
    training, held_out, measured_on = _hold_back(latents, captions, encoder, settings.hold_back, job.seed)

    identity = {
        "network": network_config,
        "objective": objective.config(),
        "assignment": card["assignment"],
        "clusters": list(job.clusters),
        "seed": job.seed,
    }
    mark = training_mark(identity, settings)
    if finished(job.path, "expert", mark, resume, restart):
        return job.path
    torch.manual_seed(job.seed)
    network = build_network(network_config)
    state = job.path.with_name(f".train-{job.name}")
    loss = denoising_loss(network, objective, training, settings, job.seed)
    trained = train(network, loss, settings, state, mark, resume, restart, progress)

    calibration = calibrate(network, objective, held_out, mean=training.latents.float().mean(0), seed=job.seed)
    save_artifact(
        job.path,
        "expert",
        {
            "name": job.name,
            "clusters": list(job.clusters),
            "k": card["clusters"],
            "objective": objective.config(),
            "network": network_config,
            "latent_shape": card["latent_shape"],
            "codec": card["codec"],
            "condition": card["condition"],
            "assignment": card["assignment"],
            "calibration": {**calibration.config(), "measured_on": measured_on, "latents": len(held_out)},
            "training": {
                **trained.summary,
                "rows": len(training),
                "seed": job.seed,
                "torch": torch.__version__,
            },
        },
        {
            **{f"network.{name}": value for name, value in network.state_dict().items()},
            **{f"calibration.{name}": value for name, value in calibration.tensors().items()},
        },
    )
    return job.path


def _hold_back(
    latents: dict[Split, Tensor], captions: dict[Split, list[str]], encoder: Encoder, share: float, seed: int
) -> tuple[CaptionedLatents, CaptionedLatents, str]:
    """(rows to train on, rows to calibrate on, what the latter are).

    With a share, so many training rows are kept from training: held out, but of the same words as what is asked at
    inference. Without one they are the val split, or, on an island that has none, the training rows themselves.
    """
    every = CaptionedLatents(latents["train"], captions["train"], encoder)
    if share > 0:
        order = torch.randperm(len(every), generator=seeded(seed, 0, stream=9))
        kept = max(1, round(share * len(every)))
        return every.select(order[kept:].sort().values), every.select(order[:kept].sort().values), "held back"
    if captions["val"]:
        return every, CaptionedLatents(latents["val"], captions["val"], encoder), "val"
    return every, every, "train"


def dit_config(
    network: NetworkSettings, latent_shape: Sequence[int], states_dim: int, pooled_dim: int | None
) -> dict[str, Any]:
    """The whole DiT config from the manifest's choices, the latent's shape [C, H, W] and the text's widths."""
    channels, height, width = latent_shape
    free = network.model_dump(exclude={"pooled"})
    return {
        "name": "dit",
        **free,
        "channels": channels,
        "size": [height, width],
        "states_dim": states_dim,
        "pooled_dim": pooled_dim if network.pooled else None,
    }


def denoising_loss(
    network: nn.Module, objective: Objective, data: CaptionedLatents, settings: TrainSettings, seed: int
) -> Any:
    """step -> mean loss of the step's batch, with the condition dropped in a share of the rows."""
    order = Order(len(data), settings.batch, seed)
    null = data.encoder.null(1)

    def batch_loss(step: int) -> Tensor:
        g = seeded(seed, step)
        x0, condition = data.at(order.at(step))
        t = objective.sample_time(len(x0), g)
        eps = torch.randn(x0.shape, generator=g)
        condition = drop_condition(condition, null, torch.rand(len(x0), generator=g) < settings.dropout)
        output = network(objective.diffuse(x0, eps, t), t * objective.time_scale, condition)
        return objective.loss(output, x0, eps, t).mean()

    return batch_loss


def calibrate(network: nn.Module, objective: Objective, data: CaptionedLatents, mean: Tensor, seed: int) -> Calibration:
    """The expert's calibration on held-out latents with their own captions."""
    x0, condition = data.at(torch.arange(len(data)))
    return measure_calibration(network, objective, x0, condition, mean=mean, seed=seed)


def _read(shards: Sequence[Shards]) -> tuple[dict[Split, Tensor], dict[Split, list[str]]]:
    """Latents and captions by split, of all given shards."""
    latents = {s: torch.cat([part.read("latent", part.rows(s)) for part in shards]) for s in SPLITS}
    captions = {s: [part.captions[i] for part in shards for i in part.rows(s).tolist()] for s in SPLITS}
    return latents, captions
