"""Trains the router: which cluster does a noisy latent belong to? (DDM section 3.3): `atoll train router`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.artifact import read_json, save_artifact
from atoll.condition import Encoder, build_encoder
from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings
from atoll.nn import build_network
from atoll.schedule import Linear
from atoll.shapes import per_sample
from atoll.shards import Shards
from atoll.train.batches import CaptionedLatents, Order, drop_condition, seeded
from atoll.train.loop import Progress, finished, train, training_mark

_PATH = Linear()
_EVALUATED_AT = (0.1, 0.3, 0.5, 0.7, 0.9)


def train_router(
    run: Path,
    manifest: Manifest,
    resume: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Trains the router on all latents and their assignment, and returns its artifact's directory.

    Raises:
        AtollError: missing or damaged shards, an assignment that lacks a latent, NaN loss, a checkpoint in the way.
    """
    encoded = Shards(run / "encoded")
    clusters = read_json(run / "clusters" / "clusters.json")
    assignment = _assignment(run / "clusters" / "assignment.parquet")
    try:
        labels = torch.tensor([assignment[key] for key in encoded.keys])
    except KeyError as error:
        raise AtollError(
            f"{run / 'clusters'}: the assignment lacks the key {error}; it is of other data: run `atoll cluster` again"
        ) from None
    settings = manifest.train_of(manifest.router)
    free = manifest.router.network
    encoder = build_encoder(encoded.card["condition"])
    latent_shape = list(encoded.shape("latent"))
    config = {
        "name": "router",
        "size": latent_shape[1:],
        "channels": latent_shape[0],
        "clusters": clusters["k"],
        "pooled_dim": encoder.pooled_dim if free.pooled else None,
        **free.model_dump(exclude={"pooled"}),
    }
    seed = manifest.seed * 1000 + 998
    path = run / "router"
    mark = training_mark({"network": config, "assignment": clusters["assignment"], "seed": seed}, settings)
    if finished(path, "router", mark, resume, restart):
        return path
    torch.manual_seed(seed)
    router = build_network(config)
    rows, held_out = encoded.rows("train"), encoded.rows("val")
    loss = routing_loss(router, _captioned(encoded, rows, encoder), labels[rows], settings, seed)
    trained = train(router, loss, settings, path.with_name(".train-router"), mark, resume, restart, progress)

    accuracy = router_accuracy(router, _captioned(encoded, held_out, encoder), labels[held_out], seed)
    save_artifact(
        path,
        "router",
        {
            "network": config,
            "clusters": clusters["k"],
            "latent_shape": latent_shape,
            "codec": encoded.card["codec"],
            "assignment": clusters["assignment"],
            "accuracy_at_t": accuracy,
            "training": {**trained.summary, "rows": len(rows), "seed": seed, "torch": torch.__version__},
        },
        {f"network.{name}": value for name, value in router.state_dict().items()},
    )
    return path


def routing_loss(router: nn.Module, data: CaptionedLatents, labels: Tensor, settings: TrainSettings, seed: int) -> Any:
    """step -> mean cross-entropy of log p(cluster | x_t, t[, text]), t uniform on the linear path.

    The text is dropped in a share of the rows as in an expert's training, so that the router answers without it too.
    """
    order = Order(len(data), settings.batch, seed)
    null = data.encoder.null(1)

    def batch_loss(step: int) -> Tensor:
        g = seeded(seed, step)
        rows = order.at(step)
        x0, condition = data.at(rows)
        t = torch.rand(len(rows), generator=g)
        x = _diffuse(x0, t, g)
        condition = drop_condition(condition, null, torch.rand(len(rows), generator=g) < settings.dropout)
        return F.nll_loss(router(x, t, condition.pooled), labels[rows])

    return batch_loss


@torch.inference_mode()
def router_accuracy(router: nn.Module, data: CaptionedLatents, labels: Tensor, seed: int) -> dict[str, float]:
    """Top-1 accuracy on held-out latents at a few times: {"0.1": 0.98, ...}; empty without such latents."""
    accuracy = {}
    for number, time in enumerate(_EVALUATED_AT if len(data) else ()):
        x0, condition = data.at(torch.arange(len(data)))
        t = torch.full((len(data),), time)
        x = _diffuse(x0, t, seeded(seed, number, stream=7))
        accuracy[str(time)] = round(float((router(x, t, condition.pooled).argmax(1) == labels).float().mean()), 4)
    return accuracy


def _captioned(encoded: Shards, rows: Tensor, encoder: Encoder) -> CaptionedLatents:
    captions = [encoded.captions[i] for i in rows.tolist()]
    return CaptionedLatents(encoded.read("latent", rows), captions, encoder)


def _diffuse(x0: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    eps = torch.randn(x0.shape, generator=generator)
    return per_sample(_PATH.alpha(t), x0) * x0 + per_sample(_PATH.sigma(t), x0) * eps


def _assignment(file: Path) -> dict[str, int]:
    """key -> cluster."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, columns=["key", "cluster"])
    except (OSError, pa.ArrowException) as error:
        raise AtollError(f"{file}: cannot be read ({error}); run `atoll cluster` again") from None
    return dict(zip(table["key"].to_pylist(), table["cluster"].to_pylist(), strict=True))
